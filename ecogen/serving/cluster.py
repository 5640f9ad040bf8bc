"""A cluster that serves: holds the model on the devices that are here, and again when one is lost or comes back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from ecogen.config import Serving
from ecogen.errors import (
    EcoGenError,
    NodeLostError,
    PlacementError,
    ServingError,
    TransportError,
    UnavailableError,
)
from ecogen.models.mixed_lora import Adapter
from ecogen.placement import Labels, Placement, neighbours_of, segments_held
from ecogen.planning.decoding import Weights, place_decoder, predicted_s, rates_of
from ecogen.records import Usage
from ecogen.runtime.membership import Members
from ecogen.runtime.neighbours import Neighbours
from ecogen.serving.adapters import Adapters
from ecogen.serving.chain import ServedChain
from ecogen.serving.engine import Engine
from ecogen.serving.generation import Finish, GenerationRequest
from ecogen.serving.language import LanguageModel
from ecogen.serving.loading import CONNECT, LOAD, UNLOAD, Connect, Load, Loaded
from ecogen.serving.sampling import Chosen
from ecogen.serving.stage_times import stage_times
from ecogen.serving.tally import Tally
from ecogen.topology import Cluster, Node
from ecogen.transport.base import Message, Transport

logger = logging.getLogger(__name__)

_TRIALS = 2
"""So often a chain is cut anew at most before it serves."""

_MEASURING_S = 120.0

_LEAST_S, _LEAST_SHARE = 1e-3, 0.1
"""Cutting anew is worth it where it takes so much of the slowest stage's time, in seconds and as a share."""


@dataclass(frozen=True)
class Account:
    """What an edge does with what its clusters took.

    Attributes:
        finish: makes what a reader is told in the end.
        ended: called with what each request took, answered or broken off.
        loaded: called with what it took a device to get and load what it holds.
    """

    finish: Callable[[Tally], Finish]
    ended: Callable[[Tally], None]
    loaded: Callable[[Usage], None]


