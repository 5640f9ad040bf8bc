"""The local steps of one cluster, as one of its devices lives them: microbatches flow through the route, 1F1B.

The start device issues credits: so many microbatches are in flight as keep all stages busy (`Placement.in_flight`), and
a returned one makes room for the next. What arrives goes into an inbox at once, backward before forward; one loop
computes and another sends, so the cycle of a U-shaped route cannot block itself.

Gradients are clipped by their norm over the whole chain: its square is summed along the way back with a batch's
gradients and travels forward with the next batch's activations, which is when each device takes its optimizer step.
Where each example is protected, its own squared norm goes the same way, and each device clips it and adds noise.

Below the lowest tunable, activations are the same in every epoch. A device that is given a `PrefixCache` keeps them,
and the owner sends them only once: `want` asks for room, `hold` tells the keys that are there.

Several devices may own data. They take turns as the start, one epoch a turn; who hands over sends the tunables of the
first segment and the head with their optimizer states, so that all turns together are one optimization.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor

from ecogen.config import Unlabelled, WireType
from ecogen.errors import NodeLostError, ProtocolError
from ecogen.models.tunables import Tunables
from ecogen.records import Kind
from ecogen.runtime.compression import TENSOR
from ecogen.runtime.neighbours import Neighbours
from ecogen.runtime.prefix_cache import PrefixCache
from ecogen.runtime.stage import Stage
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message
from ecogen.tuning.fixmatch import STRONG, WEAK, cut_batch
from ecogen.tuning.messages import (
    BACKWARD,
    FINISH,
    FORWARD,
    HAND_OVER,
    KEEP,
    KEYS,
    LABELS,
    RECALL,
    ROOM,
    WANT,
    AttemptKey,
    Flow,
)
from ecogen.tuning.passages import Batch
from ecogen.tuning.prefix import KnownPrefixes
from ecogen.tuning.route import Route, moved_segments
from ecogen.tuning.visits import LocalResult, Visits, at

_KINDS: dict[str, Kind] = {FORWARD: "activations", BACKWARD: "gradients"}


@dataclass(order=True, slots=True)
class _Task:
    """A microbatch that waits for its computation, in the order of `priority`: rank and arrival."""

    priority: tuple[int, int]
    method: str = field(compare=False)
    flow: Flow = field(compare=False)
    tensors: Mapping[str, Tensor] = field(compare=False)


class LocalSteps:
    """One device's part in one attempt.

    Args:
        routes: one for each owner, in the order of their turns.
        num_epochs: turns that each owner has.
        batches: on an owner, the batches of each of its turns; None elsewhere.
        num_microbatches: into how many a batch is cut, at most.
        wire_types: of what this device sends, by method; float32 where nothing is said.
        own_keys: on an owner whose prefix activations should be kept: of all its examples.
        cache: where this device keeps those of others.
        unlabelled: what is made of unlabelled examples, where batches have some.
        expected: on an owner whose examples are protected each, how many of them a step has on average.
        collect: what this device answers with, called after the last step on the compute thread.
    """

    def __init__(
        self,
        key: AttemptKey,
        routes: Sequence[Route],
        stage: Stage,
        worker: Worker,
        neighbours: Neighbours,
        *,
        num_epochs: int,
        batches: Callable[[int], Iterator[Batch]] | None = None,
        num_microbatches: int = 1,
        wire_types: Mapping[str, WireType] | None = None,
        own_keys: Tensor | None = None,
        cache: PrefixCache | None = None,
        unlabelled: Unlabelled | None = None,
        expected: int | None = None,
        collect: Callable[[], Tunables] = dict,
    ) -> None:
        self.key, self.routes = key, list(routes)
        self._num_turns = num_epochs * len(self.routes)
        self._stage, self._worker, self._neighbours = stage, worker, neighbours
        self._batches, self._num_microbatches, self._own_keys = batches, num_microbatches, own_keys
        self._expected = expected
        self._visits = Visits(
            routes,
            neighbours.node_id,
            stage,
            worker.meter,
            wire_types=wire_types or {},
            cache=cache,
            unlabelled=unlabelled or Unlabelled(),
            collect=collect,
        )
        self._inbox: list[_Task] = []
        self._arrived = asyncio.Event()
        self._arrivals = 0
        self._outbox: asyncio.Queue[tuple[str, Message]] = asyncio.Queue()
        self._credits = asyncio.Semaphore(max(route.placement.in_flight for route in routes))
        self._turns: asyncio.Queue[tuple[Flow, Mapping[str, Tensor]]] = asyncio.Queue()
        self._returned: asyncio.Queue[Flow] = asyncio.Queue()
        self._labels: dict[tuple[int, int], Tensor] = {}
        self._unlabelled: dict[tuple[int, int], tuple[Flow, Mapping[str, Tensor]]] = {}
        self._hold: asyncio.Queue[Mapping[str, Tensor]] = asyncio.Queue()
        self._known: KnownPrefixes | None = None
        self._end: asyncio.Future[LocalResult] = asyncio.get_running_loop().create_future()
        self._loops: list[asyncio.Task[None]] = []

    async def run(self) -> LocalResult:
        """Take part until the start device has finished all its batches.

        Raises:
            NodeLostError: if a device of the cluster is lost meanwhile.
        """
        self._loops = [asyncio.create_task(loop) for loop in (self._compute_loop(), self._send_loop())]
        if self._batches is not None:
            self._loops.append(asyncio.create_task(self._start_loop(self._batches)))
            if self._owner_id(0) == self._own_id:
                self._turns.put_nowait((Flow(self.key, 0), {}))
        for loop in self._loops:
            loop.add_done_callback(self._pass_on_failure)
        try:
            return await self._end
        finally:
            await self._stop()

    async def break_off(self) -> None:
        """End the attempt, and wait until nothing of it computes any more."""
        if not self._end.done():
            self._end.set_exception(ProtocolError(f"attempt {self.key} was broken off"))
        await self._stop()

    async def _stop(self) -> None:
        """Cancel the loops, once only: cancelled again, one would leave behind what computes on the thread."""
        for loop in self._loops:
            if not loop.cancelling():
                loop.cancel()
        if self._loops:
            await asyncio.wait(self._loops)

    def deliver(self, message: Message, flow: Flow) -> None:
        """Take a message of this attempt from a neighbour; never waits."""
        match message.method:
            case "forward" | "backward" | "want" | "finish":
                self._push(message.method, flow, message.tensors)
            case "labels":
                self._give_labels(flow, message.tensors[TENSOR])
            case "returned":
                self._take_back(flow)
            case "hold":
                self._hold.put_nowait(message.tensors)
            case "hand_over":
                self._turns.put_nowait((flow, message.tensors))

    def fail(self, error: NodeLostError) -> None:
        """End the attempt, since a device is lost."""
        if error.node_id in self._node_ids and not self._end.done():
            self._end.set_exception(error)

    # An owner: batches in, credits, the end of its turn.

    async def _start_loop(self, batches: Callable[[int], Iterator[Batch]]) -> None:
        """Take this owner's turns; whoever has the last one ends the attempt."""
        if not self._num_turns and self._owner_id(0) == self._own_id:
            await self._finish(Flow(self.key, 0))
        for turn in range(self._num_turns):
            if self._owner_id(turn) != self._own_id:
                continue
            flow, state = await self._turns.get()
            await self._worker.compute(self._stage.take_over, state)
            if self._own_keys is not None and self._known is None:
                self._known = await self._ask_for_room(turn, self._own_keys)
            flow = await self._take_turn(turn, flow, batches(turn // len(self.routes)))
            if turn + 1 == self._num_turns:
                await self._finish(flow)
            else:
                await self._hand_over(flow)

    async def _ask_for_room(self, turn: int, keys: Tensor) -> KnownPrefixes:
        """Have the device with the lowest tunable reserve room, and say what it has already."""
        flow = Flow(self.key, 0, turn)
        self._send(WANT, self._route(flow).lowest, flow, {ROOM: torch.tensor(len(set(keys.tolist())))})
        held = await self._hold.get()
        return KnownPrefixes(held[KEYS], int(held[ROOM]), keys)

    async def _take_turn(self, turn: int, flow: Flow, batches: Iterator[Batch]) -> Flow:
        """Run the local steps of one turn; returns where the next one begins."""
        flow = msgspec.structs.replace(flow, turn=turn)
        while (batch := await self._worker.compute(next, batches, None)) is not None:
            flow = await self._local_step(flow, batch)
        return msgspec.structs.replace(flow, turn=turn + 1)

    async def _hand_over(self, flow: Flow) -> None:
        """Let the next owner go on: with what only the start device tunes, stepped for the last time here."""
        if self._owner_id(flow.turn) == self._own_id:
            self._turns.put_nowait((flow, {}))
            return
        state = await self._worker.compute(self._visits.give_up, flow)
        message = Message.of(HAND_OVER, flow, kind="tunables", tensors=state)
        self._outbox.put_nowait((self._owner_id(flow.turn), message))

    async def _finish(self, flow: Flow) -> None:
        """Tell all devices that this was the last step, and its gradients' norm."""
        num_steps = max(1, flow.step)
        finish = msgspec.structs.replace(flow, loss=flow.loss / num_steps, confident=flow.confident / num_steps)
        owners = {route.placement.start_id: route for route in self.routes}
        for node_id in self._node_ids - {self._own_id}:
            sums: dict[str, Tensor] = {}
            if node_id in owners:  # it holds a copy of what only the start device tunes
                moved = moved_segments(owners[self._own_id], owners[node_id])
                sums = await self._worker.compute(self._stage.hand_over_sums, moved)
            message = Message.of(FINISH, finish, kind="tunables" if sums else "control", tensors=sums)
            self._outbox.put_nowait((node_id, message))
        await self._outbox.join()
        self._push(FINISH, finish, {})

    async def _local_step(self, begun: Flow, batch: Batch) -> Flow:
        """Send one batch through the chain; returns where the next one begins."""
        parts = cut_batch(batch, self._num_microbatches)
        counted = int((batch.labels >= 0).sum()) if self._expected is None else self._expected
        sizes = counted, len(parts)
        num_unlabelled = int((batch.labels == STRONG).sum())
        for index, part in enumerate(parts):
            await self._credits.acquire()
            flow = Flow(self.key, begun.step, begun.turn, index, 0, *sizes, begun.squared_norm)
            num_weak = int((part.labels == WEAK).sum())
            counts = {"num_weak": num_weak, "num_unlabelled": num_unlabelled}
            self._launch(msgspec.structs.replace(flow, **counts, squared_norms=begun.squared_norms), part)
        returned = sorted([await self._returned.get() for _ in parts], key=lambda flow: flow.microbatch)
        return Flow(
            self.key,
            begun.step + 1,
            begun.turn,
            squared_norm=sum(flow.squared_norm for flow in returned),
            squared_norms=tuple(norm for flow in returned for norm in flow.squared_norms),
            loss=begun.loss + sum(flow.loss for flow in returned),
            confident=begun.confident + sum(flow.confident for flow in returned),
        )

    def _launch(self, flow: Flow, part: Batch) -> None:
        """Send a microbatch off: inputs into the first visit, or keys to where their activations are."""
        route = self._route(flow)
        if self._known is None or part.keys is None:
            part = part.trimmed()
            self._send(LABELS, route.last, flow, {TENSOR: part.labels})
            self._push(FORWARD, flow, {TENSOR: part.inputs})
            return
        examples, fresh, kept, recalled = self._known.divide(part)
        self._send(LABELS, route.last, flow, {TENSOR: examples.labels})
        keys = {name: tensor for name, tensor in ((KEEP, kept), (RECALL, recalled)) if len(tensor)}
        if fresh:
            self._push(FORWARD, flow, {TENSOR: examples.inputs[:fresh], **keys})
        else:
            self._send(FORWARD, route.lowest, at(flow, route.lowest), keys)

    def _take_back(self, flow: Flow) -> None:
        self._credits.release()
        self._returned.put_nowait(flow)

    # Every device: an inbox, a loop that computes, a loop that sends.

    def _push(self, method: str, flow: Flow, tensors: Mapping[str, Tensor]) -> None:
        place = (flow.step, flow.microbatch)
        if method == FORWARD and flow.visit == self._route(flow).last:
            if place not in self._labels:
                self._unlabelled[place] = (flow, tensors)
                return
            tensors = {**tensors, LABELS: self._labels.pop(place)}
        self._arrivals += 1
        heapq.heappush(self._inbox, _Task((self._rank(method, flow), self._arrivals), method, flow, tensors))
        self._arrived.set()

    def _rank(self, method: str, flow: Flow) -> int:
        """A head that is alone first: it is short, and all others wait for what it sends back. Then backward."""
        route = self._route(flow)
        if method == FORWARD and route.placement.returns and flow.visit == route.last:
            return 0
        return 1 if method == BACKWARD else 2

    def _give_labels(self, flow: Flow, labels: Tensor) -> None:
        place = (flow.step, flow.microbatch)
        self._labels[place] = labels
        if place in self._unlabelled:
            self._push(FORWARD, *self._unlabelled.pop(place))

    async def _compute_loop(self) -> None:
        while True:
            while self._inbox:
                task = heapq.heappop(self._inbox)
                outcome = await self._worker.compute(self._visits.execute, task.method, task.flow, task.tensors)
                if isinstance(outcome, LocalResult):
                    self._end.set_result(outcome)
                    return
                self._send(*outcome)
            self._arrived.clear()
            await self._arrived.wait()

    async def _send_loop(self) -> None:
        while True:
            node_id, message = await self._outbox.get()
            await self._neighbours.send(node_id, message)
            self._outbox.task_done()

    def _send(self, method: str, visit: int, flow: Flow, tensors: Mapping[str, Tensor]) -> None:
        """Pass a microbatch on to a visit: to a neighbour, or to this node itself."""
        node_id = self._route(flow).node_id(visit)
        kind = _KINDS.get(method, "control") if TENSOR in tensors else "control"
        message = Message.of(method, flow, kind=kind, tensors=tensors)
        if node_id == self._own_id:
            self.deliver(message, flow)
        else:
            self._outbox.put_nowait((node_id, message))

    def _route(self, flow: Flow) -> Route:
        """The route of the owner whose turn it is."""
        return self.routes[flow.turn % len(self.routes)]

    def _owner_id(self, turn: int) -> str:
        return self.routes[turn % len(self.routes)].placement.start_id

    @property
    def _own_id(self) -> str:
        return self._neighbours.node_id

    @property
    def _node_ids(self) -> set[str]:
        return {node_id for route in self.routes for node_id in route.placement.node_ids}

    def _pass_on_failure(self, loop: asyncio.Task[None]) -> None:
        if not loop.cancelled() and (problem := loop.exception()) and not self._end.done():
            self._end.set_exception(problem)
