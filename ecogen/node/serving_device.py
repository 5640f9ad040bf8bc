"""An end device that serves: fetches its segments of a language model from its edge, and answers with the others."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from ecogen.errors import AuthenticationError, NodeLostError, ProtocolError
from ecogen.models.decoder import load_decoder
from ecogen.models.folder import write_text_files
from ecogen.models.mixed_lora import MixedLora
from ecogen.models.packed import pack_weights
from ecogen.models.quantize import held_bytes, quantize_weights
from ecogen.node.books import HandedIn, ServingWindows
from ecogen.node.context import BOOKS, Caller, Handler, NodeContext, Ready, methods
from ecogen.placement import Segment, neighbours_of
from ecogen.runtime.membership import attend
from ecogen.runtime.neighbours import Neighbours
from ecogen.runtime.stage import resolve_device
from ecogen.serving.decoder_stage import DecoderStage
from ecogen.serving.grammar import constrain_in
from ecogen.serving.language import computed_in
from ecogen.serving.loading import (
    CONNECT,
    DROP,
    LOAD,
    PREPARE,
    UNLOAD,
    Assembly,
    Connect,
    Drop,
    Load,
    Loaded,
    fetch_folder,
    segments_by_visit,
)
from ecogen.serving.stages import StagesOfDevice
from ecogen.serving.steps import STEP
from ecogen.topology import Tier
from ecogen.transport.base import Message, Peer, Stream

logger = logging.getLogger(__name__)


class ServingDevice:
    """One end device.

    Args:
        edge_id: its edge, the only one that may give it orders.
    """

    def __init__(self, context: NodeContext, edge_id: str) -> None:
        self._context, self._edge_id = context, edge_id
        self._stages: StagesOfDevice | None = None
        self._neighbour_ids: frozenset[str] = frozenset()
        self._held_bytes = 0
        self._windows = ServingWindows(context.worker)
        self._lora: MixedLora | None = None
        self._assembly = Assembly()
        self._neighbours = Neighbours(context.transport, self._deliver, self._lose)
        edge = Caller(Tier.EDGE, edge_id)
        handlers: dict[str, Handler] = {LOAD: self._load, CONNECT: self._connect, UNLOAD: self._unload}
        handlers |= {PREPARE: self._hold, DROP: self._forget}
        self.methods = methods(edge, **handlers, **{BOOKS: self._books})

    async def run(self, address: str) -> None:
        """Stay a member of the edge, whatever happens to it."""
        try:
            await attend(self._context.transport, self._edge_id, address, self._prepare)
        finally:
            await self._neighbours.close()

    async def accept(self, peer: Peer, stream: Stream) -> None:
        """Serve a stream that the edge or a neighbour on the chain opened.

        Raises:
            AuthenticationError: if it is neither.
        """
        if peer.node_id not in self._neighbour_ids | {self._edge_id}:
            raise AuthenticationError(f"{peer.node_id!r} ({peer.tier}) is no neighbour of {self._context.node_id!r}")
        await self._neighbours.adopt(peer, stream)

    async def _prepare(self, _: Message) -> Message:
        """Nothing is needed to be ready: what to hold, the edge says when it knows who is here."""
        if self._stages is not None:  # it served, and the edge was away
            self._windows.end(self._memory_bytes)
        return Message.of("ready", Ready(self._context.worker.usage("delivery")))

    async def _load(self, _: Peer, message: Message) -> Message:
        """Hold what is this device's of a chain; answers with what that took."""
        load = message.read(Load)
        await self._drop()
        placement, node_id = load.placement, self._context.node_id
        self._neighbour_ids = frozenset(neighbours_of(placement, 1, node_id))
        folder, compute = self._context.folder / f"model-{load.digest}", self._context.worker.compute
        await fetch_folder(self._context.transport, self._edge_id, folder, load.config, load.names, compute)
        visits = segments_by_visit(placement, node_id)
        await compute(write_text_files, folder, load.files)
        stages = await compute(self._open, folder, visits, load)
        constrain = constrain_in(folder) if "tokenizer.json" in load.files else None
        worker, neighbours = self._context.worker, self._neighbours
        self._stages = StagesOfDevice(load.chain, placement, stages, self._edge_id, worker, neighbours, constrain)
        return Message.of(LOAD, Loaded(self._context.worker.usage("delivery", self._held_bytes)))

    async def _unload(self, _: Peer, __: Message) -> Message:
        """Give the memory back."""
        await self._drop()
        return Message.of(UNLOAD)

    async def _drop(self) -> None:
        memory_bytes = self._memory_bytes
        stages, self._stages = self._stages, None
        if stages is not None:
            await stages.close()
            self._windows.end(memory_bytes)
        self._assembly.clear()  # whoever gives an adapter to the next model begins with its first part
        self._lora, self._held_bytes = None, 0

    def _open(self, folder: Path, visits: Mapping[int, Segment], load: Load) -> dict[int, DecoderStage]:
        segments = list(dict.fromkeys(visits.values()))
        context = self._context
        model = load_decoder(folder, segments, dtype=computed_in(context.dtype))
        if context.dtype == "int8":
            quantize_weights(model)
        model.to(resolve_device(context.device))
        pack_weights(model)
        self._held_bytes = held_bytes(model)
        lora = self._lora = MixedLora(model)
        room = (load.groups, load.slots, load.max_tokens)
        return {index: DecoderStage(model, segment, *room, lora) for index, segment in visits.items()}

    async def _hold(self, _: Peer, message: Message) -> Message:
        """Hold an adapter's part of the own blocks, once all of it is here."""
        adapter_id, adapter = self._assembly.add(message)
        if adapter is not None:
            await self._context.worker.compute(self._loaded.hold, adapter_id, adapter)
        return Message.of(PREPARE)

    async def _forget(self, _: Peer, message: Message) -> Message:
        adapter_id = message.read(Drop).adapter_id
        self._assembly.forget(adapter_id)
        await self._context.worker.compute(self._loaded.drop, adapter_id)
        return Message.of(DROP)

    @property
    def _loaded(self) -> MixedLora:
        if self._lora is None:
            raise ProtocolError(f"{self._context.node_id} holds no model yet")
        return self._lora

    async def _connect(self, _: Peer, message: Message) -> Message:
        """Meet the neighbours."""
        await self._neighbours.connect(message.read(Connect).addresses)
        return Message.of(CONNECT)

    async def _books(self, _: Peer, __: Message) -> Message:
        """The usage that no other answer has reported; itself not in the books."""
        return Message.of(BOOKS, HandedIn(self._windows.take(self._memory_bytes)), counted=False)

    @property
    def _memory_bytes(self) -> int:
        """Weights and caches."""
        return self._held_bytes + (self._stages.cache_bytes if self._stages else 0)

    def _deliver(self, _: str, message: Message) -> None:
        if self._stages is not None and message.method == STEP:
            self._stages.deliver(message)

    def _lose(self, error: NodeLostError) -> None:
        if self._stages is not None:
            self._stages.lose(error)
