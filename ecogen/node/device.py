"""An end device: fetches its segments from its edge, then tunes and serves with the others of its cluster."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor
from transformers import ViTConfig

from ecogen import config as recipes
from ecogen.errors import AuthenticationError, CheckpointError, DataError, NodeLostError, ProtocolError
from ecogen.models.checkpoint import load_tensors, save_tensors
from ecogen.models.profile import model_shape
from ecogen.models.tunables import attach_tunables
from ecogen.models.vit import load_vit, parameter_names
from ecogen.node.context import BOOKS, INSTALL, OPERATOR, Caller, NodeContext, Ready, Welcome, methods
from ecogen.placement import Placement, Segment, neighbours_of, rotations, segments_held
from ecogen.planning.cost import ModelShape, activation_bytes
from ecogen.records import RequestRecord
from ecogen.runtime.delivery import fetch_tensors
from ecogen.runtime.membership import attend
from ecogen.runtime.neighbours import Neighbours
from ecogen.runtime.prefix_cache import PrefixCache
from ecogen.runtime.stage import Stage
from ecogen.serving.request import REQUEST_METHODS, DeviceServing
from ecogen.topology import Tier, Topology
from ecogen.transport.base import Message, Peer, Stream
from ecogen.tuning.controls import Controls
from ecogen.tuning.data import hide_labels, load_pictures, load_splits, partition_examples
from ecogen.tuning.device import DeviceTuning, LocalData
from ecogen.tuning.feedback import Feedback
from ecogen.tuning.labels import LabelSet, label_sets
from ecogen.tuning.messages import FLOW_METHODS, TUNE, placement_from_table
from ecogen.tuning.prefix import why_not_kept
from ecogen.tuning.route import Route
from ecogen.units import MIB

logger = logging.getLogger(__name__)

ASK = "ask"


class Install(msgspec.Struct, frozen=True):
    """Serve with these tunables from now on; and where the neighbours on the route are."""

    addresses: dict[str, str]


class Ask(msgspec.Struct, frozen=True):
    """Have the start device send pictures through the chain: files that it can read, or examples of the test split."""

    request_id: str
    paths: list[str] = msgspec.field(default_factory=list)
    test_indices: list[int] = msgspec.field(default_factory=list)


class Asked(msgspec.Struct, frozen=True):
    """The most likely class of each picture and its probability, the true one where it is known, and the record."""

    labels: list[int]
    probabilities: list[float]
    record: RequestRecord
    truth: list[int] = msgspec.field(default_factory=list)


@dataclass
class _Resident:
    """What a prepared device holds."""

    stage: Stage
    tuning: DeviceTuning
    serving: DeviceServing
    neighbour_ids: frozenset[str]


class DeviceRole:
    """One end device.

    Args:
        edge_id: its edge, the only one that may give it orders.
    """

    def __init__(self, context: NodeContext, edge_id: str) -> None:
        self._context, self._edge_id = context, edge_id
        self._resident: _Resident | None = None
        self._recipe = recipes.Recipe()
        self.neighbours = Neighbours(context.transport, self._deliver, self._lose)
        edge = Caller(Tier.EDGE, edge_id)
        self.methods = {
            **methods(edge, **{TUNE: self._tune, INSTALL: self._install, BOOKS: self._books}),
            **methods(edge, Caller(OPERATOR), **{ASK: self._ask}),
        }

    async def run(self, address: str) -> None:
        """Stay a member of the edge, whatever happens to it."""
        try:
            await attend(self._context.transport, self._edge_id, address, self.prepare)
        finally:
            await self.neighbours.close()

    async def accept(self, peer: Peer, stream: Stream) -> None:
        """Serve a stream that a neighbour opened.

        Raises:
            AuthenticationError: if it is not a neighbour on a route of this device's cluster.
        """
        if not (peer.tier == Tier.END and self._resident and peer.node_id in self._resident.neighbour_ids):
            raise AuthenticationError(f"{peer.node_id!r} ({peer.tier}) is no neighbour of {self._context.node_id!r}")
        await self.neighbours.adopt(peer, stream)

    async def prepare(self, message: Message) -> Message:
        """Get ready to work as the edge's welcome says; returns the answer to it."""
        welcome = message.read(Welcome)
        if self._resident is None:
            self._recipe = recipes.from_table(welcome.recipe, f"the recipe of {self._edge_id}")
            self._resident = await self._settle(welcome)
        return Message.of("ready", Ready(self._context.worker.usage("delivery", self._resident.stage.memory_bytes)))

    async def _settle(self, welcome: Welcome) -> _Resident:
        context, recipe = self._context, self._recipe
        config = ViTConfig.from_dict(welcome.model)
        placement = placement_from_table(welcome.placement)
        topology = recipes.build_topology(recipe.topology)
        cluster_id = topology.cluster_of(context.node_id).cluster_id
        spec = recipe.tunables.of_cluster(cluster_id)
        segments = segments_held(placement, recipe.data.owners, context.node_id)
        tensors = await self._backbone(config, segments, welcome.digest)
        context.worker.slowness = recipe.faults.slow.get(context.node_id, 1.0)
        stage = await context.worker.compute(self._load, config, segments, tensors, spec)
        shape = model_shape(config, spec, self._recipe.wire.tokens)
        data = await context.worker.compute(self._own_data, topology, placement, welcome.digest, shape)
        goes_down = recipe.wire.gradients_to == "start"
        routes = [Route(route, shape, goes_down) for route in rotations(placement, recipe.data.owners)]
        factor = recipe.faults.update_factor.get(cluster_id, 1.0)
        controls, wire = Controls(context.folder / "controls.safetensors"), recipe.wire
        feedback = Feedback(context.folder / "feedback.safetensors", wire.updates)
        tuning = DeviceTuning(
            routes,
            recipe.tuning,
            stage,
            context.worker,
            self.neighbours,
            data,
            wire=wire,
            cache=self._cache(routes, shape),
            update_factor=factor,
            controls=controls if recipe.aggregation.strategy == "scaffold" else None,
            feedback=feedback if wire.updates != "float32" else None,
        )
        serving = DeviceServing(cluster_id, placement, shape, topology.link, stage, context.worker, self.neighbours)
        neighbour_ids = frozenset(neighbours_of(placement, recipe.data.owners, context.node_id))
        return _Resident(stage, tuning, serving, neighbour_ids)

    async def _backbone(self, config: ViTConfig, segments: list[Segment], digest: str) -> dict[str, Tensor]:
        """The own segments' frozen tensors, from this device's disk or else from the edge; never any other."""
        name = hashlib.sha256(f"{digest} {segments}".encode()).hexdigest()[:16]
        path = self._context.folder / f"backbone-{name}.safetensors"
        if path.exists():
            try:
                return await self._context.worker.compute(load_tensors, path)
            except CheckpointError:
                path.unlink()
        names = await self._context.worker.compute(parameter_names, config, segments)
        tensors = await fetch_tensors(self._context.transport, self._edge_id, names)
        await self._context.worker.compute(save_tensors, path, tensors)
        return tensors

    def _load(
        self, config: ViTConfig, segments: list[Segment], tensors: dict[str, Tensor], spec: recipes.Tunables
    ) -> Stage:
        model = load_vit(config, segments, tensors)
        attach_tunables(model, spec)
        model.gives_all_tokens = self._recipe.wire.tokens == "all"
        return Stage(model, device=self._context.device, dtype=self._context.dtype)

    def _cache(self, routes: list[Route], shape: ModelShape) -> PrefixCache | None:
        """Room for prefix activations where this device has the lowest tunable of a route and they can be kept."""
        tuning = self._recipe.tuning
        if why_not_kept(tuning, self._recipe.wire, shape):
            return None
        if self._context.node_id not in (route.node_id(route.lowest) for route in routes):
            return None
        row_bytes = activation_bytes(shape, shape.lowest_tunable_block)
        memory_bytes, disk_bytes = (int(mib * MIB) for mib in (tuning.prefix_memory_mib, tuning.prefix_disk_mib))
        return PrefixCache(self._context.folder / "prefix.f32", row_bytes, memory_bytes, disk_bytes)

    def _own_data(self, topology: Topology, placement: Placement, digest: str, shape: ModelShape) -> LocalData | None:
        """This device's partition, where it owns data: an equal part of its cluster's."""
        recipe = self._recipe
        owners = placement.node_ids[: recipe.data.owners]
        if self._context.node_id not in owners:
            return None
        owner_index = owners.index(self._context.node_id)
        splits = load_splits(recipe.data, recipe.model.image_size, recipe.seed)
        counts = [len(topology.clusters_of(edge_id)) for edge_id in topology.edge_ids]
        sets = label_sets(recipe.data, topology.edge_ids, splits.num_labels)
        known = [labels.labels for labels in sets.values()]
        parts = partition_examples(splits.train.labels, recipe.data.partition, counts, recipe.seed, known)
        cluster = topology.cluster_of(self._context.node_id)
        place = topology.clusters_of(cluster.edge_id).index(cluster)
        own = parts[topology.edge_ids.index(cluster.edge_id)][place][owner_index :: len(owners)]
        cluster_index = list(topology.clusters).index(cluster.cluster_id)
        labelled = sets[self._edge_id].keep(splits.train[own])
        examples = hide_labels(labelled, recipe.data.labelled, [recipe.seed, cluster_index, owner_index])
        data = LocalData(examples, recipe.seed, cluster_index, owner_index)
        if reason := why_not_kept(recipe.tuning, recipe.wire, shape):
            logger.info("activations from below the tunables are sent in every epoch: %s", reason)
            return data.with_views(recipe.tuning, None)
        return data.with_views(recipe.tuning, f"{digest} {shape.lowest_tunable_block} {recipe.wire.activations}")

    # What others ask for.

    async def _tune(self, _: Peer, message: Message) -> Message:
        return await self._held.tuning.tune(message)

    async def _install(self, _: Peer, message: Message) -> Message:
        """Take the tunables to serve with, and meet the neighbours."""
        await self._held.tuning.break_off()
        await self.neighbours.connect(message.read(Install).addresses)
        await self._context.worker.compute(self._held.stage.begin, message.tensors)
        return Message.of(INSTALL)

    async def _books(self, _: Peer, __: Message) -> Message:
        """The usage that no other answer has reported; itself not in the books."""
        usage = self._context.worker.usage("serving", self._held.stage.memory_bytes)
        return Message.of(BOOKS, Ready(usage), counted=False)

    async def _ask(self, _: Peer, message: Message) -> Message:
        ask = message.read(Ask)
        images, truth = await self._context.worker.compute(self._inputs, ask)
        answer = await self._held.serving.ask(ask.request_id, images)
        probabilities, places = torch.softmax(answer.logits.float(), -1).max(-1)
        labels = self._known.at(places.tolist()) if self._known else places.tolist()
        asked = Asked(labels, probabilities.tolist(), answer.record, truth)
        return Message.of(ASK, asked, counted=message.counted)

    def _inputs(self, ask: Ask) -> tuple[Tensor, list[int]]:
        size = self._recipe.model.image_size
        if ask.paths:
            return load_pictures([Path(path) for path in ask.paths], size), []
        test = load_splits(self._recipe.data, size, self._recipe.seed).test
        test = self._known.keep(test) if self._known else test
        if not ask.test_indices or max(ask.test_indices) >= len(test):
            raise DataError(f"ask for test examples 0..{len(test) - 1} or for files, not {ask.test_indices}")
        chosen = test[ask.test_indices]
        return chosen.images, self._known.at(chosen.labels.tolist()) if self._known else chosen.labels.tolist()

    @property
    def _known(self) -> LabelSet | None:
        """The labels that this device's edge knows, where the recipe says so; None for all."""
        given = self._recipe.data.labels_of_edges.get(self._edge_id)
        return LabelSet(tuple(sorted(given))) if given else None

    @property
    def _held(self) -> _Resident:
        if self._resident is None:
            raise ProtocolError(f"{self._context.node_id} has not been prepared yet")
        return self._resident

    # Streams.

    def _deliver(self, sender_id: str, message: Message) -> None:
        if self._resident is None:
            return
        if message.method in FLOW_METHODS:
            self._resident.tuning.deliver(message)
        elif message.method in REQUEST_METHODS:
            self._resident.serving.deliver(sender_id, message)

    def _lose(self, error: NodeLostError) -> None:
        if self._resident is not None:
            self._resident.tuning.lose(error)
            self._resident.serving.lose(error)
