"""The gateway: gives requests to edges, the one with the fewest first, and to another where one is lost meanwhile
or cannot answer. What the names of models mean is in `versions`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from itertools import count

from ecogen.errors import NodeLostError, ServingError, TransportError, UnavailableError
from ecogen.serving.balance import Balancer
from ecogen.serving.desk import CANCEL, GENERATE, STOP, AllNews, Cancel, Generate, News, Stop, one_by_one
from ecogen.serving.generation import Finish, GenerationRequest, ServedModel
from ecogen.serving.loading import DRAIN, Drain
from ecogen.serving.sampling import Chosen
from ecogen.serving.versions import Versions
from ecogen.transport.base import Message, Stream, Transport
from ecogen.transport.failures import rebuild

_CLOSE_S = 2.0
_PAUSE_S = 0.2
_AWAY_S = 2.0
"""For so long an edge that was lost is asked only if there is no other."""

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Edge:
    """One edge, and what it is answering."""

    node_id: str
    stream: Stream | None = None
    answers: dict[str, asyncio.Queue[News | NodeLostError]] = field(default_factory=dict)
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    pump: asyncio.Task[None] | None = None
    lost_s: float = -1e9
    unable_s: dict[str, float] = field(default_factory=dict)  # when it could not answer, by adapter
    is_away: bool = False  # as far as the cloud knows
    is_out: bool = False
    has_none: asyncio.Event = field(default_factory=asyncio.Event)  # no answers; set for those who wait for it


class Gateway:
    """Serves what several edges serve; see `generation.Serving`.

    Args:
        transport: the operator's, which knows where the edges are.
        model: what they serve.
        patience_s: how long a request waits for an edge.
        is_given_up: whether an edge has failed for good.
    """

    def __init__(
        self,
        transport: Transport,
        edge_ids: Sequence[str],
        model: ServedModel,
        patience_s: float = 30.0,
        is_given_up: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._transport, self._patience_s, self._is_given_up = transport, patience_s, is_given_up
        self._edges = [_Edge(edge_id) for edge_id in edge_ids]
        self.versions = Versions(transport, edge_ids, model, patience_s)
        self._balancer: Balancer[int] = Balancer()
        self._name, self._numbers = secrets.token_hex(4), count()

    def models(self, tenant: str | None = None) -> Sequence[ServedModel]:
        """Those that a tenant may ask for, the backbone first."""
        return self.versions.models(tenant)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chosen | Finish, bool | None]:
        """The answer's tokens and what it took, from whichever edge; see `Serving.generate`."""
        version = self.versions.find(request.model, request.tenant)
        given: list[int] = []
        deadline_s, is_stopped = time.monotonic() + self._patience_s, None
        unable: list[_Edge] = []
        with self.versions.using(version):
            while not is_stopped:  # an edge that is lost after that cannot say any more what it took
                edge = self._choose(request, version.adapter_id, unable)
                try:
                    async with aclosing(self._ask(edge, request, version.adapter_id, tuple(given))) as answer:
                        one = await anext(answer)
                        while isinstance(one, Chosen):
                            given.append(one.token)
                            deadline_s = time.monotonic() + self._patience_s
                            is_stopped = yield one
                            one = await answer.asend(is_stopped)
                        yield one
                    return
                except NodeLostError:
                    edge.lost_s = time.monotonic()
                    if time.monotonic() > deadline_s:
                        raise
                    await asyncio.sleep(_PAUSE_S)
                except UnavailableError:
                    self._note_unable(edge, version.adapter_id)
                    unable.append(edge)
                    if not any(other not in unable and not other.is_away for other in self._own()):
                        raise

    def _note_unable(self, edge: _Edge, adapter_id: str) -> None:
        """Keep when an edge could not answer with an adapter, for as long as that tells anything."""
        now_s = time.monotonic()
        kept = {key: then_s for key, then_s in edge.unable_s.items() if now_s - then_s <= self._patience_s}
        edge.unable_s = kept | {adapter_id: now_s}

    def _own(self) -> list[_Edge]:
        """Those that requests may be given to.

        Raises:
            UnavailableError: if all others have failed for good.
        """
        kept = [edge for edge in self._edges if not self._is_given_up(edge.node_id)]
        if not kept:
            gone = ", ".join(edge.node_id for edge in self._edges)
            raise UnavailableError(f"no edge is left: {gone} failed for good; the server's log says why")
        return [edge for edge in kept if not edge.is_out] or kept

    def _choose(self, request: GenerationRequest, adapter_id: str, unable: Collection[_Edge]) -> _Edge:
        """One that is not being drained, and where nothing tells that it cannot answer now, where there is one.

        Args:
            unable: those that could not answer this request.

        Raises:
            UnavailableError: as `_own`.
        """
        now_s = time.monotonic()
        signs: list[Callable[[_Edge], bool]] = [
            lambda edge: not edge.is_away,
            lambda edge: edge not in unable,
            lambda edge: now_s - edge.lost_s > _AWAY_S,
            lambda edge: now_s - edge.unable_s.get(adapter_id, -1e9) > self._patience_s,
        ]
        here = self._own()
        for is_good in signs:
            here = [edge for edge in here if is_good(edge)] or here
        loads = {self._edges.index(edge): len(edge.answers) for edge in here}
        return self._edges[self._balancer.choose(loads, request.prompt, adapter_id)]

    def note_away(self, node_ids: Collection[str]) -> None:
        """Ask these edges only if there is no other: who knows them has not heard of them for a while."""
        for edge in self._edges:
            edge.is_away = edge.node_id in node_ids

    async def drain(self, node_id: str, *, is_out: bool = True) -> None:
        """Give an edge no more requests, or have a device hold nothing, without an error to anybody; or undo that.

        Of an edge, returns when it has answered what it had. A device's work goes on on the others of its cluster.

        Raises:
            PlacementError: if the other devices cannot hold the model.
            ServingError: if there is no such node, or no other edge.
        """
        edge = next((edge for edge in self._edges if edge.node_id == node_id), None)
        if edge is None:
            await self._drain_device(node_id, is_out)
            return
        if is_out and all(other.is_out for other in self._edges if other is not edge):
            raise ServingError(f"{node_id} is the only edge that serves; it cannot be drained")
        edge.is_out = is_out
        if is_out and edge.answers:
            edge.has_none.clear()
            await edge.has_none.wait()

    async def _drain_device(self, node_id: str, is_out: bool) -> None:
        edge = next((edge for edge in self._edges if node_id.startswith(f"{edge.node_id}.")), None)
        if edge is None:
            raise ServingError(f"there is no node {node_id!r} here")
        await self._transport.call(edge.node_id, Message.of(DRAIN, Drain(node_id, is_out)))

    async def close(self) -> None:
        """Leave all edges."""
        self.versions.close()
        for task in (edge.pump for edge in self._edges if edge.pump):
            task.cancel()
        for edge in self._edges:
            if edge.stream is not None:
                await _close(edge.stream)

    async def _ask(
        self, edge: _Edge, request: GenerationRequest, adapter_id: str, given: tuple[int, ...]
    ) -> AsyncGenerator[Chosen | Finish, bool | None]:
        """The rest of an answer from one edge.

        Raises:
            NodeLostError: if the edge is lost.
        """
        request_id = f"{self._name}-{next(self._numbers)}"
        news = edge.answers[request_id] = asyncio.Queue()
        ended = False
        try:
            stream = await self._stream(edge)
            order = Generate(request_id, request, adapter_id, given)
            await stream.send(Message.of(GENERATE, order, kind="activations"))
            is_stopped = None
            while not ended:
                one = await news.get()
                ended = isinstance(one, NodeLostError) or one.chosen is None
                if ended or not is_stopped:
                    is_stopped = yield _said(one)
                    if is_stopped and not ended:
                        await stream.send(Message.of(STOP, Stop(request_id)))
        except TransportError:
            ended = True
            raise
        finally:
            edge.answers.pop(request_id, None)
            if not edge.answers:
                edge.has_none.set()
            if not ended and edge.stream is not None:
                with suppress(TransportError):
                    await edge.stream.send(Message.of(CANCEL, Cancel(request_id)))

    async def _stream(self, edge: _Edge) -> Stream:
        """The stream to an edge; one that was started anew is given all adapters first."""
        async with edge.opening:
            if edge.stream is None:
                stream = await self._transport.open(edge.node_id)
                try:
                    await self.versions.give_known(edge.node_id)
                except BaseException:  # whoever asked may have left
                    await _close(stream)
                    raise
                edge.stream, edge.pump = stream, asyncio.create_task(self._pump(edge, stream))
            return edge.stream

    async def _pump(self, edge: _Edge, stream: Stream) -> None:
        """Give each answer its news, until the stream ends."""
        problem = NodeLostError(edge.node_id, "it stopped")
        try:
            while (message := await stream.receive()) is not None:
                for news in message.read(AllNews).news:
                    if answer := edge.answers.get(news.request_id):
                        for one in one_by_one(news):
                            answer.put_nowait(one)
            await stream.close()  # the edge has closed its end
        except TransportError as lost:
            problem = NodeLostError(edge.node_id, str(lost))
        finally:
            if edge.answers:
                logger.warning("%s; %d requests go on elsewhere", problem, len(edge.answers))
            edge.stream = None
            for answer in edge.answers.values():
                answer.put_nowait(problem)


async def _close(stream: Stream) -> None:
    with suppress(TransportError, TimeoutError):
        async with asyncio.timeout(_CLOSE_S):  # `wait_for` would forget of being cancelled if it closes now
            await stream.close()


def _said(one: News | NodeLostError) -> Chosen | Finish:
    """What came, or its error."""
    if isinstance(one, NodeLostError):
        raise one
    if one.failure is not None:
        raise rebuild(one.failure)
    said = one.chosen or one.finish
    assert said is not None
    return said
