"""A request through the split chain: forward only, from the start device around the route and back.

The start device asks for itself: its inputs go nowhere, activations do. Every visit adds what it computed to
the message,
so the answer says what each device did and what crossed each link.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
from torch import Tensor

from ecogen.errors import NodeLostError
from ecogen.placement import Placement
from ecogen.planning.cost import ModelShape, forward_flops
from ecogen.records import Hop, RequestRecord
from ecogen.runtime.neighbours import Neighbours
from ecogen.runtime.stage import Stage
from ecogen.runtime.worker import Worker
from ecogen.topology import Link
from ecogen.transport.base import Message
from ecogen.transport.codec import encode_prefix

LinkTo = Callable[[str, str], Link | None]
"""The link from one node to another; None within a node."""

INFER, ANSWER = "infer", "answer"
REQUEST_METHODS = frozenset({INFER, ANSWER})


class VisitReport(msgspec.Struct, frozen=True):
    """What one visit computed, and how many bytes brought its input."""

    compute_s: float
    received_bytes: int


class RequestFlow(msgspec.Struct, frozen=True):
    """One request between two visits; `reports` has one entry for each visit so far."""

    request_id: str
    visit: int
    reports: list[VisitReport] = msgspec.field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """Logits [B, L], and the record of how they came about."""

    logits: Tensor
    record: RequestRecord


class DeviceServing:
    """One device's serving role.

    Args:
        link_to: the link between two devices, whose time is modelled.
    """

    def __init__(
        self,
        cluster_id: str,
        placement: Placement,
        shape: ModelShape,
        link_to: LinkTo,
        stage: Stage,
        worker: Worker,
        neighbours: Neighbours,
    ) -> None:
        self._cluster_id, self._placement, self._shape, self._link_to = cluster_id, placement, shape, link_to
        self._stage, self._worker, self._neighbours = stage, worker, neighbours
        self._waiting: dict[str, asyncio.Future[tuple[RequestFlow, Tensor, int]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, request_id: str, inputs: Tensor) -> Answer:
        """Send inputs, images [B, C, H, W] or tokens [B, T], through the chain; this is the start device.

        Raises:
            NodeLostError: if a device of the chain is lost meanwhile.
        """
        future = self._waiting[request_id] = asyncio.get_running_loop().create_future()
        try:
            self._begin(RequestFlow(request_id, 0), inputs, 0)
            flow, logits, received_bytes = await future
        finally:
            del self._waiting[request_id]
        return Answer(logits, self._record(flow, len(inputs), received_bytes))

    def deliver(self, sender_id: str, message: Message) -> None:
        """Take a message of a neighbour, or of this node itself; never waits."""
        flow = message.read(RequestFlow)
        is_own = sender_id == self._neighbours.node_id
        received_bytes = 0 if is_own else encode_prefix(message, sender_id).total_bytes
        if message.method == INFER:
            self._begin(flow, message.tensors["tensor"], received_bytes)
        else:
            self._finish(flow, message.tensors["tensor"], received_bytes)

    def lose(self, error: NodeLostError) -> None:
        """A neighbour is lost: requests in flight fail."""
        for future in self._waiting.values():
            if error.node_id in self._placement.node_ids and not future.done():
                future.set_exception(error)

    def _begin(self, flow: RequestFlow, inputs: Tensor, received_bytes: int) -> None:
        task = asyncio.create_task(self._visit(flow, inputs, received_bytes))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: self._fail(flow.request_id, done))

    async def _visit(self, flow: RequestFlow, inputs: Tensor, received_bytes: int) -> None:
        outputs, compute_s = await self._worker.compute(self._infer, flow.visit, inputs)
        reports = [*flow.reports, VisitReport(compute_s, received_bytes)]
        onward = RequestFlow(flow.request_id, flow.visit + 1, reports)
        if onward.visit < len(self._placement):
            next_id = self._placement.visits[onward.visit].node_id
            await self._pass_on(next_id, Message.of(INFER, onward, kind="activations", tensors={"tensor": outputs}))
        else:
            await self._pass_on(self._placement.start_id, Message.of(ANSWER, onward, tensors={"tensor": outputs}))

    def _infer(self, visit: int, inputs: Tensor) -> tuple[Tensor, float]:
        segment = self._placement.visits[visit].segment
        began_s = time.perf_counter()
        outputs = self._stage.infer(segment, inputs).cpu()
        self._worker.meter.add_flops(forward_flops(self._shape.seeing(inputs.shape[1]), segment, len(inputs)))
        return outputs, time.perf_counter() - began_s

    async def _pass_on(self, node_id: str, message: Message) -> None:
        if node_id == self._neighbours.node_id:
            self.deliver(node_id, message)
        else:
            await self._neighbours.send(node_id, message)

    def _finish(self, flow: RequestFlow, logits: Tensor, received_bytes: int) -> None:
        future = self._waiting.get(flow.request_id)
        if future is not None and not future.done():
            future.set_result((flow, logits, received_bytes))

    def _fail(self, request_id: str, task: asyncio.Task[None]) -> None:
        future = self._waiting.get(request_id)
        problem = None if task.cancelled() else task.exception()
        if problem is not None and future is not None and not future.done():
            future.set_exception(problem)

    def _record(self, flow: RequestFlow, num_inputs: int, received_bytes: int) -> RequestRecord:
        hops = request_hops(self._placement, flow.reports, received_bytes, self._link_to)
        links = [hop.link_s for hop in hops if hop.receiver_id is not None]
        t_ul_s, t_dl_s = (links[0], links[-1]) if len(links) > 1 else (0.0, 0.0)
        t_inference_s = sum(hop.compute_s + hop.link_s for hop in hops) - t_ul_s - t_dl_s
        return RequestRecord(
            flow.request_id, self._cluster_id, num_inputs, t_ul_s, t_inference_s, t_dl_s, tuple(hops), (), time.time()
        )


def request_hops(placement: Placement, reports: Sequence[VisitReport], answer_bytes: int, link_to: LinkTo) -> list[Hop]:
    """What each visit of a request computed and sent on.

    Args:
        answer_bytes: what brought the answer back to the start device; 0 where the head is there.
    """
    receivers = [*(visit.node_id for visit in placement.visits[1:]), placement.start_id]
    sent = [*(report.received_bytes for report in reports[1:]), answer_bytes]
    hops = []
    for visit, report, receiver, num_bytes in zip(placement, reports, receivers, sent, strict=True):
        link = link_to(visit.node_id, receiver)
        link_s, where = (link.seconds(num_bytes), receiver) if link else (0.0, None)
        hops.append(Hop(visit.node_id, str(visit.segment), report.compute_s, where, num_bytes, link_s))
    return hops
