"""The books of what was served: nodes keep their windows of serving until an edge writes them down."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

import msgspec

from ecogen.errors import TransportError
from ecogen.node.context import BOOKS
from ecogen.records import Usage
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message, Transport

logger = logging.getLogger(__name__)

_HAND_IN_S = 4.0


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


async def hand_in_books(transport: Transport, edge_ids: Iterable[str]) -> None:
    """Have every edge that answers write down what it has served since the last time."""
    ask = Message.of(BOOKS, counted=False)
    calls = [transport.call(edge_id, ask, timeout_s=_HAND_IN_S) for edge_id in edge_ids]
    for problem in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(problem, TransportError):
            logger.info("%s", problem)  # who is away does so when it is time
