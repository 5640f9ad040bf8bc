"""The local steps of one cluster, as one of its devices lives them: microbatches flow through the route, 1F1B.

The start device issues credits: as many microbatches are in flight as there are stages, and a returned one makes room
for the next. What arrives goes into an inbox at once, backward before forward; one loop computes and another sends, so
the cycle of a U-shaped route cannot block itself.

Gradients are clipped by their norm over the whole chain: its square is summed along the way back with a batch's
gradients and travels forward with the next batch's activations, which is when each device takes its optimizer step.

Several devices may own data. They take turns as the start, one epoch a turn; who hands over sends the tunables of the
first segment and the head with their optimizer states, so that all turns together are one optimization.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from torch import Tensor

from ecogen.errors import NodeLostError, ProtocolError
from ecogen.models.tunables import Tunables
from ecogen.placement import Placement, Segment
from ecogen.planning.cost import ModelShape, backward_flops, forward_flops
from ecogen.records import Kind
from ecogen.runtime.neighbours import Neighbours
from ecogen.runtime.stage import MicrobatchKey, Stage
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message
from ecogen.tuning.data import Examples
from ecogen.tuning.messages import BACKWARD, FINISH, FORWARD, HAND_OVER, LABELS, RETURNED, AttemptKey, Flow

_KINDS: dict[str, Kind] = {FORWARD: "activations", BACKWARD: "gradients"}


@dataclass(frozen=True)
class Route:
    """A placement, and what tuning must know of it."""

    placement: Placement
    shape: ModelShape

    @property
    def last(self) -> int:
        """The index of the visit with the head."""
        return len(self.placement) - 1

    @property
    def lowest(self) -> int:
        """The first visit that holds a tunable; no gradient flows below it."""
        block = self.shape.lowest_tunable_block
        return next((i for i, visit in enumerate(self.placement) if visit.segment.stop > block), self.last)

    def segment(self, visit: int) -> Segment:
        return self.placement.visits[visit].segment

    def node_id(self, visit: int) -> str:
        return self.placement.visits[visit].node_id


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What a device knows in the end: the number of local steps, their mean loss, and what it answers with."""

    num_steps: int
    loss: float | None
    tunables: Tunables


@dataclass(order=True, slots=True)
class _Task:
    """A microbatch that waits for its computation: backward first, then in order of arrival."""

    priority: tuple[bool, int]
    method: str = field(compare=False)
    flow: Flow = field(compare=False)
    tensor: Tensor | None = field(compare=False)


