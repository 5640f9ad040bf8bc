"""The edge's round loop: order the clusters to tune, average what comes back, evaluate, and agree with the cloud.

A round is a pure function of the tunables it begins with, the data and the seed, and its outcome is committed to disk
before anybody hears of it. So an edge that was killed goes on from its last round, and a cluster that was lost, or
that sent what is no number, is simply not in the average.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from ecogen.config import Aggregation, Tuning
from ecogen.errors import AggregationError, NodeLostError, RunError, TransportError
from ecogen.models.checkpoint import load_metadata, load_tensors, save_tensors
from ecogen.models.tunables import Tunables, tunables_of
from ecogen.placement import Placement, Segment, neighbours_of, segments_held
from ecogen.records import EventRecord, Record, RoundRecord, Usage, from_line, to_line
from ecogen.runtime.membership import Members
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message, Transport
from ecogen.transport.codec import Packed
from ecogen.tuning.aggregate import Update, check_update
from ecogen.tuning.discretion import conceal
from ecogen.tuning.labels import without_heads
from ecogen.tuning.messages import SYNC, TUNE, AttemptKey, SyncOrder, TuneOrder, TuneResult
from ecogen.tuning.privacy import ClusterPrivacy, draw_by_seed, draw_secretly
from ecogen.tuning.strategies import strategy_of

logger = logging.getLogger(__name__)

Evaluate = Callable[[Mapping[str, Tensor]], float | None]

_MEMORY = "memory of the strategy: "
_MAX_TRIES = 10  # of one round without any cluster's outcome; a lost device needs one or two


@dataclass(frozen=True)
class EdgeState:
    """What an edge knows between rounds.

    Attributes:
        next_round: the round to do next.
        unsynced: examples behind the tunables where the cloud has not averaged them yet; None where nothing is due.
        record: of the round that was committed last, so that it is published even if the edge dies before.
        memory: what the strategy of aggregation keeps from round to round.
    """

    tunables: Mapping[str, Tensor]
    next_round: int = 0
    unsynced: int | None = None
    record: RoundRecord | None = None
    memory: Mapping[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it atomically."""
        values = {"next_round": self.next_round, "unsynced": self.unsynced}
        record = to_line(self.record).decode() if self.record else ""
        tensors = {**self.tunables, **{_MEMORY + name: tensor for name, tensor in self.memory.items()}}
        save_tensors(path, tensors, {"state": json.dumps(values), "record": record})

    @classmethod
    def load(cls, path: Path) -> EdgeState:
        """The state that `save` wrote."""
        metadata = load_metadata(path)
        record = from_line(metadata["record"]) if metadata["record"] else None
        assert record is None or isinstance(record, RoundRecord)
        tensors = load_tensors(path)
        memory = {name.removeprefix(_MEMORY): tensors.pop(name) for name in [*tensors] if name.startswith(_MEMORY)}
        return cls(tensors, record=record, memory=memory, **json.loads(metadata["state"]))


@dataclass(frozen=True)
class Outcome:
    """What one attempt of one cluster gave."""

    update: Update
    loss: float | None
    usages: tuple[Usage, ...]


