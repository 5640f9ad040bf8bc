"""Versions of a node's tunables: those that each accepted lesson led to, so that a node can go back.

The cloud changes by lessons only: its version 0 is the model that was delivered, and each accepted lesson makes one
more. An edge is also tuned by its rounds, so of each accepted lesson it keeps two: what was there before, and after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from ecogen.models.checkpoint import load_metadata, load_tensors, save_tensors
from ecogen.models.tunables import Tunables

What = Literal["delivered", "before", "after", "set aside"]
"""What a version is: the delivered model; what was there before a lesson, or after it; what a rollback replaced."""

FOLDER = "relay"
"""Of versions, in that of a node."""

_PREFIX, _SUFFIX = "version-", ".safetensors"


@dataclass(frozen=True)
class Version:
    """One version on a node's disk.

    Attributes:
        cycle: of the lesson; None where it is of none.
        round_index: the last round before it was made; None where there is none, or nobody wrote it down.
    """

    number: int
    what: What
    cycle: int | None = None
    round_index: int | None = None


def keep(folder: Path, version: Version, tunables: Mapping[str, Tensor]) -> None:
    """Write a version atomically."""
    facts = {"what": version.what, "cycle": version.cycle, "round": version.round_index}
    told = {name: str(value) for name, value in facts.items() if value is not None}
    save_tensors(path_of(folder, version.number), tunables, told)


def kept(folder: Path) -> dict[int, Version]:
    """All versions in a folder by number, in order.

    Raises:
        CheckpointError: if one is corrupt.
    """
    names = (path.name.removeprefix(_PREFIX).removesuffix(_SUFFIX) for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"))
    return {number: _version(folder, number) for number in sorted(int(name) for name in names if name.isdecimal())}


def load(folder: Path, number: int) -> Tunables:
    """The tunables of a version.

    Raises:
        CheckpointError: if it is missing or corrupt.
    """
    return load_tensors(path_of(folder, number))


def is_version(folder: Path, number: int, tunables: Mapping[str, Tensor]) -> bool:
    """Whether tunables are those of a version, number by number."""
    if not path_of(folder, number).exists():
        return False
    own = load(folder, number)
    return own.keys() == tunables.keys() and all(torch.equal(own[name], tunables[name]) for name in own)


def path_of(folder: Path, number: int) -> Path:
    """The file of a version."""
    return folder / f"{_PREFIX}{number}{_SUFFIX}"


def _version(folder: Path, number: int) -> Version:
    told = load_metadata(path_of(folder, number))
    what: What = next((known for known in get_args(What) if known == told.get("what")), "after")
    return Version(number, what, _count(told.get("cycle")), _count(told.get("round")))


def _count(told: str | None) -> int | None:
    return None if told is None else int(told)
