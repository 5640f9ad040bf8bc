"""The gateway: gives requests to edges, the one with the fewest first, and to another where one is lost meanwhile."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from itertools import count

from ecogen.errors import NodeLostError, TransportError, UnknownModelError
from ecogen.serving.desk import CANCEL, GENERATE, Cancel, Generate, News
from ecogen.serving.generation import Finish, GenerationRequest, ServedModel
from ecogen.serving.sampling import Chosen
from ecogen.transport.base import Message, Stream, Transport
from ecogen.transport.failures import rebuild

logger = logging.getLogger(__name__)


@dataclass
class _Edge:
    """One edge, and what it is answering."""

    node_id: str
    stream: Stream | None = None
    answers: dict[str, asyncio.Queue[News | NodeLostError]] = field(default_factory=dict)
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    pump: asyncio.Task[None] | None = None
    lost_s: float = -1e9


class Gateway:
    """Serves what several edges serve; see `generation.Serving`.

    Args:
        transport: the operator's, which knows where the edges are.
        model: what they serve.
        patience_s: how long a request waits for an edge.
        check: raises what made a node fail for good, if one did.
    """

    def __init__(
        self,
        transport: Transport,
        edge_ids: Sequence[str],
        model: ServedModel,
        patience_s: float = 30.0,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._transport, self._model, self._patience_s, self._check = transport, model, patience_s, check
        self._edges = [_Edge(edge_id) for edge_id in edge_ids]
        self._name, self._numbers = secrets.token_hex(4), count()

    def models(self, tenant: str | None = None) -> Sequence[ServedModel]:
        """What may be asked for."""
        return [self._model]

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chosen | Finish]:
        """The answer's tokens and what it took, from whichever edge; see `Serving.generate`."""
        if request.model not in {model.name for model in self.models(request.tenant)}:
            raise UnknownModelError(f"there is no model {request.model!r}; GET /v1/models lists those there are")
        given: list[int] = []
        deadline_s = time.monotonic() + self._patience_s
        while True:
            edge = min(self._edges, key=lambda edge: (time.monotonic() - edge.lost_s < 2, len(edge.answers)))
            try:
                async with aclosing(self._ask(edge, request, tuple(given))) as answer:
                    async for one in answer:
                        if isinstance(one, Chosen):
                            given.append(one.token)
                            deadline_s = time.monotonic() + self._patience_s
                        yield one
                return
            except NodeLostError:
                edge.lost_s = time.monotonic()
                self._check()
                if time.monotonic() > deadline_s:
                    raise
                await asyncio.sleep(0.2)

    async def close(self) -> None:
        """Leave all edges."""
        for edge in self._edges:
            if edge.pump is not None:
                edge.pump.cancel()
            if edge.stream is not None:
                with suppress(TransportError):
                    await edge.stream.close()

    async def _ask(
        self, edge: _Edge, request: GenerationRequest, given: tuple[int, ...]
    ) -> AsyncGenerator[Chosen | Finish]:
        """The rest of an answer from one edge.

        Raises:
            NodeLostError: if the edge is lost.
        """
        request_id = f"{self._name}-{next(self._numbers)}"
        news = edge.answers[request_id] = asyncio.Queue()
        ended = False
        try:
            stream = await self._stream(edge)
            await stream.send(Message.of(GENERATE, Generate(request_id, request, given), kind="activations"))
            while not ended:
                one = await news.get()
                ended = isinstance(one, NodeLostError) or one.chosen is None
                yield _said(one)
        except TransportError:
            ended = True
            raise
        finally:
            edge.answers.pop(request_id, None)
            if not ended and edge.stream is not None:
                with suppress(TransportError):
                    await edge.stream.send(Message.of(CANCEL, Cancel(request_id)))

    async def _stream(self, edge: _Edge) -> Stream:
        async with edge.opening:
            if edge.stream is None:
                edge.stream = await self._transport.open(edge.node_id)
                edge.pump = asyncio.create_task(self._pump(edge, edge.stream))
            return edge.stream

    async def _pump(self, edge: _Edge, stream: Stream) -> None:
        """Give each answer its news, until the stream ends."""
        problem = NodeLostError(edge.node_id, "it stopped")
        try:
            while (message := await stream.receive()) is not None:
                news = message.read(News)
                if answer := edge.answers.get(news.request_id):
                    answer.put_nowait(news)
        except TransportError as lost:
            problem = NodeLostError(edge.node_id, str(lost))
        finally:
            if edge.answers:
                logger.warning("%s; %d requests go on elsewhere", problem, len(edge.answers))
            edge.stream = None
            for answer in edge.answers.values():
                answer.put_nowait(problem)


def _said(one: News | NodeLostError) -> Chosen | Finish:
    """What came, or its error."""
    if isinstance(one, NodeLostError):
        raise one
    if one.failure is not None:
        raise rebuild(one.failure)
    said = one.chosen or one.finish
    assert said is not None
    return said
