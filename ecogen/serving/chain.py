"""A cluster's chain as its edge sees it: sends steps to the first device, and hears from the last what was chosen."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from ecogen.errors import NodeLostError, ServingError
from ecogen.placement import Placement
from ecogen.runtime.neighbours import Neighbours
from ecogen.serving.sampling import Chosen
from ecogen.serving.steps import CHOSEN, LOST, STEP, Lost, Order, StepFlow, StepResult, Visited, size_of
from ecogen.serving.tally import Tally
from ecogen.transport.base import Message


class ServedChain:
    """One chain, from the moment its devices hold it until one of them is lost.

    Args:
        number: of the chain; what is said of an earlier one is not heard.
        tallies: what each request took, by its id; added to with every step.
    """

    def __init__(self, number: int, placement: Placement, neighbours: Neighbours, tallies: Mapping[str, Tally]) -> None:
        self.number, self.placement = number, placement
        self._neighbours, self._tallies = neighbours, tallies
        self._waiting: dict[int, asyncio.Future[tuple[StepResult, int]]] = {}
        self.lost: asyncio.Future[NodeLostError] = asyncio.get_running_loop().create_future()

    async def run(self, order: Order) -> Sequence[Chosen | str]:
        """Send a step through all stages; gives what the last one chose.

        Raises:
            NodeLostError: if a device is lost meanwhile.
            ServingError: if a stage fails.
        """
        result, received_bytes = await self._pass(order)
        self._count(order, result, received_bytes)
        self._check(result)
        return result.chosen

    async def visits_of(self, order: Order) -> Sequence[Visited]:
        """Send a step of no request through all stages; gives what each visit took.

        Raises:
            NodeLostError: if a device is lost meanwhile.
            ServingError: if a stage fails.
        """
        result, _ = await self._pass(order)
        self._check(result)
        return result.visits

    def _check(self, result: StepResult) -> None:
        if len(result.visits) < len(self.placement):
            raise ServingError("; ".join(sorted({str(problem) for problem in result.chosen})))

    async def _pass(self, order: Order) -> tuple[StepResult, int]:
        if self.lost.done():
            raise self.lost.result()
        group = order.step.group
        future: asyncio.Future[tuple[StepResult, int]] = asyncio.get_running_loop().create_future()
        self._waiting[group] = future
        try:
            await self._neighbours.send(self.placement.start_id, Message.of(STEP, StepFlow(self.number, order)))
            return await future
        except NodeLostError as problem:
            self.lose(problem)
            raise
        finally:
            del self._waiting[group]

    def deliver(self, message: Message) -> None:
        """Take what a device says."""
        if message.method == CHOSEN:
            result = message.read(StepResult)
            future = self._waiting.get(result.group)
            if result.chain == self.number and future is not None and not future.done():
                future.set_result((result, size_of(message)))
        elif message.method == LOST:
            lost = message.read(Lost)
            if lost.chain == self.number:
                self.lose(NodeLostError(lost.node_id, lost.reason))

    def lose(self, problem: NodeLostError) -> None:
        """A device is lost, and with it the chain."""
        if problem.node_id in self.placement.node_ids and not self.lost.done():
            self.lost.set_result(problem)
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(problem)

    def _count(self, order: Order, result: StepResult, received_bytes: int) -> None:
        """Each row took its share of every visit, by its tokens: all rows of a step have as many."""
        share = 1 / len(order.step.requests)
        received = [*(visit.received_bytes for visit in result.visits[1:]), received_bytes]
        for request_id in order.step.requests:
            if tally := self._tallies.get(request_id):
                tally.count_step(self.placement, result.visits, received, share)