class ServedCluster:
    """One cluster of an edge.

    Args:
        nodes: of the topology, by id.
        model: what is served.
        members: the edge's devices.
        labels: where the head is.
    """

    def __init__(
        self,
        cluster: Cluster,
        nodes: Mapping[str, Node],
        model: LanguageModel,
        spec: Serving,
        members: Members,
        transport: Transport,
        neighbours: Neighbours,
        account: Account,
        labels: Labels = "end",
    ) -> None:
        self._cluster, self._nodes, self._model, self._spec = cluster, nodes, model, spec
        self._members, self._transport, self._neighbours = members, transport, neighbours
        self._account, self._labels = account, labels
        max_tokens = model.max_tokens(spec.max_tokens)
        self.engine = Engine(
            slots_per_group=spec.slots,
            max_tokens=max_tokens,
            max_waiting=spec.waiting,
            chunk=spec.chunk,
            shelf=spec.shelf,
            keeps_parts=not model.has_states,
        )
        self.chain: ServedChain | None = None
        self._trial: ServedChain | None = None  # one that is measured, before it serves
        self._number = 0
        self._here_then: list[str] = []  # when it was decided where to hold the model
        self._tallies: dict[str, Tally] = {}
        self.adapters = Adapters(transport, self._refuse)
        self._turn = asyncio.Lock()  # of giving devices something to hold
        self._out: set[str] = set()  # devices that are to hold nothing
        self._rates: dict[str, float] = {}  # bytes of weights a second, by device, as they were measured last

    async def prepare(self, adapter_id: str, adapter: Adapter) -> bool:
        """Keep an adapter for whoever holds the model, now or later; whether every stage holds it now.

        Raises:
            CheckpointError: if it does not fit the model; then it is not kept.
        """
        self.adapters.keep(adapter_id, adapter)
        async with self._steady() as chain:
            if chain is None:
                return False
            try:
                await self.adapters.give(adapter_id, adapter, chain.placement)
            except NodeLostError as problem:
                chain.lose(problem)  # the next one holds it before it serves
            except EcoGenError:
                self.adapters.forget(adapter_id)
                await self.adapters.withdraw(adapter_id, chain.placement)
                raise
        return self.holds(adapter_id)

    def holds(self, adapter_id: str) -> bool:
        """Whether every stage holds an adapter.

        Raises:
            CheckpointError: if it was kept until there were some, and does not fit the model.
        """
        self.adapters.check(adapter_id)
        return adapter_id in self.adapters and self.chain is not None and not self.chain.lost.done()

    async def drop(self, adapter_id: str) -> None:
        """Have no stage hold an adapter any longer; no request names it."""
        self.adapters.forget(adapter_id)
        async with self._steady() as chain:
            if chain is not None:
                await self.adapters.withdraw(adapter_id, chain.placement)

    async def drop_all(self) -> None:
        """Have no stage hold any of the adapters that there are now."""
        await asyncio.gather(*(self.drop(adapter_id) for adapter_id in self.adapters))

    @asynccontextmanager
    async def _steady(self) -> AsyncIterator[ServedChain | None]:
        """The chain that serves, while no other is made; None at once where there is none."""
        if self.chain is None:
            yield None
            return
        async with self._turn:
            yield self.chain

    def takes(self, adapter_id: str) -> bool:
        """Whether requests may name an adapter, or none, here."""
        return not adapter_id or adapter_id in self.adapters

    def _check_taken(self, adapter_id: str) -> None:
        try:
            self.adapters.check(adapter_id)
        except EcoGenError as problem:
            raise self._refusal(problem) from problem
        if not self.takes(adapter_id):
            raise UnavailableError(f"{self.cluster_id} has no adapter {adapter_id!r}")

    def _refuse(self, adapter_id: str, problem: EcoGenError) -> None:
        """Requests that wait for an adapter end: the chain that comes serves without it."""
        self.engine.fail(self._refusal(problem), adapter_id)

    def _refusal(self, problem: EcoGenError) -> UnavailableError:
        return UnavailableError(f"{self.cluster_id} cannot hold the adapter: {problem}")

    @property
    def cluster_id(self) -> str:
        return self._cluster.cluster_id

    @property
    def room(self) -> int:
        """Requests that it answers at once."""
        return self._spec.slots * len(self._cluster.node_ids)

    async def drain(self, node_id: str, *, is_out: bool) -> None:
        """Hold nothing on a device, or do again; answers go on on the others.

        Raises:
            PlacementError: if the others cannot hold the model; then all stays as it is.
        """
        out = self._out | {node_id} if is_out else self._out - {node_id}
        others = [other for other in self._cluster.node_ids if other not in out and self._members.is_ready(other)]
        self._place(others)
        self._out = out
        await self._members.wake()

    async def unload(self) -> None:
        """Have no device hold anything; nobody asks this cluster."""
        async with self._turn:
            unloads = [self._transport.call(node_id, Message.of(UNLOAD)) for node_id in self._here()]
            for problem in await asyncio.gather(*unloads, return_exceptions=True):
                if isinstance(problem, TransportError):
                    logger.warning("%s: %s", self.cluster_id, problem)

    async def generate(
        self, request_id: str, request: GenerationRequest, adapter_id: str = "", given: Sequence[int] = ()
    ) -> AsyncGenerator[Chosen | Finish, bool | None]:
        """The answer's tokens, and what it took.

        Raises:
            ServingError: as `Engine.generate`.
            UnavailableError: if it has no such adapter.
        """
        self._check_taken(adapter_id)
        num_prompt, is_probe = len(request.prompt), request.is_probe
        tally = Tally(self._cluster.edge_id, self.cluster_id, num_prompt, goes_on=bool(given), is_probe=is_probe)
        self._tallies[request_id] = tally
        prompt, sampling, max_new, ends = request.prompt, request.sampling, request.max_new, request.ends
        try:
            answer = self.engine.generate(
                request_id, prompt, sampling, max_new=max_new, ends=ends, adapter=adapter_id, given=given
            )
            async with aclosing(answer) as tokens:
                async for chosen in tokens:
                    tally.num_tokens += 1
                    tally.num_reused = self.engine.num_reused(request_id)
                    if (yield chosen):
                        break
            yield self._account.finish(tally)
        finally:
            if self._tallies.pop(request_id).has_run:
                self._account.ended(tally)

    async def run(self) -> None:
        """Forever: serve on a chain of the devices that are here, until they are others."""
        await self._members.wait_for(
            lambda: self._members.are_ready(self._cluster.node_ids), timeout_s=self._spec.patience_s
        )
        while True:
            placement = await self._placed()
            try:
                async with self._turn:
                    self.chain = await self._held(placement)
            except TransportError as problem:
                await self._lose(problem)
                continue
            await self._serve(self.chain)

    async def _held(self, placement: Placement) -> ServedChain:
        """A chain whose devices hold the model and all adapters.

        Raises:
            TransportError: if one is lost, or cannot.
        """
        try:
            chain = await self._cut(placement)
            await self.adapters.bring(chain.placement)
            return chain
        finally:
            self._trial = None

    async def _cut(self, placement: Placement) -> ServedChain:
        """A chain that is cut so that the slowest device is as fast as it can be by what all took."""
        chain, slowest_s = await self._measured(placement)
        for _ in range(_TRIALS):
            better = self._better(chain.placement, slowest_s)
            if better is None:
                break
            logger.info("%s is cut anew: %s", self.cluster_id, "; ".join(map(str, better.visits)))
            tried, tried_s = await self._measured(better)
            if tried_s is None or slowest_s is None or tried_s > slowest_s:
                return (await self._measured(chain.placement))[0]
            chain, slowest_s = tried, tried_s
        return chain

    async def _measured(self, placement: Placement) -> tuple[ServedChain, float | None]:
        """A chain of a placement, and how long its slowest device takes in a step; None where that cannot be seen."""
        self._number += 1
        self._trial = chain = ServedChain(self._number, placement, self._neighbours, self._tallies)
        await self._hold(placement)
        if len(placement.node_ids) == 1:
            return chain, None
        try:
            async with asyncio.timeout(_MEASURING_S):
                times = await stage_times(chain, self._spec.slots)
        except (ServingError, TimeoutError) as problem:
            reason = str(problem) or f"its steps take longer than {_MEASURING_S:g} s"
            logger.warning("%s cannot be measured: %s", self.cluster_id, reason)
            return chain, None
        self._rates |= rates_of(self._weights(len(placement.node_ids)), placement, times)
        return chain, max(times.values())

    def _better(self, placement: Placement, slowest_s: float | None) -> Placement | None:
        """Another placement on the same devices that is so much faster that it is worth to load it."""
        if slowest_s is None or slowest_s < _LEAST_S:
            return None
        better = self._place(placement.node_ids)
        gain_s = slowest_s - predicted_s(self._weights(len(placement.node_ids)), better, self._rates)
        return better if gain_s > max(_LEAST_S, _LEAST_SHARE * slowest_s) else None

    async def _placed(self) -> Placement:
        """Where the devices that are here can hold the model; requests wait, but not for ever."""
        while True:
            self._here_then = self._here()
            try:
                return self._place(self._here_then)
            except PlacementError as problem:
                if not await self._members.wait_for(self._has_changed, self._spec.patience_s):
                    reason = str(problem) if self._here_then else "none of its devices is here; start them"
                    logger.warning("%s: %s", self.cluster_id, reason)
                    self.engine.fail(UnavailableError(f"{self.cluster_id}: {reason}"))

    def _place(self, node_ids: Sequence[str]) -> Placement:
        nodes = [self._nodes[node_id] for node_id in node_ids]
        return place_decoder(self._weights(len(nodes)), nodes, self._labels, self._rates)

    def _weights(self, num_devices: int) -> Weights:
        slots = (self._spec.slots + self._spec.shelf) * max(1, num_devices)
        return self._model.weights(slots, self.engine.max_tokens)

    def _here(self) -> list[str]:
        ids = (node_id for node_id in self._cluster.node_ids if node_id not in self._out)
        return [node_id for node_id in ids if self._members.is_ready(node_id)]

    def _has_changed(self) -> bool:
        return self._here() != self._here_then

    async def _hold(self, placement: Placement) -> None:
        """Have every device load what is its own, and then meet its neighbours.

        Raises:
            TransportError: if one is lost, or cannot.
        """
        ids = placement.node_ids
        await asyncio.gather(*(self._have_load(placement, node_id) for node_id in ids))
        edge_ids = {placement.start_id, placement.visits[-1].node_id}
        await self._neighbours.connect(self._members.locate(edge_ids))
        await asyncio.gather(*(self._transport.call(node_id, self._connect(placement, node_id)) for node_id in ids))

    async def _have_load(self, placement: Placement, node_id: str) -> None:
        reply = await self._transport.call(node_id, self._load(placement, node_id))
        self._account.loaded(reply.read(Loaded).usage)

    async def _serve(self, chain: ServedChain) -> None:
        """Answer requests on one chain, until one of its devices is lost or another comes."""
        self.engine.attach(chain.run, len(chain.placement.node_ids))
        logger.info("%s serves on %s", self._cluster.cluster_id, " -> ".join(chain.placement.node_ids))
        others = asyncio.create_task(self._members.wait_for(self._has_changed, None))
        try:
            ends: list[asyncio.Future[Any]] = [chain.lost, others]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            others.cancel()
            self.chain = None
            await self.engine.detach()
        if chain.lost.done():
            await self._lose(chain.lost.result())

    def has(self, node_id: str) -> bool:
        """Whether it is a device of this cluster."""
        return node_id in self._cluster.node_ids

    def deliver(self, message: Message) -> None:
        """Take what a device of the chain says."""
        if chain := self._trial or self.chain:
            chain.deliver(message)

    def lose(self, problem: NodeLostError) -> None:
        """The stream to a device broke."""
        if chain := self._trial or self.chain:
            chain.lose(problem)

    async def _lose(self, problem: TransportError) -> None:
        logger.warning("%s: %s", self._cluster.cluster_id, problem)
        if isinstance(problem, NodeLostError):
            await self._members.lose(problem.node_id, str(problem))
        else:
            await asyncio.sleep(1)  # it is here and cannot: it may be able to with other devices beside it

    def _load(self, placement: Placement, node_id: str) -> Message:
        model, spec = self._model, self._spec
        names = model.shards(segments_held(placement, 1, node_id))
        room = (len(placement.node_ids), spec.slots + spec.shelf, self.engine.max_tokens)
        visits = list(placement.visits)
        files = model.text_files if node_id == visits[-1].node_id else {}
        return Message.of(LOAD, Load(self._number, visits, dict(model.config), model.digest, names, *room, files))

    def _connect(self, placement: Placement, node_id: str) -> Message:
        return Message.of(CONNECT, Connect(self._members.locate(neighbours_of(placement, 1, node_id))))
