"""One device's part of a chain that serves: takes steps, computes its segments, passes them on.

The last stage chooses the tokens, so that no logits travel.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from ecogen.errors import NodeLostError, ServingError
from ecogen.models.decoder import State
from ecogen.placement import Placement
from ecogen.runtime.neighbours import Neighbours
from ecogen.runtime.worker import Worker
from ecogen.serving.decoder_stage import DecoderStage
from ecogen.serving.sampling import Chosen, Constrain, Sampler
from ecogen.serving.steps import CHOSEN, LOST, STEP, Lost, Order, Start, StepFlow, StepResult, Visited, size_of
from ecogen.transport.base import Message

logger = logging.getLogger(__name__)


class StagesOfDevice:
    """The visits of one chain to one device.

    Args:
        number: of the chain.
        stages: by the index of the visit.
        edge_id: who is told what was chosen.
        constrain: for requests with a grammar, where the last stage is here.
    """

    def __init__(
        self,
        number: int,
        placement: Placement,
        stages: Mapping[int, DecoderStage],
        edge_id: str,
        worker: Worker,
        neighbours: Neighbours,
        constrain: Constrain | None = None,
    ) -> None:
        self._number, self._placement, self._stages = number, placement, stages
        self._edge_id, self._worker, self._neighbours = edge_id, worker, neighbours
        self._choosers = Choosers(constrain)
        self._tasks: set[asyncio.Task[None]] = set()

    def deliver(self, message: Message) -> None:
        """Take a step from the edge or the device before; never waits."""
        flow = message.read(StepFlow)
        if flow.chain == self._number:
            self._start(flow, state_of(message), size_of(message))

    def lose(self, error: NodeLostError) -> None:
        """A neighbour is lost: the edge should know at once."""
        if error.node_id in self._placement.node_ids:
            self._tell(Message.of(LOST, Lost(self._number, error.node_id, str(error))))

    async def close(self) -> None:
        """Another chain takes this one's place."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def cache_bytes(self) -> int:
        """Of all slabs."""
        return sum(stage.cache_bytes for stage in self._stages.values())

    def _start(self, flow: StepFlow, state: State | None, received_bytes: int) -> None:
        task = asyncio.create_task(self._visit(flow, state, received_bytes))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _visit(self, flow: StepFlow, state: State | None, received_bytes: int) -> None:
        try:
            given, compute_s = await self._worker.compute(self._compute, flow, state)
        except Exception as problem:
            logger.exception("a step failed")
            await self._send(self._edge_id, CHOSEN, self._failed(flow, problem))
            return
        visits = [*flow.visits, Visited(compute_s, received_bytes)]
        if isinstance(given, list):
            result = StepResult(self._number, flow.order.step.group, given, visits)
            await self._send(self._edge_id, CHOSEN, result)
        else:
            await self._pass_on(StepFlow(self._number, flow.order, visits), given)

    def _compute(self, flow: StepFlow, state: State | None) -> tuple[State | list[Chosen | str], float]:
        """On the compute thread: what goes on, or each row's token, and the seconds that it took."""
        began_s, order = time.perf_counter(), flow.order
        given: State | list[Chosen | str] = self._stages[len(flow.visits)].run(order.step, state, order.adapters)
        if len(flow.visits) + 1 == len(self._placement):
            assert isinstance(given, Tensor)
            given = self._choosers.choose(order, given)
        return given, time.perf_counter() - began_s

    async def _pass_on(self, flow: StepFlow, state: State) -> None:
        next_id = self._placement.visits[len(flow.visits)].node_id
        if next_id == self._neighbours.node_id:
            self._start(flow, state, 0)
        else:
            await self._send(next_id, STEP, flow, state)

    async def _send(self, node_id: str, method: str, body: StepFlow | StepResult, state: State | None = None) -> None:
        message = Message.of(method, body, kind="activations", tensors=tensors_of(state))
        try:
            await self._neighbours.send(node_id, message)
        except NodeLostError as problem:
            self.lose(problem)

    def _tell(self, message: Message) -> None:
        task = asyncio.create_task(self._tell_edge(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell_edge(self, message: Message) -> None:
        try:
            await self._neighbours.send(self._edge_id, message)
        except NodeLostError as problem:
            logger.warning("%s", problem)  # it places the model anew when it is back

    def _failed(self, flow: StepFlow, problem: Exception) -> StepResult:
        where = f"{self._neighbours.node_id} failed: {problem}"
        step = flow.order.step
        return StepResult(self._number, step.group, [where] * len(step.requests), flow.visits)


class Choosers:
    """The requests whose tokens the last stage chooses.

    Args:
        constrain: for requests with a grammar.
    """

    def __init__(self, constrain: Constrain | None = None) -> None:
        self._constrain = constrain
        self._choosers: dict[str, Sampler | str] = {}  # or why there is none

    def choose(self, order: Order, logits: Tensor) -> list[Chosen | str]:
        """The token of each row that has one, or why not, of logits [B, V]."""
        for request_id in order.ended:
            self._choosers.pop(request_id, None)
        for request_id, start in order.starts.items():
            self._choosers[request_id] = self._chooser(start)
        requests = order.step.requests[: order.step.gives]
        return [self._choose(name, row) for name, row in zip(requests, logits, strict=False)]

    def _chooser(self, start: Start) -> Sampler | str:
        try:
            return Sampler(start.sampling, self._constrain, start.given)
        except ServingError as problem:
            return str(problem)

    def _choose(self, request_id: str, logits: Tensor) -> Chosen | str:
        choose = self._choosers.get(request_id, "its reader has left")
        if isinstance(choose, str):
            return choose
        try:
            return choose(logits)
        except ServingError as problem:
            return str(problem)
        except Exception as problem:  # of what one request asks for, or of weights that give no numbers
            return f"no token can be chosen: {problem}; are the model's weights sound?"


def tensors_of(state: State | None) -> dict[str, Tensor]:
    """A state as a message carries it, part by part."""
    parts: Sequence[Tensor] = () if state is None else (state,) if isinstance(state, Tensor) else state
    return {str(index): part for index, part in enumerate(parts)}


def state_of(message: Message) -> State | None:
    """The state that `tensors_of` gave."""
    parts = [message.tensors[str(index)] for index in range(len(message.tensors))]
    return None if not parts else parts[0] if len(parts) == 1 else tuple(parts)
