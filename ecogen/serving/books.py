"""What an edge has served since its books were written last: requests and tokens, until they become a record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ecogen.records import ServedRecord, Usage
from ecogen.serving.tally import Tally

_REST_S = 3600.0
"""Where nobody asks anything, a record is written all the same after so long."""


@dataclass(slots=True)
class _Counts:
    """Of requests that have ended."""

    num_requests: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    completion_tokens: int = 0
    inference_s: float = 0.0
    share_j: float = 0.0


class Books:
    """One edge's.

    Args:
        every_s: for so long what is served is one record.
    """

    def __init__(self, edge_id: str, every_s: float) -> None:
        self._edge_id, self._every_s = edge_id, every_s
        self._counts, self._began_s = _Counts(), time.monotonic()

    def count(self, tally: Tally, energy_j: float) -> None:
        """A request has ended."""
        counts = self._counts
        counts.num_requests += 1
        counts.prompt_tokens += tally.num_prompt
        counts.reused_tokens += tally.num_reused
        counts.completion_tokens += tally.num_tokens
        counts.inference_s += time.perf_counter() - tally.began_s
        counts.share_j += energy_j

    @property
    def has_news(self) -> bool:
        """Whether a request has ended since."""
        return self._counts.num_requests > 0

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
        counts, self._counts = self._counts, _Counts()
        now_s = time.monotonic()
        wall_s, self._began_s = now_s - self._began_s, now_s
        return ServedRecord(
            self._edge_id,
            counts.num_requests,
            counts.prompt_tokens,
            counts.reused_tokens,
            counts.completion_tokens,
            counts.inference_s,
            counts.share_j,
            wall_s,
            tuple(usages),
            time.time(),
        )
