"""One contradiction of a recipe."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Contradiction(NamedTuple):
    """Values that are right by themselves and wrong together.

    Attributes:
        places: of all of them; where one is wrong by itself, only that is told.
    """

    places: tuple[str, ...]
    text: str


def unknown(place: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[Contradiction]:
    """Names that a mapping at that place gives and this topology has not."""
    counts = ("topology.edges", "topology.clusters_per_edge", "topology.devices_per_cluster")
    for name in sorted(given.keys() - known.keys()):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(list(known)[:6])}, ..."
        yield Contradiction(counts, f"{place}.{name}: no such name in this topology; {hint}")
