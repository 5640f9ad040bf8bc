"""Where an edge takes requests: one stream to a gateway carries many of them, and their tokens back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec

from ecogen.errors import EcoGenError, NodeLostError, TransportError
from ecogen.serving.generation import Finish, GenerationRequest
from ecogen.serving.sampling import Chosen
from ecogen.transport.base import Message, Peer, Stream
from ecogen.transport.failures import Failure, failure_of, internal_error

logger = logging.getLogger(__name__)

GENERATE, STOP, CANCEL, NEWS = "generate", "stop", "cancel", "news"


class Generate(msgspec.Struct, frozen=True):
    """Gateway to edge: answer this.

    Attributes:
        adapter_id: which of those that it was given; empty for none.
        given: the answer's first tokens, where another edge had begun it.
    """

    request_id: str
    request: GenerationRequest
    adapter_id: str = ""
    given: tuple[int, ...] = ()


class Stop(msgspec.Struct, frozen=True):
    """Gateway to edge: of this answer no more tokens are needed; what did it take?"""

    request_id: str


class Cancel(msgspec.Struct, frozen=True):
    """Gateway to edge: nobody reads this answer any more."""

    request_id: str


class News(msgspec.Struct, frozen=True):
    """Edge to gateway, of one answer: its next token; or what it took, in the end; or why it ends."""

    request_id: str
    chosen: Chosen | None = None
    finish: Finish | None = None
    failure: Failure | None = None


Answer = Callable[[Generate], AsyncGenerator[Chosen | Finish, bool | None]]
"""Answers one request."""


class Desk:
    """One gateway's stream.

    Args:
        answer: what serves.
    """

    def __init__(self, peer: Peer, stream: Stream, answer: Answer) -> None:
        self._peer, self._stream, self._answer = peer, stream, answer
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stopped: set[str] = set()

    async def run(self) -> None:
        """Take requests until the gateway leaves; what it asked for then ends."""
        try:
            while (message := await self._stream.receive()) is not None:
                self._take(message)
        except NodeLostError:
            logger.info("gateway %s left", self._peer.node_id)
        finally:
            for task in list(self._tasks.values()):
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _take(self, message: Message) -> None:
        if message.method == GENERATE:
            wanted = message.read(Generate)
            task = asyncio.create_task(self._serve(wanted))
            self._tasks[wanted.request_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(wanted.request_id, None))
        elif message.method == STOP:
            self._stopped |= {message.read(Stop).request_id} & self._tasks.keys()
        elif message.method == CANCEL and (task_of := self._tasks.get(message.read(Cancel).request_id)):
            task_of.cancel()

    async def _serve(self, wanted: Generate) -> None:
        request_id = wanted.request_id
        try:
            async with aclosing(self._answer(wanted)) as answer:
                one = await anext(answer)
                while isinstance(one, Chosen):
                    is_stopped = request_id in self._stopped
                    if not is_stopped:
                        await self._tell(News(request_id, one))
                    one = await answer.asend(is_stopped)
                await self._tell(News(request_id, finish=one))
        except TransportError:
            return  # the gateway is gone
        except EcoGenError as problem:
            await self._tell_failure(request_id, problem)
        except Exception:
            logger.exception("request %s failed", request_id)
            await self._tell_failure(request_id, internal_error("the request"))
        finally:
            self._stopped.discard(request_id)

    async def _tell_failure(self, request_id: str, problem: EcoGenError) -> None:
        try:
            await self._tell(News(request_id, failure=failure_of(problem)))
        except TransportError:
            logger.info("gateway %s left", self._peer.node_id)

    async def _tell(self, news: News) -> None:
        await self._stream.send(Message.of(NEWS, news, kind="activations"))
