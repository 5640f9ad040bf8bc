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
from ecogen.tuning.messages import SYNC, TUNE, AttemptKey, SyncOrder, TuneOrder, TuneResult
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
    confident: float | None = None


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
        self._path, self._tuning, self._placements, self._members = path, tuning, placements, members
        self._transport, self._worker, self._cloud_id = transport, worker, cloud_id
        self._evaluate, self._publish, self._attempt = evaluate, publish, attempt
        self._num_owners = num_owners
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
        outcomes = await self._tune_clusters(round_index)
        updates = [outcome.update for outcome in outcomes]
        tunables, memory, accuracy = await self._worker.compute(self._average, updates)
        record = self._record(round_index, outcomes, accuracy, time.perf_counter() - began_s)
        unsynced = record.num_examples if self._is_sync_due(round_index) else None
        await self._commit(EdgeState(tunables, round_index + 1, unsynced, record, memory))
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
        for _ in range(_MAX_TRIES):
            formed = self.formed()
            self._announce_formed(formed, round_index)
            self._attempt += 1
            key = AttemptKey(round_index, self._attempt)
            attempts = await asyncio.gather(*(self._attempt_cluster(cluster, key) for cluster in formed))
            outcomes = [outcome for outcome in attempts if outcome is not None]
            if outcomes:
                return outcomes
            if not await self._members.wait_for(lambda: bool(self.formed()), self._tuning.rejoin_timeout_s):
                raise self._give_up(round_index, f"none came back within {self._tuning.rejoin_timeout_s:g} s")
        raise self._give_up(round_index, f"{_MAX_TRIES} tries failed, the last one since {self._last_problem}")

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
        self._failed.add(cluster_id)
        self._last_problem = detail
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
        self._parts.clear()

    def _record(
        self, round_index: int, outcomes: Sequence[Outcome], accuracy: float | None, wall_s: float
    ) -> RoundRecord:
        members = tuple(outcome.update.sender_id for outcome in outcomes)
        losses = [outcome.loss for outcome in outcomes if outcome.loss is not None]
        confident = [outcome.confident for outcome in outcomes if outcome.confident is not None]
        usages = tuple(usage for outcome in outcomes for usage in outcome.usages)
        return RoundRecord(
            self._node_id,
            round_index,
            accuracy,
            sum(losses) / len(losses) if losses else None,
            sum(outcome.update.num_examples for outcome in outcomes),
            members,
            tuple(cluster for cluster in self._placements if cluster not in members),
            wall_s,
            (*usages, self._worker.usage("tuning")),
            time.time(),
            confident=sum(confident) / len(confident) if confident else None,
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
    confident = next((result.confident for result in results if result.confident is not None), None)
    return Outcome(update, loss, tuple(result.usage for result in results), confident)


def transport_errors(problems: ExceptionGroup[Exception]) -> Sequence[Exception]:
    """The errors of a group if all are the transport's; any other is raised, since it is no normal event."""
    lost, others = problems.split(TransportError)
    if others is not None:
        raise others.exceptions[0] from problems
    return lost.exceptions if lost else ()
