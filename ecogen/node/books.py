"""The books of what was served: whoever wants to read them has the edges hand in theirs first."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from ecogen.errors import TransportError
from ecogen.node.context import BOOKS
from ecogen.transport.base import Message, Transport

logger = logging.getLogger(__name__)

_HAND_IN_S = 4.0


async def hand_in_books(transport: Transport, edge_ids: Iterable[str]) -> None:
    """Have every edge that answers write down what it has served since the last time."""
    ask = Message.of(BOOKS, counted=False)
    calls = [transport.call(edge_id, ask, timeout_s=_HAND_IN_S) for edge_id in edge_ids]
    for problem in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(problem, TransportError):
            logger.info("%s", problem)  # who is away does so when it is time
