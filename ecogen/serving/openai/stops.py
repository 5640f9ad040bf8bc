"""Stop strings in a text that comes piece by piece: where it ends, and what must wait since a stop may begin there."""

from __future__ import annotations

from collections.abc import Sequence


class StopSearch:
    """Looks for stop strings, however the text is cut into pieces.

    The stop that is complete first counts, as if characters came one by one; of several at once the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def take(self, text: str) -> tuple[str, bool]:
        """What may be shown now, and whether a stop string follows it: then there is no more."""
        held = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self._held = ""
            return held[: min(found)[1]], True
        begin = len(held) - max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[begin:]
        return held[:begin], False

    def rest(self) -> str:
        """What was held back, where the text has ended without a stop."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many of a text's last characters may begin a stop string."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
