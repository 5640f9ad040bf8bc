"""An edge's orders to its clusters: one attempt of a cluster gives an outcome, or fails since somebody was lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
from torch import Tensor

from ecogen.config import Tuning, Wire
from ecogen.errors import AggregationError, NodeLostError, ProtocolError, RunError, TransportError
from ecogen.models.tunables import Tunables, tunables_of
from ecogen.placement import Placement, Segment, neighbours_of, segments_held
from ecogen.records import EventRecord, Record, Usage
from ecogen.runtime.compression import compress_all, restore_all
from ecogen.runtime.membership import Members
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message, Transport
from ecogen.transport.codec import Packed
from ecogen.tuning.aggregate import Update, check_update
from ecogen.tuning.edge_state import EdgeState
from ecogen.tuning.messages import TUNE, AttemptKey, Sampled, TuneOrder, TuneResult, split_controls, with_controls
from ecogen.tuning.ranks import LoraRanks

logger = logging.getLogger(__name__)

MAX_TRIES = 10
"""Of a round without any cluster's outcome; a lost device needs one or two."""


@dataclass(frozen=True)
class Outcome:
    """What one attempt of one cluster gave.

    Attributes:
        sampled: how its devices drew their examples, where each is protected.
    """

    key: AttemptKey
    update: Update
    loss: float | None
    usages: tuple[Usage, ...]
    confident: float | None = None
    sampled: frozenset[Sampled] = frozenset()


@dataclass
class _Cache:
    """What was made of the state that was ordered last: its tunables by LoRA rank, and packed by who holds them."""

    state: EdgeState | None
    cuts: dict[int, Tunables] = field(default_factory=dict)
    parts: dict[tuple[tuple[Segment, ...], int | None], Packed] = field(default_factory=dict)


