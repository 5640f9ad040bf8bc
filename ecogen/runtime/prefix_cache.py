"""What the frozen prefix of a model made of each example: computed and sent once, then recalled epoch after epoch.

Whoever sends examples reserves room for them first. Rows are kept in memory up to a bound, then in a file whose bytes
are set aside when they are reserved, so that no row is ever lost. Nothing is thrown out for another: an epoch goes
through all examples, so what was used longest ago is needed next.

Shapes: B rows, T tokens, D hidden.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def prefix_keys(inputs: Tensor, version: str) -> Tensor:
    """A key [B] for each input as it enters a prefix: of tokens, or of pixels, which augmentation has been through.

    Args:
        version: what the prefix is; another one makes other keys.
    """
    begun = hashlib.blake2b(version.encode(), digest_size=8)
    keys = []
    for one in inputs.contiguous():
        digest = begun.copy()
        digest.update(one.numpy().tobytes())
        keys.append(int.from_bytes(digest.digest(), "little", signed=True))
    return torch.tensor(keys, dtype=torch.int64)


class PrefixCache:
    """Rows by key, all of one size.

    Args:
        path: the file for what memory has no room for.
        row_bytes: of each row, in float32.
        memory_bytes: of rows in memory, at most.
        disk_bytes: of rows in the file, at most.
    """

    def __init__(self, path: Path, row_bytes: int, memory_bytes: int, disk_bytes: int) -> None:
        self._path, self._row_bytes = path, row_bytes
        self._most_in_memory, self._most_on_disk = memory_bytes // row_bytes, disk_bytes // row_bytes
        self._reserved: dict[str, int] = {}
        self._places: dict[int, int] = {}
        self._in_memory: list[Tensor] = []
        self._row_shape = torch.Size()
        self._on_disk: np.memmap[tuple[int, ...], np.dtype[np.float32]] | None = None

    @property
    def keys(self) -> Tensor:
        """Of all rows [N]."""
        return torch.tensor(list(self._places), dtype=torch.int64)

    @property
    def memory_bytes(self) -> int:
        """What the rows take in memory now."""
        return len(self._in_memory) * self._row_bytes

    def reserve(self, owner_id: str, wanted: int) -> int:
        """Reserve room for so many rows of an owner, those it has already included; returns for how many there is."""
        others = sum(count for other, count in self._reserved.items() if other != owner_id)
        self._set_aside(others + wanted - self._most_in_memory)
        most = self._most_in_memory + (0 if self._on_disk is None else len(self._on_disk))
        self._reserved[owner_id] = min(wanted, max(0, most - others))
        return self._reserved[owner_id]

    def keep(self, keys: Sequence[int], rows: Tensor) -> None:
        """Keep rows [B, T, D] for which room is reserved."""
        for key, row in zip(keys, rows.detach().float().cpu(), strict=True):
            if key not in self._places:
                self._write(len(self._places), row)
                self._places[key] = len(self._places)

    def recall(self, keys: Sequence[int]) -> Tensor:
        """The rows [B, T, D] of these keys.

        Raises:
            KeyError: if one was never kept.
        """
        return torch.stack([self._read(self._places[key]) for key in keys])

    def close(self) -> None:
        """Give the disk back."""
        self._on_disk = None
        self._path.unlink(missing_ok=True)

    def _write(self, place: int, row: Tensor) -> None:
        self._row_shape = row.shape
        if place < self._most_in_memory:
            self._in_memory.append(row.clone())
        else:
            assert self._on_disk is not None, "a row was kept without room for it"
            self._on_disk[place - self._most_in_memory] = row.flatten().numpy()

    def _read(self, place: int) -> Tensor:
        if place < self._most_in_memory:
            return self._in_memory[place]
        assert self._on_disk is not None
        return torch.from_numpy(self._on_disk[place - self._most_in_memory].copy()).view(self._row_shape)

    def _set_aside(self, num_rows: int) -> None:
        """Let the file have so many rows, as far as the bound and the disk allow."""
        num_rows = min(num_rows, self._most_on_disk)
        if num_rows <= (0 if self._on_disk is None else len(self._on_disk)):
            return
        try:
            with self._path.open("ab") as file:
                _allocate(file, num_rows * self._row_bytes)
        except OSError as problem:
            logger.warning("no room on disk for the prefix of %d more examples: %s", num_rows, problem)
            return
        self._on_disk = np.memmap(self._path, np.float32, "r+", shape=(num_rows, self._row_bytes // 4))


def _allocate(file: BinaryIO, num_bytes: int) -> None:
    """Have the disk set so many bytes aside, which a file with holes in it would not."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    else:  # macOS
        file.write(bytes(max(0, num_bytes - file.seek(0, os.SEEK_END))))
