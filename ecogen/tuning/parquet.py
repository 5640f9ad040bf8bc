"""Rows of Parquet files; the library is `pyarrow`, of the extra `data`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ecogen.errors import DataError

_COLUMNS = ("text", "prompt", "completion", "messages")


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Each row of a file, with those of its columns that documents are made of.

    Raises:
        DataError: if pyarrow is not there, or the file is no Parquet.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as problem:
        raise DataError(f"{file} needs pyarrow; install it: pip install 'ecogen[data]'") from problem
    try:
        opened = parquet.ParquetFile(file)
        columns = [name for name in opened.schema_arrow.names if name in _COLUMNS]
        for batch in opened.iter_batches(columns=columns):
            yield from ({k: v for k, v in row.items() if v is not None} for row in batch.to_pylist())
    except (OSError, pyarrow.ArrowException) as problem:
        raise DataError(f"{file} is no Parquet file, or is damaged ({problem}); restore it") from problem
