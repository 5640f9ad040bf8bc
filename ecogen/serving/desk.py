"""Where an edge takes requests: one stream to a gateway carries many of them, and their tokens back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, suppress

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


class News(msgspec.Struct, frozen=True, omit_defaults=True):
    """Edge to gateway, of one answer: its next token; or all of them; or what it took, in the end; or why it ends."""

    request_id: str
    whole: tuple[Chosen, ...] = ()
    chosen: Chosen | None = None
    finish: Finish | None = None
    failure: Failure | None = None


def one_by_one(news: News) -> Iterator[News]:
    """News as they would be if no tokens had come together."""
    for chosen in news.whole:
        yield News(news.request_id, chosen=chosen)
    yield msgspec.structs.replace(news, whole=()) if news.whole else news


class AllNews(msgspec.Struct, frozen=True):
    """Edge to gateway: what there is of all answers, in order; requests that decode together have it together."""

    news: list[News]


_ROOM = 1024
"""News that wait at most; answers wait until what is under way is read."""

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
        self._news: asyncio.Queue[News] = asyncio.Queue(_ROOM)

    async def run(self) -> None:
        """Take requests until the gateway leaves; what it asked for then ends."""
        telling = asyncio.create_task(self._tell_all())
        try:
            while (message := await self._stream.receive()) is not None:
                self._take(message)
        except NodeLostError:
            logger.info("gateway %s left", self._peer.node_id)
        finally:
            tasks = [telling, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _tell_all(self) -> None:
        """Send what there is, again and again; `run` sees it when the gateway is gone."""
        with suppress(TransportError):
            while True:
                news = [await self._news.get()]
                while not self._news.empty():
                    news.append(self._news.get_nowait())
                await self._stream.send(Message.of(NEWS, AllNews(news), kind="activations"))

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
        request_id, held = wanted.request_id, list[Chosen]()
        try:
            async with aclosing(self._answer(wanted)) as answer:
                one = await anext(answer)
                while isinstance(one, Chosen):
                    is_stopped = request_id in self._stopped
                    if wanted.request.is_whole:
                        held.append(one)
                    elif not is_stopped:
                        await self._news.put(News(request_id, chosen=one))
                    one = await answer.asend(is_stopped)
                await self._news.put(News(request_id, tuple(held), finish=one))
        except EcoGenError as problem:
            await self._news.put(News(request_id, failure=failure_of(problem)))
        except Exception:
            logger.exception("request %s failed", request_id)
            await self._news.put(News(request_id, failure=failure_of(internal_error("the request"))))
        finally:
            self._stopped.discard(request_id)
