"""What edges have sent for cycles of the schedule that are not closed: first what they offer, then what they say of it.

All of a cycle's offers are in once every edge that is here has sent its own; who offered is then waited for once more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from torch import Tensor

from ecogen.relay.teacher import Lesson
from ecogen.runtime.membership import Members
from ecogen.tuning.gathering import Gathering
from ecogen.tuning.sync import note_seen


class OpenCycles:
    """Gathers offers and verdicts.

    Args:
        patience_s: how long a lost edge is waited for.
    """

    def __init__(self, members: Members, patience_s: float) -> None:
        self._offers: Gathering[Lesson] = Gathering(members, patience_s)
        self._verdicts: Gathering[Tensor] = Gathering(members, patience_s)
        self._all: dict[int, asyncio.Task[dict[str, Lesson]]] = {}
        self._closed = -1

    async def offer(self, cycle: int, edge_id: str, offered: Lesson) -> Mapping[str, Lesson]:
        """Those of all edges, of which this is one unless it comes too late; none of a cycle that is closed."""
        await self._offers.skip(edge_id, cycle)
        await self._verdicts.skip(edge_id, cycle)
        if cycle <= self._closed:
            return {}
        if self.offers(cycle) is None:
            await self._offers.put(cycle, edge_id, offered)
        if cycle not in self._all:
            task = self._all[cycle] = asyncio.create_task(self._offers.take(cycle))
            task.add_done_callback(note_seen)
        return await asyncio.shield(self._all[cycle])

    def offers(self, cycle: int) -> Mapping[str, Lesson] | None:
        """Those of a cycle; None before they are all in."""
        task = self._all.get(cycle)
        return task.result() if task is not None and task.done() else None

    async def judge(self, cycle: int, edge_id: str, verdict: Tensor) -> None:
        """An edge says what it thinks of others' offers."""
        await self._verdicts.put(cycle, edge_id, verdict)

    async def verdicts(self, cycle: int) -> Mapping[str, Tensor]:
        """Those of all who offered, but for those that were lost or have gone on."""
        return await self._verdicts.take(cycle, of=self.offers(cycle))

    def close(self, cycle: int) -> None:
        """Forget a cycle, and those before it."""
        self._closed = max(self._closed, cycle)
        self._all = {later: task for later, task in self._all.items() if later > cycle}
        self._offers.drop(cycle)
        self._verdicts.drop(cycle)

    async def set_finished(self, edge_ids: set[str]) -> None:
        """These edges come no more."""
        await self._offers.set_finished(edge_ids)
        await self._verdicts.set_finished(edge_ids)
