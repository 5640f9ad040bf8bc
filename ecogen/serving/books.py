"""What an edge has served since its books were written last: requests and tokens, until they become a record."""

from __future__ import annotations

import time
from collections.abc import Sequence

from msgspec.structs import asdict

from ecogen.records import ServedCounts, ServedRecord, Usage
from ecogen.serving.tally import Tally

_REST_S = 3600.0
"""Where nobody asks anything, a record is written all the same after so long."""


class Books:
    """One edge's.

    Args:
        every_s: for so long what is served is one record.
    """

    def __init__(self, edge_id: str, every_s: float) -> None:
        self._edge_id, self._every_s = edge_id, every_s
        self._counts, self._began_s = ServedCounts.zero(), time.monotonic()

    def count(self, tally: Tally, energy_j: float) -> None:
        """A request has ended."""
        self._counts += _counts_of(tally, energy_j)

    @property
    def has_news(self) -> bool:
        """Whether a request has ended since."""
        return self._counts != ServedCounts.zero()

    @property
    def is_due(self) -> bool:
        """Whether it is time for a record."""
        age_s = time.monotonic() - self._began_s
        return age_s >= (self._every_s if self.has_news else max(self._every_s, _REST_S))

    def close(self, usages: Sequence[Usage]) -> ServedRecord:
        """The record of what was counted since the last one.

        Args:
            usages: of the edge and its devices, since theirs were taken last.
        """
        counts, self._counts = self._counts, ServedCounts.zero()
        now_s = time.monotonic()
        wall_s, self._began_s = now_s - self._began_s, now_s
        return ServedRecord(
            **asdict(counts), node_id=self._edge_id, wall_s=wall_s, usages=tuple(usages), time_s=time.time()
        )


def _counts_of(tally: Tally, energy_j: float) -> ServedCounts:
    """A request that another edge has begun is there, and so is its prompt; here are the tokens that it got here."""
    asked = (0, 0, 0) if tally.goes_on else (1, tally.num_prompt, tally.num_reused)
    return ServedCounts(*asked, tally.num_tokens, time.perf_counter() - tally.began_s, energy_j)
