"""The edge's round loop: order the clusters to tune, average what comes back, evaluate, and agree with the cloud.

A round is a pure function of the tunables it begins with, the data and the seed, and its outcome is committed to disk
before anybody hears of it. So an edge that was killed goes on from its last round, and a cluster that was lost, or
that sent what is no number, is simply not in the average. With `aggregation.buffer` clusters do not wait for each
other, and what a round's updates are is told in `tuning/buffer.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ecogen.config import Aggregation, Tuning
from ecogen.errors import NodeLostError
from ecogen.models.tunables import Tunables
from ecogen.placement import Placement
from ecogen.records import EventRecord, Record, RoundRecord
from ecogen.runtime.membership import Members
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message, Transport
from ecogen.tuning.aggregate import Update
from ecogen.tuning.attempts import MAX_TRIES, Attempts, Outcome
from ecogen.tuning.buffer import Buffer
from ecogen.tuning.edge_state import EdgeState
from ecogen.tuning.messages import SYNC, SyncOrder
from ecogen.tuning.strategies import strategy_of

Evaluate = Callable[[Mapping[str, Tensor]], float | None]


class EdgeRounds:
    """One edge's tuning role.

    Args:
        placements: of each cluster at this edge, by its id.
        members: the devices of all its clusters.
        attempt: a number larger than any that an earlier life of this edge used.
        evaluate: accuracy of tunables, run on the compute thread.
        aggregation: how the clusters' updates become one.
        publish: takes each record.
    """

    def __init__(
        self,
        state: EdgeState,
        path: Path,
        tuning: Tuning,
        placements: Mapping[str, Placement],
        members: Members,
        transport: Transport,
        worker: Worker,
        cloud_id: str,
        evaluate: Evaluate,
        publish: Callable[[Record], None],
        *,
        attempt: int,
        num_owners: int = 1,
        aggregation: Aggregation,
    ) -> None:
        self.state = state
        self._strategy, self._aggregation = strategy_of(aggregation), aggregation
        self._path, self._tuning, self._placements = path, tuning, placements
        self._transport, self._worker, self._cloud_id = transport, worker, cloud_id
        self._evaluate, self._publish = evaluate, publish
        self._attempts = Attempts(
            tuning, placements, members, transport, worker, publish, last=attempt, num_owners=num_owners
        )
        self._buffer: Buffer | None = None
        if aggregation.buffer:
            patience_s = tuning.rejoin_timeout_s
            self._buffer = Buffer(self._attempts, aggregation.buffer, worker, lambda: self.state, patience_s)

    async def run(self) -> None:
        """All rounds that are left; begins with fewer clusters if some do not come in time."""
        patience_s = self._tuning.rejoin_timeout_s
        await self._attempts.wait_for(lambda: len(self.formed()) == len(self._placements), patience_s)
        if self.state.record:
            self._publish(self.state.record)
        await self._agree()
        async with self._buffer or nullcontext():
            while self.state.next_round < self._tuning.rounds:
                await self._round(self.state.next_round)

    async def _round(self, round_index: int) -> None:
        began_s = time.perf_counter()
        outcomes = await (self._buffer.take() if self._buffer else self._tune_clusters(round_index))
        updates = [outcome.update for outcome in outcomes]
        tunables, memory, accuracy = await self._worker.compute(self._average, updates)
        record = self._record(round_index, outcomes, accuracy, time.perf_counter() - began_s)
        unsynced = record.num_examples if self._is_sync_due(round_index) else None
        counted = self.state.count((outcome.update.sender_id, outcome.key.attempt) for outcome in outcomes)
        await self._commit(EdgeState(tunables, round_index + 1, unsynced, record, memory, counted))
        self._publish(record)
        await self._agree()

    def _average(self, updates: Sequence[Update]) -> tuple[Tunables, Tunables, float | None]:
        """On the compute thread: what the strategy makes of the updates and keeps, and the accuracy."""
        ordered = sorted(updates, key=lambda update: update.sender_id)
        tunables, memory = self._strategy(self.state.tunables, ordered, self.state.memory, self._aggregation)
        return tunables, memory, self._evaluate(tunables)

    # Clusters.

    async def _tune_clusters(self, round_index: int) -> list[Outcome]:
        """The outcomes of the clusters that finished; tries again while there is none.

        Raises:
            RunError: if no cluster comes back in time, or every try fails.
        """
        for _ in range(MAX_TRIES):
            formed = self.formed()
            self._attempts.announce_formed(formed, round_index)
            key = self._attempts.next_key(round_index)
            tried = (self._attempts.attempt(cluster_id, key, self.state, round_index) for cluster_id in formed)
            outcomes = [outcome for outcome in await asyncio.gather(*tried) if outcome is not None]
            if outcomes:
                return outcomes
            if not await self._attempts.wait_for(lambda: bool(self.formed()), self._tuning.rejoin_timeout_s):
                raise self._attempts.nobody_came(round_index)
        raise self._attempts.all_failed(round_index, MAX_TRIES)

    def formed(self) -> list[str]:
        """The clusters whose devices are all here and ready."""
        return self._attempts.formed()

    # The cloud.

    def _is_sync_due(self, round_index: int) -> bool:
        return self._tuning.cloud_every > 0 and (round_index + 1) % self._tuning.cloud_every == 0

    async def _agree(self) -> None:
        """Have the cloud average this round's tunables with the other edges', where that is due."""
        if self.state.unsynced is None:
            return
        order = SyncOrder(self.state.next_round - 1, self.state.unsynced)
        message = Message.of(SYNC, order, kind="tunables", tensors=self.state.tunables)
        reply = await self._call_cloud(message)
        agreed = self.state.tunables if reply is None else reply.tensors
        await self._commit(replace(self.state, tunables=agreed, unsynced=None))

    async def _call_cloud(self, message: Message) -> Message | None:
        """The cloud's answer; None where it stays away for too long, and the edge goes on alone."""
        deadline_s = time.monotonic() + self._tuning.rejoin_timeout_s
        while True:
            try:
                return await self._transport.call(self._cloud_id, message)
            except NodeLostError as problem:
                if time.monotonic() > deadline_s:
                    self._publish(EventRecord("lost", self._cloud_id, None, f"going on alone: {problem}", time.time()))
                    return None
                await asyncio.sleep(0.5)

    # The books.

    async def _commit(self, state: EdgeState) -> None:
        """Write a state, then go on with it."""
        await self._worker.compute(state.save, self._path)
        self.state = state

    def _record(
        self, round_index: int, outcomes: Sequence[Outcome], accuracy: float | None, wall_s: float
    ) -> RoundRecord:
        examples = {outcome.update.sender_id: outcome.update.num_examples for outcome in outcomes}
        at_work = self._buffer.at_work if self._buffer else examples.keys()
        losses = [outcome.loss for outcome in outcomes if outcome.loss is not None]
        usages = tuple(usage for outcome in outcomes for usage in outcome.usages)
        return RoundRecord(
            self._node_id,
            round_index,
            accuracy,
            sum(losses) / len(losses) if losses else None,
            sum(examples.values()),
            tuple(examples),
            tuple(cluster for cluster in self._placements if cluster not in at_work | examples.keys()),
            wall_s,
            (*usages, self._worker.usage("tuning")),
            time.time(),
        )

    @property
    def _node_id(self) -> str:
        return self._transport.peer.node_id
