"""Clusters that do not wait for each other: the edge goes on with the first K updates that come (FedBuff).

Nguyen et al. 2022, Algorithm 1: https://arxiv.org/abs/2106.06639. Every cluster gets a new order as soon as it has
answered. A round is one update of the edge: K differences, each between what a cluster answered and what its attempt
began with, scaled by 1 / sqrt(1 + staleness). They weigh as their examples do, as everywhere here; the paper's weigh
alike.

What a cluster draws at random is keyed by how many of its attempts were counted before, so its k-th attempt is a pure
function of the tunables that it begins with. Which those are, the order of arrival decides: a run as a whole is not
repeated bit by bit, nor is a resumed one what it would have been. Updates that an edge had not yet committed when it
was killed are lost, as those still under way are: their clusters do the same attempts again.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import Tensor

from ecogen.runtime.worker import Worker
from ecogen.tuning.attempts import MAX_TRIES, Attempts, Outcome
from ecogen.tuning.edge_state import EdgeState

logger = logging.getLogger(__name__)

_PAUSE_S = 2.0  # at most, after a failed attempt; a synchronous edge would wait for the next round


@dataclass(frozen=True)
class _Arrival:
    """An outcome, and the state that its attempt began with."""

    outcome: Outcome
    begun: EdgeState


class Buffer:
    """Keeps every cluster at work, and gives its outcomes on, K at a time, in the order in which they came.

    Args:
        size: K, the updates of a round.
        state: the edge's state now.
        patience_s: how long to wait where no cluster is formed.
    """

    def __init__(
        self, attempts: Attempts, size: int, worker: Worker, state: Callable[[], EdgeState], patience_s: float
    ) -> None:
        self.at_work: set[str] = set()  # clusters of which an update may come
        self._attempts, self._size, self._worker = attempts, size, worker
        self._state, self._patience_s = state, patience_s
        self._arrivals: asyncio.Queue[_Arrival | BaseException] = asyncio.Queue()
        self._num_arrived = 0
        self._num_failed = 0  # since the last arrival
        self._num_begun = 0  # rounds of this life
        self._round_begins = asyncio.Condition()
        self._is_over = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> None:
        """Put all clusters to work."""
        self._tasks = [asyncio.create_task(self._keep_at_work(cluster)) for cluster in self._attempts.cluster_ids]
        for task in self._tasks:
            task.add_done_callback(self._pass_on_failure)

    async def __aexit__(self, *_: object) -> None:
        """Break off what is under way."""
        self._is_over = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def take(self) -> list[Outcome]:
        """The next K outcomes, their updates moved to the tunables of now and scaled by their staleness.

        Raises:
            RunError: if no cluster comes back in time, or every try fails.
        """
        async with self._round_begins:
            self._num_begun += 1
            self._round_begins.notify_all()
        arrivals = [await self._next() for _ in range(self._size)]
        state = self._state()
        logger.info("round %d: %s", state.next_round + 1, ", ".join(_in_words(a, state) for a in arrivals))
        return [await self._worker.compute(_moved, arrival, state) for arrival in arrivals]

    async def _next(self) -> _Arrival:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._patience_s):
                    arrival = await self._arrivals.get()
                if isinstance(arrival, BaseException):
                    raise arrival
                return arrival
            if not self._attempts.formed():
                raise self._attempts.nobody_came(self._state().next_round)

    # Clusters.

    async def _keep_at_work(self, cluster_id: str) -> None:
        """One attempt after the other, until the run ends."""
        num_counted = self._state().times_counted(cluster_id)
        while not self._is_over:  # a task group forgets a cancellation where its tasks fail at the same time
            await self._attempts.wait_for(lambda: self._attempts.is_formed(cluster_id), None)
            state = self._state()
            self._attempts.announce_formed([cluster_id], state.next_round)
            self.at_work.add(cluster_id)
            key = self._attempts.next_key(state.next_round)
            outcome = await self._attempts.attempt(cluster_id, key, state, num_counted)
            if outcome is None:
                await self._pause(cluster_id)
                continue
            num_counted += 1
            await self._arrive(_Arrival(outcome, state))

    async def _arrive(self, arrival: _Arrival) -> None:
        """Hand an outcome over; whose outcome fills the buffer waits until its round is done, or it would be stale."""
        self._num_failed = 0
        self._num_arrived += 1
        self._arrivals.put_nowait(arrival)
        num_full, rest = divmod(self._num_arrived, self._size)
        if not rest:
            await self._wait_for_round(num_full + 1)

    async def _pause(self, cluster_id: str) -> None:
        """After a failed attempt: until the next round begins, or a moment where none does.

        Raises:
            RunError: if nothing has succeeded for too long.
        """
        self.at_work.discard(cluster_id)
        self._num_failed += 1
        if self._is_over:
            return
        if not self.at_work and self._num_failed >= MAX_TRIES * len(self._attempts.cluster_ids):
            raise self._attempts.all_failed(self._state().next_round, self._num_failed)
        with suppress(TimeoutError):
            async with asyncio.timeout(_PAUSE_S):
                await self._wait_for_round(self._num_begun + 1)

    async def _wait_for_round(self, number: int) -> None:
        """Until that many rounds of this life have begun."""
        async with self._round_begins:
            await self._round_begins.wait_for(lambda: self._num_begun >= number)

    def _pass_on_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (problem := task.exception()):
            self._arrivals.put_nowait(problem)


def move(
    answered: Mapping[str, Tensor], begun: Mapping[str, Tensor], now: Mapping[str, Tensor], staleness: int
) -> dict[str, Tensor]:
    """The tunables of now, and what an attempt changed: w_now + (w_answered - w_begun) / sqrt(1 + staleness).

    In double precision, so that a fresh update stays as it was answered. The scale is the one of Nguyen et al. 2022.
    """
    scale = 1 / math.sqrt(1 + staleness)
    moved = {n: now[n].double() + scale * (tensor.double() - begun[n].double()) for n, tensor in answered.items()}
    return {name: tensor.to(answered[name].dtype) for name, tensor in moved.items()}


def _moved(arrival: _Arrival, state: EdgeState) -> Outcome:
    update = arrival.outcome.update
    tunables = move(update.tunables, arrival.begun.tunables, state.tunables, _staleness(arrival, state))
    return replace(arrival.outcome, update=replace(update, tunables=tunables))


def _staleness(arrival: _Arrival, state: EdgeState) -> int:
    """How many times the edge has updated its tunables since the attempt began."""
    return state.next_round - arrival.begun.next_round


def _in_words(arrival: _Arrival, state: EdgeState) -> str:
    return f"{arrival.outcome.update.sender_id} (staleness {_staleness(arrival, state)})"