class LocalSteps:
    """One device's part in one attempt.

    Args:
        routes: one for each owner, in the order of their turns.
        num_epochs: turns that each owner has.
        batches: on an owner, the batches of each of its turns; None elsewhere.
        num_microbatches: into how many a batch is cut, at most.
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
        batches: Callable[[int], Iterator[Examples]] | None = None,
        num_microbatches: int = 1,
        collect: Callable[[], Tunables] = dict,
    ) -> None:
        self.key, self.routes = key, list(routes)
        self._num_turns = num_epochs * len(self.routes)
        self._stage, self._worker, self._neighbours = stage, worker, neighbours
        self._batches, self._num_microbatches, self._collect = batches, num_microbatches, collect
        self._inbox: list[_Task] = []
        self._arrived = asyncio.Event()
        self._arrivals = 0
        self._outbox: asyncio.Queue[tuple[str, Message]] = asyncio.Queue()
        self._credits = asyncio.Semaphore(max(len(route.placement.node_ids) for route in routes))
        self._turns: asyncio.Queue[tuple[Flow, Mapping[str, Tensor]]] = asyncio.Queue()
        self._returned: asyncio.Queue[Flow] = asyncio.Queue()
        self._labels: dict[tuple[int, int], Tensor] = {}
        self._unlabelled: dict[tuple[int, int], tuple[Flow, Tensor]] = {}
        self._backwards: dict[int, int] = {}  # visit -> microbatches of this step that came back
        self._step = 0
        self._final_sums: Mapping[str, Tensor] = {}
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
            case "forward" | "backward":
                self._push(message.method, flow, message.tensors["tensor"])
            case "labels":
                self._give_labels(flow, message.tensors["tensor"])
            case "returned":
                self._take_back(flow)
            case "finish":
                self._final_sums = message.tensors
                self._push(FINISH, flow, None)
            case "hand_over":
                self._turns.put_nowait((flow, message.tensors))

    def fail(self, error: NodeLostError) -> None:
        """End the attempt, since a device is lost."""
        if error.node_id in self._node_ids and not self._end.done():
            self._end.set_exception(error)

    # An owner: batches in, credits, the end of its turn.

    async def _start_loop(self, batches: Callable[[int], Iterator[Examples]]) -> None:
        """Take this owner's turns; whoever has the last one ends the attempt."""
        if not self._num_turns and self._owner_id(0) == self._own_id:
            await self._finish(Flow(self.key, 0))
        for turn in range(self._num_turns):
            if self._owner_id(turn) != self._own_id:
                continue
            flow, state = await self._turns.get()
            await self._worker.compute(self._stage.take_over, state)
            flow = await self._take_turn(turn, flow, batches(turn // len(self.routes)))
            if turn + 1 == self._num_turns:
                await self._finish(flow)
            else:
                await self._hand_over(flow)

    async def _take_turn(self, turn: int, flow: Flow, batches: Iterator[Examples]) -> Flow:
        """Run the local steps of one turn; returns where the next one begins."""
        step, squared_norm, total_loss = flow.step, flow.squared_norm, flow.loss
        while (batch := await self._worker.compute(next, batches, None)) is not None:
            loss, squared_norm = await self._local_step(turn, step, batch, squared_norm)
            total_loss += loss
            step += 1
        return Flow(self.key, step, turn + 1, squared_norm=squared_norm, loss=total_loss)

    async def _hand_over(self, flow: Flow) -> None:
        """Let the next owner go on: with what only the start device tunes, stepped for the last time here."""
        if self._owner_id(flow.turn) == self._own_id:
            self._turns.put_nowait((flow, {}))
            return
        state = await self._worker.compute(self._give_up, flow)
        message = Message.of(HAND_OVER, flow, kind="tunables", tensors=state)
        self._outbox.put_nowait((self._owner_id(flow.turn), message))

    async def _finish(self, flow: Flow) -> None:
        """Tell all devices that this was the last step, and its gradients' norm."""
        finish = msgspec.structs.replace(flow, loss=flow.loss / max(1, flow.step))
        owners = {route.placement.start_id: route for route in self.routes}
        for node_id in self._node_ids - {self._own_id}:
            sums: dict[str, Tensor] = {}
            if node_id in owners:  # it holds a copy of what only the start device tunes
                moved = _moved(owners[self._own_id], owners[node_id])
                sums = await self._worker.compute(self._stage.hand_over_sums, moved)
            message = Message.of(FINISH, finish, kind="tunables" if sums else "control", tensors=sums)
            self._outbox.put_nowait((node_id, message))
        await self._outbox.join()
        self._push(FINISH, finish, None)

    async def _local_step(self, turn: int, step: int, batch: Examples, squared_norm: float) -> tuple[float, float]:
        """Send one batch through the chain; returns its mean loss and its gradients' squared norm."""
        parts = _microbatches(batch, self._num_microbatches)
        for index, part in enumerate(parts):
            await self._credits.acquire()
            flow = Flow(self.key, step, turn, index, 0, len(batch), len(parts), squared_norm)
            self._send(LABELS, self._route(flow).last, flow, part.labels)
            self._push(FORWARD, flow, part.images)
        returned = [await self._returned.get() for _ in parts]
        return sum(flow.loss for flow in returned), sum(flow.squared_norm for flow in returned)

    def _take_back(self, flow: Flow) -> None:
        self._credits.release()
        self._returned.put_nowait(flow)

    # Every device: an inbox, a loop that computes, a loop that sends.

    def _push(self, method: str, flow: Flow, tensor: Tensor | None) -> None:
        place = (flow.step, flow.microbatch)
        if method == FORWARD and flow.visit == self._route(flow).last and place not in self._labels:
            assert tensor is not None
            self._unlabelled[place] = (flow, tensor)
            return
        self._arrivals += 1
        heapq.heappush(self._inbox, _Task((method != BACKWARD, self._arrivals), method, flow, tensor))
        self._arrived.set()

    def _give_labels(self, flow: Flow, labels: Tensor) -> None:
        place = (flow.step, flow.microbatch)
        self._labels[place] = labels
        if place in self._unlabelled:
            self._push(FORWARD, *self._unlabelled.pop(place))

    async def _compute_loop(self) -> None:
        while True:
            while self._inbox:
                task = heapq.heappop(self._inbox)
                outcome = await self._worker.compute(self._execute, task)
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

    def _send(self, method: str, visit: int, flow: Flow, tensor: Tensor | None) -> None:
        """Pass a microbatch on to a visit: to a neighbour, or to this node itself."""
        node_id = self._route(flow).node_id(visit)
        tensors = {} if tensor is None else {"tensor": tensor}
        message = Message.of(method, flow, kind=_KINDS.get(method, "control"), tensors=tensors)
        if node_id == self._own_id:
            self.deliver(message, flow)
        else:
            self._outbox.put_nowait((node_id, message))

    # On the compute thread.

    def _execute(self, task: _Task) -> tuple[str, int, Flow, Tensor | None] | LocalResult:
        """Compute one task; returns what to send and to which visit, or the result at the end."""
        self._step_up_to(task.flow)
        if task.method == FINISH:
            self._stage.take_over(self._final_sums)
            return LocalResult(task.flow.step, task.flow.loss if task.flow.step else None, self._collect())
        if task.method == BACKWARD:
            return self._backward(task.flow, task.tensor)
        assert task.tensor is not None
        return self._forward(task.flow, task.tensor)

    def _step_up_to(self, flow: Flow) -> None:
        """Take the optimizer step before this one, unless it is taken."""
        if flow.step > self._step:
            self._stage.step(flow.squared_norm)
            self._step = flow.step
            self._backwards.clear()

    def _give_up(self, flow: Flow) -> dict[str, Tensor]:
        self._step_up_to(flow)
        moved = _moved(self._route(flow, before=1), self._route(flow))
        return {name: tensor for segment in moved for name, tensor in self._stage.hand_over(segment).items()}

    def _forward(self, flow: Flow, inputs: Tensor) -> tuple[str, int, Flow, Tensor | None]:
        route = self._route(flow)
        visit, segment = flow.visit, route.segment(flow.visit)
        self._worker.meter.add_flops(forward_flops(route.shape, segment) * len(inputs))
        key = MicrobatchKey(flow.step, flow.microbatch, visit)
        if visit == route.last:
            labels = self._labels.pop((flow.step, flow.microbatch))
            loss = self._stage.loss(key, segment, inputs, labels, flow.batch_size, input_grads=visit > route.lowest)
            return self._backward(_at(flow, visit, loss=loss, squared_norm=0.0), None, len(inputs))
        if visit < route.lowest:
            outputs = self._stage.infer(segment, inputs)
        else:
            outputs = self._stage.forward(key, segment, inputs, input_grads=visit > route.lowest)
        return FORWARD, visit + 1, _at(flow, visit + 1), outputs.cpu()

    def _backward(
        self, flow: Flow, grads: Tensor | None, num_examples: int | None = None
    ) -> tuple[str, int, Flow, Tensor | None]:
        route = self._route(flow)
        visit, segment = flow.visit, route.segment(flow.visit)
        examples = len(grads) if grads is not None else num_examples or 0
        self._worker.meter.add_flops(backward_flops(route.shape, segment) * examples)
        input_grads = self._stage.backward(MicrobatchKey(flow.step, flow.microbatch, visit), grads)
        flow = _at(flow, visit, squared_norm=flow.squared_norm + self._norm_when_complete(flow))
        if visit > route.lowest:
            assert input_grads is not None
            return BACKWARD, visit - 1, _at(flow, visit - 1), input_grads.cpu()
        return RETURNED, 0, _at(flow, 0), None

    def _norm_when_complete(self, flow: Flow) -> float:
        """The squared norm of a visit's gradients once its last microbatch is back, 0 before."""
        self._backwards[flow.visit] = self._backwards.get(flow.visit, 0) + 1
        if self._backwards[flow.visit] < flow.num_microbatches:
            return 0.0
        segment = self._route(flow).segment(flow.visit)
        self._stage.correct(segment)
        return self._stage.squared_norm(segment)

    def _route(self, flow: Flow, before: int = 0) -> Route:
        """The route of the owner whose turn it is, or was `before`."""
        return self.routes[(flow.turn - before) % len(self.routes)]

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


def _moved(before: Route, after: Route) -> list[Segment]:
    """The segments that are at another node when another owner is the start."""
    visits = zip(before.placement, after.placement, strict=True)
    return [one.segment for one, other in visits if one.node_id != other.node_id]


def _at(flow: Flow, visit: int, **changes: float) -> Flow:
    """The same microbatch at another visit."""
    return msgspec.structs.replace(flow, visit=visit, **changes)


def _microbatches(batch: Examples, count: int) -> list[Examples]:
    """The batch in at most `count` parts of nearly equal size, in order."""
    parts = zip(
        batch.images.tensor_split(min(count, len(batch))),
        batch.labels.tensor_split(min(count, len(batch))),
        strict=True,
    )
    return [Examples(images, labels) for images, labels in parts]