class EdgeRounds:
    """One edge's tuning role.

    Args:
        placements: of each cluster at this edge, by its id.
        members: the devices of all its clusters.
        attempt: a number larger than any that an earlier life of this edge used.
        evaluate: accuracy of tunables, run on the compute thread.
        aggregation: how the clusters' updates become one.
        seed: draws who takes part in a round, where not all do.
        privacy: what protects the clusters, where something does.
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
        seed: int = 0,
        privacy: ClusterPrivacy | None = None,
        keeps_head: bool = False,
    ) -> None:
        self.state = state
        self._strategy, self._aggregation = strategy_of(aggregation), aggregation
        self._path, self._tuning, self._placements, self._members = path, tuning, placements, members
        self._transport, self._worker, self._cloud_id = transport, worker, cloud_id
        self._evaluate, self._publish, self._attempt = evaluate, publish, attempt
        self._num_owners, self._seed, self._privacy, self._keeps_head = num_owners, seed, privacy, keeps_head
        self._failed: set[str] = set()
        self._parts: dict[tuple[Segment, ...], Packed] = {}  # of the tunables now, by who holds them
        self._last_problem = ""

    async def run(self) -> None:
        """All rounds that are left."""
        await self._form_all()
        if self.state.record:
            self._publish(self.state.record)
        await self._agree()
        while self.state.next_round < self._tuning.rounds:
            await self._round(self.state.next_round)

    async def _round(self, round_index: int) -> None:
        began_s = time.perf_counter()
        chosen, outcomes = await self._tune_clusters(round_index)
        updates = [outcome.update for outcome in outcomes]
        tunables, memory, accuracy = await self._worker.compute(self._average, updates)
        record = self._record(round_index, chosen, outcomes, accuracy, time.perf_counter() - began_s)
        weight = record.num_examples
        if self._privacy is not None:  # how many examples the clusters have is theirs to know
            weight = self._privacy.num_clusters
            record = await self._worker.compute(self._conceal, record)
        unsynced = weight if self._is_sync_due(round_index) else None
        await self._commit(EdgeState(tunables, round_index + 1, unsynced, record, memory))
        self._publish(record)
        await self._agree()

    def _average(self, updates: Sequence[Update]) -> tuple[Tunables, Tunables, float | None]:
        """On the compute thread: what the strategy makes of the updates and keeps, and the accuracy."""
        ordered = sorted(updates, key=lambda update: update.sender_id)
        if self._privacy is not None:
            ordered = [self._privacy.update(self.state.tunables, ordered)]
        if not ordered:
            return dict(self.state.tunables), dict(self.state.memory), self._evaluate(self.state.tunables)
        tunables, memory = self._strategy(self.state.tunables, ordered, self.state.memory, self._aggregation)
        return tunables, memory, self._evaluate(tunables)

    def _conceal(self, record: RoundRecord) -> RoundRecord:
        assert self._privacy is not None
        routes = [placement.node_ids for placement in self._placements.values()]
        return conceal(record, routes, self._privacy.epsilon(record.round_index + 1))

    # Clusters.

    async def _tune_clusters(self, round_index: int) -> tuple[list[str], list[Outcome]]:
        """The clusters that were to take part, and the outcomes of those that finished; tries again while none did.

        A private run does not: that a round had no outcome would make the draw for the next try another one.

        Raises:
            RunError: if no cluster comes back in time, or every try fails.
        """
        for _ in range(_MAX_TRIES):
            formed = self.formed()
            self._announce_formed(formed, round_index)
            self._attempt += 1
            key = AttemptKey(round_index, self._attempt)
            chosen = self._draw(round_index)
            present = [cluster for cluster in chosen if cluster in formed]
            attempts = await asyncio.gather(*(self._attempt_cluster(cluster, key) for cluster in present))
            outcomes = [outcome for outcome in attempts if outcome is not None]
            is_done = formed if self._privacy is not None else not chosen
            if outcomes or is_done:
                return chosen, outcomes
            awaited = set(self._placements if self._privacy is not None else chosen)
            if not await self._members.wait_for(
                lambda awaited=awaited: not awaited.isdisjoint(self.formed()),  # type: ignore[misc]
                self._tuning.rejoin_timeout_s,
            ):
                raise self._give_up(round_index, f"none came back within {self._tuning.rejoin_timeout_s:g} s")
        raise self._give_up(round_index, f"{_MAX_TRIES} tries failed, the last one since {self._last_problem}")

    def _draw(self, round_index: int) -> list[str]:
        """Who takes part in a round."""
        clusters, rate = list(self._placements), self._tuning.participation
        if rate == 1:
            return clusters
        if self._privacy is not None:
            return draw_secretly(clusters, rate)
        return draw_by_seed(clusters, rate, [self._seed, round_index, zlib.crc32(self._node_id.encode())])

    def _give_up(self, round_index: int, reason: str) -> RunError:
        return RunError(
            f"{self._node_id}: no cluster finished round {round_index + 1}: {reason}; "
            "see the devices' logs, bring them back, then --resume"
        )

    async def _attempt_cluster(self, cluster_id: str, key: AttemptKey) -> Outcome | None:
        """One attempt, or None if a device was lost or sent what cannot be put together: that is a normal event."""
        placement = self._placements[cluster_id]
        try:
            async with asyncio.timeout(self._tuning.round_timeout_s), asyncio.TaskGroup() as group:
                orders = [group.create_task(self._order(node_id, placement, key)) for node_id in placement.node_ids]
        except TimeoutError:
            await self._lose(cluster_id, key, [TimeoutError(f"not done in {self._tuning.round_timeout_s:g} s")])
            return None
        except ExceptionGroup as problems:
            await self._lose(cluster_id, key, transport_errors(problems))
            return None
        outcome = _outcome(cluster_id, [order.result() for order in orders])
        try:
            await self._worker.compute(check_update, outcome.update, self.state.tunables)
        except AggregationError as problem:
            await self._lose(cluster_id, key, [problem])
            return None
        return outcome

    async def _order(self, node_id: str, placement: Placement, key: AttemptKey) -> Message:
        held = tuple(segments_held(placement, self._num_owners, node_id))
        if held not in self._parts:
            self._parts[held] = Packed(tunables_of(self.state.tunables, held))
        order = TuneOrder(key, self._members.locate(neighbours_of(placement, self._num_owners, node_id)))
        message = Message.of(TUNE, order, kind="tunables", tensors=self._parts[held])
        return await self._transport.call(node_id, message)

    async def _lose(self, cluster_id: str, key: AttemptKey, problems: Sequence[BaseException]) -> None:
        detail = "; ".join(sorted({str(problem) or type(problem).__name__ for problem in problems}))
        logger.warning("round %d: cluster %s failed: %s", key.round_index + 1, cluster_id, detail)
        for problem in problems:
            if isinstance(problem, NodeLostError):
                await self._members.lose(problem.node_id, str(problem))
        self._last_problem = detail
        if self._privacy is not None:  # that it took part is not to be told
            return
        self._failed.add(cluster_id)
        self._publish(EventRecord("cluster_failed", cluster_id, key.round_index, detail, time.time()))

    def _announce_formed(self, formed: Sequence[str], round_index: int) -> None:
        """Say which clusters are back that had failed."""
        for cluster_id in sorted(self._failed.intersection(formed)):
            self._publish(EventRecord("cluster_formed", cluster_id, round_index, "formed again", time.time()))
        self._failed.difference_update(formed)

    def formed(self) -> list[str]:
        """The clusters whose devices are all here and ready."""
        ready = set(self._members.ready_ids)
        return [cluster for cluster, placement in self._placements.items() if ready.issuperset(placement.node_ids)]

    async def _form_all(self) -> None:
        """Wait for all clusters; begin with fewer if some do not come in time."""
        await self._members.wait_for(lambda: len(self.formed()) == len(self._placements), self._tuning.rejoin_timeout_s)

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
        self._parts.clear()

    def _record(
        self,
        round_index: int,
        chosen: Sequence[str],
        outcomes: Sequence[Outcome],
        accuracy: float | None,
        wall_s: float,
    ) -> RoundRecord:
        members = tuple(outcome.update.sender_id for outcome in outcomes)
        losses = [outcome.loss for outcome in outcomes if outcome.loss is not None]
        usages = tuple(usage for outcome in outcomes for usage in outcome.usages)
        return RoundRecord(
            self._node_id,
            round_index,
            accuracy,
            sum(losses) / len(losses) if losses else None,
            sum(outcome.update.num_examples for outcome in outcomes),
            members,
            tuple(cluster for cluster in chosen if cluster not in members),
            wall_s,
            (*usages, self._worker.usage("tuning")),
            time.time(),
        )

    @property
    def _node_id(self) -> str:
        return self._transport.peer.node_id


def _outcome(cluster_id: str, replies: Sequence[Message]) -> Outcome:
    """Put the answers of a cluster's devices together."""
    results = [reply.read(TuneResult) for reply in replies]
    tunables: Tunables = {name: tensor for reply in replies for name, tensor in reply.tensors.items()}
    update = Update(cluster_id, tunables, sum(result.num_examples for result in results))
    loss = next((result.loss for result in results if result.loss is not None), None)
    return Outcome(update, loss, tuple(result.usage for result in results))


def transport_errors(problems: ExceptionGroup[Exception]) -> Sequence[Exception]:
    """The errors of a group if all are the transport's; any other is raised, since it is no normal event."""
    lost, others = problems.split(TransportError)
    if others is not None:
        raise others.exceptions[0] from problems
    return lost.exceptions if lost else ()
