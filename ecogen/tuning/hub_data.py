"""Data sets of the hub; the library is `datasets`, which is used where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ecogen.errors import DataError


def read_hub_rows(name: str) -> Iterator[dict[str, Any]]:
    """The training rows of a data set, by its repository.

    Raises:
        DataError: if the library is not there, or the hub cannot be reached.
    """
    try:
        from datasets import load_dataset
    except ImportError as problem:
        raise DataError(
            f"data.path 'hf:{name}' needs the library datasets: pip install datasets; or download its Parquet files "
            "and give their folder as data.path"
        ) from problem
    try:
        rows = load_dataset(name, split="train")
    except Exception as problem:  # whatever the library ran into, most often that there is no network
        raise DataError(
            f"cannot get the data set {name!r} from the hub ({type(problem).__name__}: {problem}); "
            "download its Parquet files where there is a network, then give their folder as data.path"
        ) from problem
    yield from rows
