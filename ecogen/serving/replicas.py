"""Which of an edge's clusters serve: as many as the load asks for, and none whose device is being taken away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from ecogen.serving.balance import Balancer
from ecogen.serving.cluster import ServedCluster
from ecogen.serving.generation import GenerationRequest

logger = logging.getLogger(__name__)

_LOOK_S = 0.25


class Replicas:
    """The clusters of one edge.

    Args:
        least: of them serve always; the others when those have no room.
        busy_s: for how long requests have to wait before another serves.
        idle_s: for how long the others have to have room before one of them ends.
    """

    def __init__(self, clusters: Sequence[ServedCluster], least: int, *, busy_s: float, idle_s: float) -> None:
        self._clusters, self._least = list(clusters), least
        self._busy_s, self._idle_s = busy_s, idle_s
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._draining: set[int] = set()
        self._balancer: Balancer[int] = Balancer()

    @property
    def num_serving(self) -> int:
        """Those that serve, or are about to."""
        return len(self._tasks) - len(self._draining)

    def choose(self, request: GenerationRequest, adapter_id: str) -> ServedCluster:
        """Who answers a request: one that takes its adapter, and of these one that holds the model, if there is one."""
        own = [index for index in self._tasks if index not in self._draining] or [0]  # which is about to
        able = [index for index in own if self._clusters[index].takes(adapter_id)] or own
        ready = [index for index in able if self._clusters[index].chain is not None] or able
        loads = {index: self._clusters[index].engine.num_requests for index in ready}
        return self._clusters[self._balancer.choose(loads, request.prompt, adapter_id)]

    async def run(self) -> None:
        """Forever: begin and end replicas as the load asks for it."""
        async with asyncio.TaskGroup() as group:
            for index in range(min(self._least, len(self._clusters))):
                self._begin(index, group)
            busy_since = idle_since = time.monotonic()
            while True:
                await asyncio.sleep(_LOOK_S)
                now_s = time.monotonic()
                busy_since = busy_since if self._is_busy() else now_s
                idle_since = idle_since if self._is_idle() else now_s
                if now_s - busy_since >= self._busy_s and (resting := self._resting()):
                    self._begin(resting[0], group)
                    busy_since = now_s
                elif now_s - idle_since >= self._idle_s:
                    self._draining.add(max(set(self._tasks) - self._draining))
                    idle_since = now_s
                await self._end_drained()

    def _begin(self, index: int, group: asyncio.TaskGroup) -> None:
        self._tasks[index] = group.create_task(self._clusters[index].run())
        logger.info("%s begins to serve", self._clusters[index].cluster_id)

    def _resting(self) -> list[int]:
        """Those that could serve; first those that have not ended yet."""
        self._draining = {index for index in self._draining if index in self._tasks}
        return [index for index in range(len(self._clusters)) if index not in self._tasks]

    def _is_busy(self) -> bool:
        """Whether requests wait although all that serve are at work; not while one still loads the model."""
        serving = self._serving()
        return all(own.chain for own in serving) and any(own.engine.num_waiting for own in serving)

    def _is_idle(self) -> bool:
        """Whether one could end, and what all answer would fit the others."""
        serving = self._serving()
        if len(serving) <= self._least:
            return False
        return sum(cluster.engine.num_requests for cluster in serving) <= sum(own.room for own in serving[:-1])

    def _serving(self) -> list[ServedCluster]:
        return [self._clusters[index] for index in sorted(self._tasks) if index not in self._draining]

    async def _end_drained(self) -> None:
        """Those that answer nothing any more give their memory back."""
        for index in [index for index in self._draining if not self._clusters[index].engine.num_requests]:
            self._tasks[index].cancel()
            await asyncio.gather(self._tasks.pop(index), return_exceptions=True)
            self._draining.discard(index)
            await self._clusters[index].unload()
            logger.info("%s serves no longer", self._clusters[index].cluster_id)