class Attempts:
    """Has clusters tune, each attempt under a number of its own.

    Args:
        placements: of each cluster at this edge, by its id.
        members: the devices of all its clusters.
        publish: takes each record.
        last: a number larger than that of any attempt in an earlier life of this edge.
        ranks: of LoRA, where clusters have their own.
        wire: the types in which tunables are sent, and in which changes of them come back.
        has_controls: clusters answer with SCAFFOLD's control variates too.
        is_discreet: that a cluster took part is not to be told, and so not that it failed.
    """

    def __init__(
        self,
        tuning: Tuning,
        placements: Mapping[str, Placement],
        members: Members,
        transport: Transport,
        worker: Worker,
        publish: Callable[[Record], None],
        *,
        last: int,
        num_owners: int = 1,
        ranks: LoraRanks | None = None,
        wire: Wire | None = None,
        is_discreet: bool = False,
        has_controls: bool = False,
    ) -> None:
        self._wire, self._has_controls = wire or Wire(), has_controls
        self.cluster_ids = list(placements)
        self._tuning, self._placements, self._members = tuning, placements, members
        self._transport, self._worker, self._publish = transport, worker, publish
        self._last, self._num_owners, self._ranks, self._is_discreet = last, num_owners, ranks, is_discreet
        self._failed: set[str] = set()
        self._cache = _Cache(None)
        self._last_problem = ""

    # Which clusters there are.

    def formed(self) -> list[str]:
        """The clusters whose devices are all here and ready."""
        return [cluster_id for cluster_id in self.cluster_ids if self.is_formed(cluster_id)]

    def is_formed(self, cluster_id: str) -> bool:
        return self._members.are_ready(self._placements[cluster_id].node_ids)

    async def wait_for(self, condition: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait until the condition holds, looked at whenever a device comes or goes; False after the timeout."""
        return await self._members.wait_for(condition, timeout_s)

    def announce_formed(self, formed: Sequence[str], round_index: int) -> None:
        """Say which clusters are back that had failed."""
        for cluster_id in sorted(self._failed.intersection(formed)):
            self._publish(EventRecord("cluster_formed", cluster_id, round_index, "formed again", time.time()))
        self._failed.difference_update(formed)

    # One attempt.

    def next_key(self, round_index: int) -> AttemptKey:
        """The key of a new attempt, which fences off all before it."""
        self._last += 1
        return AttemptKey(round_index, self._last)

    async def attempt(self, cluster_id: str, key: AttemptKey, state: EdgeState, draw: int) -> Outcome | None:
        """One attempt, or None if a device was lost or sent what cannot be put together: that is a normal event.

        Args:
            state: what it begins with.
            draw: keys the random numbers.
        """
        placement, begun = self._placements[cluster_id], await self.begin_of(cluster_id, state)
        counted = state.counted[cluster_id].attempt if cluster_id in state.counted else None
        order = TuneOrder(key, {}, draw, counted)
        try:
            async with asyncio.timeout(self._tuning.round_timeout_s):
                messages = {n: await self._message(n, cluster_id, order, state) for n in placement.node_ids}
                async with asyncio.TaskGroup() as group:  # all are sent before any is answered
                    calls = (self._transport.call(node_id, message) for node_id, message in messages.items())
                    replies = [group.create_task(call) for call in calls]
        except TimeoutError:
            await self._lose(cluster_id, key, [TimeoutError(f"not done in {self._tuning.round_timeout_s:g} s")])
            return None
        except ExceptionGroup as problems:
            await self._lose(cluster_id, key, transport_errors(problems))
            return None
        except NodeLostError as problem:
            await self._lose(cluster_id, key, [problem])
            return None
        try:
            return await self._worker.compute(self._outcome, cluster_id, key, [r.result() for r in replies], begun)
        except (AggregationError, ProtocolError) as problem:
            await self._lose(cluster_id, key, [problem])
            return None

    def _outcome(
        self, cluster_id: str, key: AttemptKey, replies: Sequence[Message], begun: Mapping[str, Tensor]
    ) -> Outcome:
        """Put the answers of a cluster's devices together.

        Raises:
            AggregationError, ProtocolError: if they are not what was ordered.
        """
        results = [reply.read(TuneResult) for reply in replies]
        tensors: Tunables = {name: tensor for reply in replies for name, tensor in reply.tensors.items()}
        answer, control_change = split_controls(tensors)
        update = Update(cluster_id, restore_all(answer), sum(result.num_examples for result in results), control_change)
        check_update(update, begun)
        if self._has_controls and not control_change:
            raise AggregationError(f"update of {cluster_id!r} has no control variates, which scaffold needs")
        update = replace(update, tunables=self._exact(update.tunables, begun))
        loss = next((result.loss for result in results if result.loss is not None), None)
        confident = next((result.confident for result in results if result.confident is not None), None)
        sampled = frozenset(result.sampled for result in results if result.sampled is not None)
        return Outcome(key, update, loss, tuple(result.usage for result in results), confident, sampled)

    def _exact(self, answer: Mapping[str, Tensor], begun: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the edge's own tunables become by a cluster's changes, where rounded ones travelled."""
        if self._wire.updates != "float32":
            return {name: begun[name] + change for name, change in answer.items()}
        if self._wire.orders != "float32":
            ordered = restore_all(compress_all(begun, self._wire.orders))
            return {name: begun[name] + (tensor - ordered[name]) for name, tensor in answer.items()}
        return answer

    async def begin_of(self, cluster_id: str, state: EdgeState) -> Mapping[str, Tensor]:
        """What a cluster begins with: the state's tunables, where it has a LoRA rank of its own cut to that."""
        rank = self._rank_of(cluster_id)
        if rank is None or self._ranks is None:
            return state.tunables
        cuts = self._cache_of(state).cuts
        if rank not in cuts:
            cuts[rank] = await self._worker.compute(self._ranks.cut, state.tunables, rank)
        return cuts[rank]

    def _rank_of(self, cluster_id: str) -> int | None:
        return None if self._ranks is None else self._ranks.of_clusters.get(cluster_id)

    def _cache_of(self, state: EdgeState) -> _Cache:
        if self._cache.state is not state:
            self._cache = _Cache(state)
        return self._cache

    async def _message(self, node_id: str, cluster_id: str, order: TuneOrder, state: EdgeState) -> Message:
        placement, rank = self._placements[cluster_id], self._rank_of(cluster_id)
        begun = await self.begin_of(cluster_id, state)
        tensors = await self._part(state, begun, rank, tuple(segments_held(placement, self._num_owners, node_id)))
        addresses = self._members.locate(neighbours_of(placement, self._num_owners, node_id))
        return Message.of(TUNE, msgspec.structs.replace(order, addresses=addresses), kind="tunables", tensors=tensors)

    async def _part(
        self, state: EdgeState, begun: Mapping[str, Tensor], rank: int | None, held: tuple[Segment, ...]
    ) -> Packed:
        """What those are sent who hold some segments, packed once for all of them that have the rank."""
        parts = self._cache_of(state).parts
        if (held, rank) not in parts:
            parts[held, rank] = await self._worker.compute(self._packed, state, begun, held)
        return parts[held, rank]

    def _packed(self, state: EdgeState, begun: Mapping[str, Tensor], held: tuple[Segment, ...]) -> Packed:
        _, controls = split_controls(state.memory)
        sent = {name: control.to(state.tunables[name].dtype) for name, control in controls.items()}
        order = compress_all(tunables_of(begun, held), self._wire.orders)
        return Packed(with_controls(order, tunables_of(sent, held)))

    async def _lose(self, cluster_id: str, key: AttemptKey, problems: Sequence[BaseException]) -> None:
        detail = "; ".join(sorted({str(problem) or type(problem).__name__ for problem in problems}))
        logger.warning("round %d: cluster %s failed: %s", key.round_index + 1, cluster_id, detail)
        for problem in problems:
            if isinstance(problem, NodeLostError):
                await self._members.lose(problem.node_id, str(problem))
        self._last_problem = detail
        if self._is_discreet:
            return
        self._failed.add(cluster_id)
        self._publish(EventRecord("cluster_failed", cluster_id, key.round_index, detail, time.time()))

    # None at all.

    def nobody_came(self, round_index: int) -> RunError:
        """What ends the run where no cluster is formed for too long."""
        return self._give_up(round_index, f"none came back within {self._tuning.rejoin_timeout_s:g} s")

    def all_failed(self, round_index: int, num_tries: int) -> RunError:
        """What ends the run where all that is tried fails."""
        return self._give_up(round_index, f"{num_tries} tries failed, the last one since {self._last_problem}")

    def _give_up(self, round_index: int, reason: str) -> RunError:
        return RunError(
            f"{self._transport.peer.node_id}: no cluster finished round {round_index + 1}: {reason}; "
            "see the devices' logs, bring them back, then --resume"
        )


def transport_errors(problems: ExceptionGroup[Exception]) -> Sequence[Exception]:
    """The errors of a group if all are the transport's; any other is raised, since it is no normal event."""
    lost, others = problems.split(TransportError)
    if others is not None:
        raise others.exceptions[0] from problems
    return lost.exceptions if lost else ()
