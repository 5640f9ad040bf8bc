"""A worker: one node's compute thread and its meter. The event loop never computes; what is heavy comes here."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from ecogen.metering.meter import Meter
from ecogen.records import Phase, Usage
from ecogen.transport.base import TrafficCounter

P = ParamSpec("P")
R = TypeVar("R")


class ComputationGivenUpError(Exception):
    """Nobody waits for this computation any more."""


class Worker:
    """Runs one computation at a time, and meters it.

    Args:
        counter: what this node sent.
        executor: threads to compute on, where nodes share a process: they share its executor too, one thread a
            core, and each still computes one thing at a time. None makes a thread of its own.

    Attributes:
        slowness: so many times as long as it takes is each computation made to take: 1, but for a fault on purpose.
    """

    def __init__(self, meter: Meter, counter: TrafficCounter, executor: Executor | None = None) -> None:
        self.meter = meter
        self._counter = counter
        self._owned = None if executor else ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._executor = executor or self._owned
        self.slowness = 1.0
        self._turn = asyncio.Lock()
        self._given_up = False

    async def compute(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's result, computed on the compute thread when its turn comes."""
        async with self._turn:
            loop = asyncio.get_running_loop()
            work = loop.run_in_executor(self._executor, lambda: self._timed(function, *args, **kwargs))
            try:
                result, took_s = await asyncio.shield(work)
                if self.slowness > 1:  # the turn is kept, but not the thread, which may be other nodes' as well
                    await asyncio.sleep((self.slowness - 1) * took_s)
                return result
            except asyncio.CancelledError:
                self._given_up = True
                await _ended(work)  # the thread cannot be stopped: keep the turn until it is done
                self._given_up = False
                raise

    def _timed(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> tuple[R, float]:
        """On the compute thread: the function's result, and the seconds that it took."""
        began_s = time.perf_counter()
        return self.meter.run(function, *args, **kwargs), time.perf_counter() - began_s

    def check_given_up(self) -> None:
        """For a long computation to call now and then, on its thread: ends it if nobody waits for it any more.

        Raises:
            ComputationGivenUpError: then.
        """
        if self._given_up:
            raise ComputationGivenUpError

    def usage(self, phase: Phase, held_bytes: int = 0) -> Usage:
        """This node's usage since the last call.

        Args:
            held_bytes: memory that the node holds, for nodes that share a process; one that has its own says its peak.
        """
        memory_bytes = None if self._owned else held_bytes
        return self.meter.take(phase, self._counter.take(), memory_bytes)

    def close(self) -> None:
        """Let the compute thread end."""
        if self._owned:
            self._owned.shutdown(wait=False, cancel_futures=True)


async def _ended(work: asyncio.Future[Any]) -> None:
    """Wait until it has, however often this is cancelled: a node that is cut off cancels what it asked for twice."""
    while not work.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([work])
    if not work.cancelled():
        work.exception()  # seen, so that asyncio does not warn
