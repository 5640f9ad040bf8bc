"""The books of what was served: nodes keep their windows of serving until an edge writes them down."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress

import msgspec

from ecogen.errors import TransportError
from ecogen.node.context import BOOKS, NodeContext
from ecogen.records import Usage
from ecogen.runtime.membership import Members
from ecogen.runtime.outbox import Outbox
from ecogen.runtime.worker import Worker
from ecogen.serving.books import Books
from ecogen.serving.tally import Tally
from ecogen.transport.base import Message, Transport

logger = logging.getLogger(__name__)

_LOOK_S = 5.0
_ANSWER_S = 2.0  # of a device, and of the cloud
_HAND_IN_S = 2 * _ANSWER_S + 2.0  # of an edge, which waits for both


class HandedIn(msgspec.Struct, frozen=True):
    """Device to edge: what serving took since the last time, in contiguous windows but for what else was done."""

    usages: tuple[Usage, ...]


class ServingWindows:
    """One node's that are in no record yet. Whatever else it reports, such as a delivery, begins where one ends."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._ended: list[Usage] = []

    def end(self, held_bytes: int = 0) -> None:
        """Up to now it served.

        Args:
            held_bytes: as `Worker.usage` has it.
        """
        self._ended.append(self._worker.usage("serving", held_bytes))

    def take(self, held_bytes: int = 0) -> tuple[Usage, ...]:
        """All up to now, for a record."""
        self.end(held_bytes)
        ended, self._ended = self._ended, []
        return tuple(ended)


class BooksOfEdge:
    """What an edge and its devices served, written down when it is time; a lost device's is lost with it.

    Args:
        outbox: takes the records to the cloud.
        every_s: for so long what is served is one record.
    """

    def __init__(self, context: NodeContext, members: Members, outbox: Outbox, every_s: float) -> None:
        self._transport, self._members, self._outbox = context.transport, members, outbox
        self._every_s = every_s
        self._windows, self._books = ServingWindows(context.worker), Books(context.node_id, every_s)
        self._writing = asyncio.Lock()

    def count(self, tally: Tally, energy_j: float) -> None:
        """A request has ended."""
        self._books.count(tally, energy_j)

    @property
    def has_news(self) -> bool:
        """Whether a request has ended since they were written last."""
        return self._books.has_news

    def end_window(self) -> None:
        """Up to now the edge itself served; what it does next is something else."""
        self._windows.end()

    async def keep(self) -> None:
        """Forever: write a record when it is time for one."""
        while True:
            await asyncio.sleep(min(_LOOK_S, self._every_s))
            if self._books.is_due:
                await self._write()

    async def hand_in(self) -> None:
        """Write a record now, and give the cloud a moment to have it."""
        await self._write()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._outbox.flush(), _ANSWER_S)

    async def _write(self) -> None:
        async with self._writing:
            found = await asyncio.gather(*map(self._usages_of, self._members.ready_ids), return_exceptions=True)
            _log_lost(found)
            usages = [usage for one in found if isinstance(one, HandedIn) for usage in one.usages]
            self._outbox.put(self._books.close([*self._windows.take(), *usages]))

    async def _usages_of(self, device_id: str) -> HandedIn:
        ask = Message.of(BOOKS, counted=False)
        reply = await self._transport.call(device_id, ask, timeout_s=_ANSWER_S)
        return reply.read(HandedIn)


async def hand_in_books(transport: Transport, edge_ids: Iterable[str]) -> None:
    """Have every edge that answers write down what it has served since the last time."""
    ask = Message.of(BOOKS, counted=False)
    calls = [transport.call(edge_id, ask, timeout_s=_HAND_IN_S) for edge_id in edge_ids]
    _log_lost(await asyncio.gather(*calls, return_exceptions=True))  # who is away does so when it is time


def _log_lost(found: Iterable[object]) -> None:
    """Say who did not answer; what is no such thing is a mistake of ours."""
    for problem in found:
        if isinstance(problem, TransportError):
            logger.info("its books are not here: %s", problem)
        elif isinstance(problem, BaseException):
            logger.error("books could not be handed in", exc_info=problem)
