"""The gateway: gives requests to edges, the one with the fewest first, and to another where one is lost meanwhile
or cannot answer.

It also says which version of an adapter a name means. A version is given to all edges first, and by them to all stages
that there are; those that come later hold it before they serve. Only then does the name mean it, for requests that come
from then on. Those before it end on theirs.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count

from ecogen.errors import (
    CheckpointError,
    NodeLostError,
    ServingError,
    TransportError,
    UnavailableError,
    UnknownModelError,
)
from ecogen.models.mixed_lora import Adapter
from ecogen.serving.balance import Balancer
from ecogen.serving.desk import CANCEL, GENERATE, STOP, AllNews, Cancel, Generate, News, Stop
from ecogen.serving.generation import Finish, GenerationRequest, ServedModel
from ecogen.serving.loading import DRAIN, DROP, HOLDS, Drain, Drop, Held, Holds, parts_of
from ecogen.serving.sampling import Chosen
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
    giving: asyncio.Lock = field(default_factory=asyncio.Lock)  # an adapter's parts come one after the other
    pump: asyncio.Task[None] | None = None
    lost_s: float = -1e9
    unable_s: dict[str, float] = field(default_factory=dict)  # when it could not answer, by adapter
    is_away: bool = False  # as far as the cloud knows
    is_out: bool = False
    has_none: asyncio.Event = field(default_factory=asyncio.Event)  # no answers; set for those who wait for it


@dataclass(eq=False)
class _Version:
    """What a name means, or meant: an adapter, or the backbone alone."""

    served: ServedModel
    tenant: str | None = None
    adapter_id: str = ""
    adapter: Adapter | None = None
    num_users: int = 0
    is_retired: bool = False


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
        self._backbone = _Version(model)
        self._versions: dict[tuple[str | None, str], _Version] = {(None, model.name): self._backbone}
        self._retired: set[_Version] = set()
        self._publishing: defaultdict[str | None, asyncio.Lock] = defaultdict(asyncio.Lock)  # of each tenant
        self._coming: set[_Version] = set()
        self._balancer: Balancer[int] = Balancer()
        self._name, self._numbers = secrets.token_hex(4), count()
        self._drops: set[asyncio.Task[None]] = set()

    # Models.

    def models(self, tenant: str | None = None) -> Sequence[ServedModel]:
        """Those that a tenant may ask for, the backbone first."""
        return [version.served for version in self._versions.values() if version.tenant in (None, tenant)]

    async def put_adapter(self, name: str, adapter: Adapter, tenant: str | None = None) -> None:
        """Add an adapter under a name, or replace the one that has it.

        An edge that is lost gets it when it is back, and one whose devices are away keeps it for them.

        Args:
            tenant: who alone may ask for it; None for all.

        Raises:
            ServingError: if the name is the backbone's.
            CheckpointError: if it does not fit the model; then all is as it was.
            NodeLostError: if no edge is here; then too.
            UnavailableError: if none has devices that hold the model, so that nobody sees whether it fits; then too.
        """
        async with self._publishing[tenant]:
            backbone = self._backbone.served
            if name == backbone.name:
                raise ServingError(f"the name {name!r} is the backbone's; choose another")
            old = self._versions.get((tenant, name))
            served = ServedModel(name, time.time(), backbone.max_tokens, backbone.name, tenant, adapter.nbytes)
            version = _Version(served, tenant, f"{self._name}-{next(self._numbers)}", adapter)
            self._coming.add(version)
            try:
                await self._give_all(version)
            except Exception:
                await self._drop(version)
                raise
            finally:
                self._coming.discard(version)
            self._versions[tenant, name] = version
            if old is not None:
                self._retire(old)

    async def remove_adapter(self, name: str, tenant: str | None = None) -> None:
        """No request may name it any more; those that did end on it.

        Raises:
            UnknownModelError: if the tenant has no such adapter.
        """
        async with self._publishing[tenant]:
            version = self._versions.get((tenant, name))
            if version is None or version is self._backbone:
                raise UnknownModelError(f"there is no adapter {name!r}")
            self._retire(self._versions.pop((tenant, name)))

    def _version(self, name: str, tenant: str | None) -> _Version:
        """A tenant's own of that name, or else the one for all."""
        version = self._versions.get((tenant, name)) or self._versions.get((None, name))
        if version is None:
            raise UnknownModelError(f"there is no model {name!r}; GET /v1/models lists those there are")
        return version

    async def _give_all(self, version: _Version) -> None:
        """Bring an adapter to all edges that are here; devices of one at least must hold it, to see that it fits."""
        deadline_s = time.monotonic() + self._patience_s
        are_held = await self._ask_all(lambda edge: self._give(edge, version))
        while not any(are_held):
            if time.monotonic() > deadline_s:
                raise UnavailableError("no devices hold the model now, to see whether the adapter fits; try again")
            await asyncio.sleep(_PAUSE_S)
            are_held = await self._ask_all(lambda edge: self._has(edge, version))

    async def _ask_all(self, ask: Callable[[_Edge], Awaitable[bool]]) -> list[bool]:
        """What the edges say that are here, one at least."""
        told = await asyncio.gather(*map(ask, self._edges), return_exceptions=True)
        problems = [one for one in told if isinstance(one, BaseException)]
        others = [problem for problem in problems if not isinstance(problem, NodeLostError)]
        if others or len(problems) == len(self._edges):
            raise (others or problems)[0]
        return [one for one in told if not isinstance(one, BaseException)]

    async def _give(self, edge: _Edge, version: _Version) -> bool:
        """Bring an adapter to an edge, which keeps it and brings it to its stages; whether some hold it."""
        assert version.adapter is not None
        is_held = False
        async with edge.giving:
            for message in parts_of(version.adapter_id, version.adapter):
                is_held = (await self._transport.call(edge.node_id, message)).read(Held).is_held
        return is_held

    async def _has(self, edge: _Edge, version: _Version) -> bool:
        """Whether devices of an edge that was given an adapter hold it by now."""
        reply = await self._transport.call(edge.node_id, Message.of(HOLDS, Holds(version.adapter_id)))
        return reply.read(Held).is_held

    def _retire(self, version: _Version) -> None:
        version.is_retired = True
        if version.num_users:
            self._retired.add(version)
        else:
            self._start_drop(version)

    def _start_drop(self, version: _Version) -> None:
        task = asyncio.create_task(self._drop(version))
        self._drops.add(task)
        task.add_done_callback(self._drops.discard)

    async def _drop(self, version: _Version) -> None:
        drop = Message.of(DROP, Drop(version.adapter_id))
        drops = (self._transport.call(edge.node_id, drop) for edge in self._edges)
        for problem in await asyncio.gather(*drops, return_exceptions=True):
            if isinstance(problem, TransportError):
                logger.warning("%s", problem)  # what it is when it comes back holds nothing

    @contextmanager
    def _using(self, version: _Version) -> Iterator[None]:
        version.num_users += 1
        try:
            yield
        finally:
            version.num_users -= 1
            if version in self._retired and not version.num_users:
                self._retired.discard(version)
                self._start_drop(version)

    # Requests.

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chosen | Finish, bool | None]:
        """The answer's tokens and what it took, from whichever edge; see `Serving.generate`."""
        version = self._version(request.model, request.tenant)
        given: list[int] = []
        deadline_s, is_stopped = time.monotonic() + self._patience_s, None
        unable: list[_Edge] = []
        with self._using(version):
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
                    edge.unable_s[version.adapter_id] = time.monotonic()
                    unable.append(edge)
                    if not any(other not in unable and not other.is_away for other in self._own()):
                        raise

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
        for task in (*self._drops, *(edge.pump for edge in self._edges if edge.pump)):
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
                    await self._give_known(edge)
                except BaseException:  # whoever asked may have left
                    await _close(stream)
                    raise
                edge.stream, edge.pump = stream, asyncio.create_task(self._pump(edge, stream))
            return edge.stream

    async def _give_known(self, edge: _Edge) -> None:
        """Bring an edge what it may be asked for now, and soon; whether the latter fits, whoever brings it is told.

        What it cannot hold it says again to those who ask for it, and others do not wait for that.
        """
        known, coming = [*self._versions.values(), *self._retired], [*self._coming]
        for version in known:
            if version.adapter is not None:
                try:
                    await self._give(edge, version)
                except CheckpointError as problem:
                    logger.warning("%s cannot hold %s: %s", edge.node_id, version.served.name, problem)
        for version in coming:
            with suppress(CheckpointError):
                await self._give(edge, version)

    async def _pump(self, edge: _Edge, stream: Stream) -> None:
        """Give each answer its news, until the stream ends."""
        problem = NodeLostError(edge.node_id, "it stopped")
        try:
            while (message := await stream.receive()) is not None:
                for news in message.read(AllNews).news:
                    if answer := edge.answers.get(news.request_id):
                        answer.put_nowait(news)
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
        await asyncio.wait_for(stream.close(), _CLOSE_S)


def _said(one: News | NodeLostError) -> Chosen | Finish:
    """What came, or its error."""
    if isinstance(one, NodeLostError):
        raise one
    if one.failure is not None:
        raise rebuild(one.failure)
    said = one.chosen or one.finish
    assert said is not None
    return said
