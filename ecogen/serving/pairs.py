"""Pairs of questions of which it is known whether they mean the same.

A file of them is TOML: `same`, pairs that do; `[opposite]`, by what makes the difference, pairs that do not; and sets,
whose wordings hold `{0}`, `{1}`, ... for the parts of each of their topics. `linked` are pairs that mean the same too,
for whoever asks which of all questions do, and count in nothing else. `pairs.toml` beside this file is one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecogen.errors import ServingError

OWN_PAIRS = Path(__file__).with_suffix(".toml")

SAME, LINKED = "same", "linked"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two questions.

    Attributes:
        kind: "same", "linked", or what makes the difference: an antonym, a negation, the order of words, ...
        origin: the set it is of; "by hand" where it was written for itself.
    """

    first: str
    second: str
    kind: str
    origin: str

    @property
    def is_same(self) -> bool:
        return self.kind in (SAME, LINKED)


def read_pairs(path: Path) -> list[Pair]:
    """All pairs of a file but the linked ones, its sets written out; see `read_all_pairs`.

    Raises:
        ServingError: if it cannot be read as described above.
    """
    return [pair for pair in read_all_pairs(path) if pair.kind != LINKED]


def read_all_pairs(path: Path) -> list[Pair]:
    """All pairs of a file, its sets written out.

    Raises:
        ServingError: if it cannot be read as described above.
    """
    try:
        table = tomllib.loads(path.read_text())
        return [*_written(table, "by hand", [[]]), *(pair for each in table.get("sets", []) for pair in _of_set(each))]
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as problem:
        raise ServingError(f"{path} holds no pairs of questions that can be read: {problem!r}") from problem


def _of_set(table: Mapping[str, Any]) -> Iterator[Pair]:
    return _written(table, table["name"], table["topics"])


def _written(table: Mapping[str, Any], origin: str, topics: Sequence[Sequence[str]]) -> Iterator[Pair]:
    for kind, wordings in {
        SAME: table.get(SAME, []),
        LINKED: table.get(LINKED, []),
        **table.get("opposite", {}),
    }.items():
        for topic in topics:
            for first, second in wordings:
                yield Pair(first.format(*topic), second.format(*topic), kind, origin)
