"""The edge's round loop: order the clusters to tune, average what comes back, evaluate, and agree with the cloud.

A round is a pure function of the tunables it begins with, the data and the seed, and its outcome is committed to disk
before anybody hears of it. So an edge that was killed goes on from its last round, and a cluster that was lost, or
that sent what is no number, is simply not in the average. With `aggregation.buffer` clusters do not wait for each
other, and what a round's updates are is told in `tuning/buffer.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import msgspec
from torch import Tensor

from ecogen.config import Aggregation, Tuning, Wire
from ecogen.errors import NodeLostError
from ecogen.placement import Placement
from ecogen.records import EventRecord, Record, RoundRecord, Score
from ecogen.runtime.membership import Members
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message, Transport
from ecogen.tuning.aggregate import Update
from ecogen.tuning.attempts import MAX_TRIES, Attempts, Outcome
from ecogen.tuning.buffer import Buffer
from ecogen.tuning.discretion import conceal
from ecogen.tuning.edge_state import EdgeState
from ecogen.tuning.labels import without_heads
from ecogen.tuning.messages import SYNC, SyncOrder
from ecogen.tuning.privacy import ClusterPrivacy, ExamplePrivacy, draw_by_seed, draw_secretly
from ecogen.tuning.ranks import LoraRanks, Together
from ecogen.tuning.strategies import strategy_of

logger = logging.getLogger(__name__)

Evaluate = Callable[[Mapping[str, Tensor]], Score]


class Lessons(Protocol):
    """Exchanges what cloud and edge know, other than by averaging."""

    def is_due(self, round_index: int) -> bool:
        """Whether that is to be after a round, by schedule."""

    async def drift(self, round_index: int, tunables: Mapping[str, Tensor]) -> float | None:
        """Whether it is to be out of turn, since the domain has drifted: how probable its examples would be if not."""

    async def exchange(self, state: EdgeState, ask: Callable[[Message], Awaitable[Message | None]]) -> EdgeState:
        """The state after it.

        Args:
            ask: the cloud; gives None where it stays away.
        """


class EdgeRounds:
    """One edge's tuning role.

    Args:
        placements: of each cluster at this edge, by its id.
        members: the devices of all its clusters.
        attempt: a number larger than any that an earlier life of this edge used.
        evaluate: how well tunables do, run on the compute thread.
        aggregation: how the clusters' updates become one.
        ranks: how LoRA's do, where ranks differ or products are averaged.
        seed: draws who takes part in a round, where not all do.
        privacy: what protects the clusters, where something does.
        examples: what protects each example, where something does.
        wire: the types in which tunables travel to and from devices.
        lessons: what is exchanged with the cloud, where something is.
        keeps_head: the cloud averages all but the head, since other edges' heads are for other labels.
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
        ranks: LoraRanks | None = None,
        seed: int = 0,
        privacy: ClusterPrivacy | None = None,
        examples: ExamplePrivacy | None = None,
        wire: Wire | None = None,
        keeps_head: bool = False,
        lessons: Lessons | None = None,
    ) -> None:
        self.state = state
        self._strategy, self._aggregation = strategy_of(aggregation), aggregation
        self._path, self._tuning, self._placements = path, tuning, placements
        self._transport, self._worker, self._cloud_id = transport, worker, cloud_id
        self._evaluate, self._publish = evaluate, publish
        self._ranks, self._seed, self._privacy, self._keeps_head = ranks, seed, privacy, keeps_head
        self._attempts = Attempts(
            tuning,
            placements,
            members,
            transport,
            worker,
            publish,
            last=attempt,
            num_owners=num_owners,
            ranks=ranks,
            wire=wire,
            is_discreet=privacy is not None,
            has_controls=aggregation.strategy == "scaffold",
        )
        self._lessons, self._examples = lessons, examples
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
        if self.state.lesson:
            self._publish(self.state.lesson)
        await self._agree()
        await self._take_lesson()
        async with self._buffer or nullcontext():
            while self.state.next_round < self._tuning.rounds:
                await self._round(self.state.next_round)

    async def _round(self, round_index: int) -> None:
        began_s = time.perf_counter()
        chosen, outcomes = await self._take_outcomes(round_index)
        updates = [outcome.update for outcome in outcomes]
        (tunables, memory, error), score = await self._worker.compute(self._average, updates)
        if error is not None:
            logger.info("round %d: LoRA misses the mean of its products by %.2g of it", round_index + 1, error)
        record = self._record(round_index, chosen, outcomes, score, error, time.perf_counter() - began_s)
        weight = record.num_examples
        if self._privacy is not None:  # how many examples the clusters have is theirs to know
            weight = self._privacy.num_clusters
            record = await self._worker.compute(self._conceal, record)
        sampled = self.state.sampled.union(*(outcome.sampled for outcome in outcomes))
        if self._examples is not None:  # the loss is the examples', and not noised
            spent = await self._worker.compute(self._examples.epsilon, sampled, round_index + 1)
            record = msgspec.structs.replace(record, loss=None, epsilon=spent)
        unsynced = weight if self._is_sync_due(round_index) else None
        counted = self.state.count((outcome.update.sender_id, outcome.key.attempt) for outcome in outcomes)
        after = replace(
            self.state,
            tunables=tunables,
            next_round=round_index + 1,
            unsynced=unsynced,
            record=record,
            memory=memory,
            counted=counted,
            sampled=sampled,
        )
        await self._commit(await self._awaiting_lesson(after))
        self._publish(record)
        await self._agree()
        await self._take_lesson()

    def _average(self, updates: Sequence[Update]) -> tuple[Together, Score]:
        """On the compute thread: what the strategy makes of the updates and keeps, and how well it does."""
        ordered = sorted(updates, key=lambda update: update.sender_id)
        before, memory = self.state.tunables, self.state.memory
        if self._privacy is not None:
            ordered = [self._privacy.update(before, ordered)]
        ordered = [update for update in ordered if update.num_examples]
        if not ordered:
            return Together(dict(before), dict(memory)), self._evaluate(before)
        if self._ranks is None:
            together = Together(*self._strategy(before, ordered, memory, self._aggregation))
        else:
            together = self._ranks.put_together(before, ordered, memory, self._strategy, self._aggregation)
        return together, self._evaluate(together.tunables)

    def _conceal(self, record: RoundRecord) -> RoundRecord:
        assert self._privacy is not None
        routes = [placement.node_ids for placement in self._placements.values()]
        return conceal(record, routes, self._privacy.epsilon(record.round_index + 1))

    # Clusters.

    async def _take_outcomes(self, round_index: int) -> tuple[Sequence[str], list[Outcome]]:
        """The clusters that were to take part in a round, and what it is made of."""
        if self._buffer is None:
            return await self._tune_clusters(round_index)
        return list(self._placements), await self._buffer.take()

    async def _tune_clusters(self, round_index: int) -> tuple[Sequence[str], list[Outcome]]:
        """The clusters that were to take part, and the outcomes of those that finished; tries again while none did.

        A private run does not: that a round had no outcome would make the draw for the next try another one.

        Raises:
            RunError: if no cluster comes back in time, or every try fails.
        """
        for _ in range(MAX_TRIES):
            formed = self.formed()
            self._attempts.announce_formed(formed, round_index)
            key = self._attempts.next_key(round_index)
            chosen = self._draw(round_index)
            present = [cluster_id for cluster_id in chosen if cluster_id in formed]
            tried = (self._attempts.attempt(cluster_id, key, self.state, round_index) for cluster_id in present)
            outcomes = [outcome for outcome in await asyncio.gather(*tried) if outcome is not None]
            is_done = bool(formed) if self._privacy is not None else not chosen
            if outcomes or is_done:
                return chosen, outcomes
            awaited = set(self._placements if self._privacy is not None else chosen)
            if not await self._attempts.wait_for(
                lambda awaited=awaited: not awaited.isdisjoint(self.formed()),  # type: ignore[misc]
                self._tuning.rejoin_timeout_s,
            ):
                raise self._attempts.nobody_came(round_index)
        raise self._attempts.all_failed(round_index, MAX_TRIES)

    def _draw(self, round_index: int) -> list[str]:
        """Who takes part in a round."""
        clusters, rate = list(self._placements), self._tuning.participation
        if rate == 1:
            return clusters
        if self._privacy is not None:
            return draw_secretly(clusters, rate)
        return draw_by_seed(clusters, rate, [self._seed, round_index, zlib.crc32(self._node_id.encode())])

    async def begin_of(self, cluster_id: str) -> Mapping[str, Tensor]:
        """What a cluster would begin with now: the tunables, cut to its LoRA rank."""
        return await self._attempts.begin_of(cluster_id, self.state)

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
        shared = without_heads(self.state.tunables) if self._keeps_head else self.state.tunables
        reply = await self._call_cloud(Message.of(SYNC, order, kind="tunables", tensors=shared))
        agreed = shared if reply is None else reply.tensors
        await self._commit(replace(self.state, tunables={**self.state.tunables, **agreed}, unsynced=None))

    async def _awaiting_lesson(self, state: EdgeState) -> EdgeState:
        """The state after a round, which says whether lessons are to be exchanged, and why."""
        if self._lessons is None:
            return state
        round_index = state.next_round - 1
        if self._lessons.is_due(round_index):
            return replace(state, is_untaught=True, drift=None)
        drift = await self._lessons.drift(round_index, state.tunables)
        return replace(state, is_untaught=drift is not None, drift=drift)

    async def _take_lesson(self) -> None:
        """Exchange what is known with the cloud, where that is due."""
        if self._lessons is None or not self.state.is_untaught:
            return
        await self._commit(await self._lessons.exchange(self.state, self._call_cloud))
        if self.state.lesson:
            self._publish(self.state.lesson)

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
        self,
        round_index: int,
        chosen: Sequence[str],
        outcomes: Sequence[Outcome],
        score: Score,
        lora_error: float | None,
        wall_s: float,
    ) -> RoundRecord:
        examples = {outcome.update.sender_id: outcome.update.num_examples for outcome in outcomes}
        at_work = self._buffer.at_work if self._buffer else set()
        losses = [outcome.loss for outcome in outcomes if outcome.loss is not None]
        confident = [outcome.confident for outcome in outcomes if outcome.confident is not None]
        usages = tuple(usage for outcome in outcomes for usage in outcome.usages)
        return RoundRecord(
            self._node_id,
            round_index,
            score.accuracy,
            sum(losses) / len(losses) if losses else None,
            sum(examples.values()),
            tuple(examples),
            tuple(cluster for cluster in chosen if cluster not in examples.keys() | at_work),
            wall_s,
            (*usages, self._worker.usage("tuning")),
            time.time(),
            lora_error,
            confident=sum(confident) / len(confident) if confident else None,
            perplexity=score.perplexity,
        )

    @property
    def _node_id(self) -> str:
        return self._transport.peer.node_id
