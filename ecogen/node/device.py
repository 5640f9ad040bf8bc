"""An end device: fetches its segments from its edge, then tunes and serves with the others of its cluster."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ecogen import config as recipes
from ecogen.errors import AuthenticationError, CheckpointError, DataError, NodeLostError, ProtocolError
from ecogen.models.checkpoint import FILE, load_tensors, save_tensors, write_files
from ecogen.models.family import family_of
from ecogen.models.profile import shape_of
from ecogen.models.tunables import attach_tunables
from ecogen.models.vit import SegmentedViT
from ecogen.node.context import BOOKS, INSTALL, OPERATOR, Caller, NodeContext, Ready, Welcome, methods
from ecogen.placement import Segment, neighbours_of, rotations, segments_held
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
from ecogen.tuning.data import load_pictures
from ecogen.tuning.device import DeviceTuning, LocalData
from ecogen.tuning.feedback import Feedback
from ecogen.tuning.labels import LabelSet
from ecogen.tuning.messages import FLOW_METHODS, TUNE, placement_from_table
from ecogen.tuning.pairs import WAYS
from ecogen.tuning.passages import Passages
from ecogen.tuning.prefix import why_not_kept
from ecogen.tuning.privacy import example_noise
from ecogen.tuning.route import Route
from ecogen.tuning.task import Task, task_of
from ecogen.units import MIB

logger = logging.getLogger(__name__)

ASK = "ask"

_TOKENIZER = "tokenizer"  # the folder of a text model's, on the disks of those who own text


class Install(msgspec.Struct, frozen=True):
    """Serve with these tunables from now on; and where the neighbours on the route are."""

    addresses: dict[str, str]


class Ask(msgspec.Struct, frozen=True):
    """Have the start device send inputs through the chain: pictures that it can read, or examples of the test split."""

    request_id: str
    paths: list[str] = msgspec.field(default_factory=list)
    test_indices: list[int] = msgspec.field(default_factory=list)


class Asked(msgspec.Struct, frozen=True):
    """The most likely class of each picture and its probability, the true one where it is known, and the record.

    Of a passage of text, instead of a class the token that would follow it.
    """

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
    task: Task | None
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
        config = family_of(welcome.model["model_type"]).config(welcome.model)
        placement = placement_from_table(welcome.placement)
        topology = recipes.build_topology(recipe.topology)
        cluster_id = topology.cluster_of(context.node_id).cluster_id
        spec = recipe.tunables.of_cluster(cluster_id)
        segments = segments_held(placement, recipe.data.owners, context.node_id)
        owners = placement.node_ids[: recipe.data.owners]
        tensors = await self._backbone(config, segments, welcome, is_owner=context.node_id in owners)
        context.worker.slowness = recipe.faults.slow.get(context.node_id, 1.0)
        stage = await context.worker.compute(self._load, config, segments, tensors, spec)
        shape = shape_of(config, recipe, spec)
        task, data = None, None
        if context.node_id in owners:
            task = await context.worker.compute(task_of, recipe, topology, context.folder / _TOKENIZER)
            data = await context.worker.compute(self._own_data, task, topology, owners, welcome.digest, shape)
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
        return _Resident(stage, tuning, serving, task, neighbour_ids)

    async def _backbone(
        self, config: PreTrainedConfig, segments: list[Segment], welcome: Welcome, *, is_owner: bool
    ) -> dict[str, Tensor]:
        """The own segments' frozen tensors, from this device's disk or else from the edge; never any other.

        Who owns text has the tokenizer's files among them.
        """
        name = hashlib.sha256(f"{welcome.digest} {segments}".encode()).hexdigest()[:16]
        path = self._context.folder / f"backbone-{name}.safetensors"
        if path.exists():
            try:
                return await self._context.worker.compute(load_tensors, path)
            except CheckpointError:
                path.unlink()
        family = family_of(config.model_type)
        names = await self._context.worker.compute(family.names, config, segments, welcome.offered)
        names += [name for name in welcome.offered if is_owner and name.startswith(FILE)]
        tensors = await fetch_tensors(self._context.transport, self._edge_id, names)
        await self._context.worker.compute(save_tensors, path, tensors)
        return tensors

    def _load(
        self, config: PreTrainedConfig, segments: list[Segment], tensors: dict[str, Tensor], spec: recipes.Tunables
    ) -> Stage:
        weights = write_files(self._context.folder / _TOKENIZER, tensors)
        model = family_of(config.model_type).load(config, segments, weights)
        attach_tunables(model, spec)
        if isinstance(model, SegmentedViT):
            model.gives_all_tokens = self._recipe.wire.tokens == "all"
        noise = example_noise(self._recipe.privacy, WAYS if self._recipe.data.is_pairs else 1)
        return Stage(model, device=self._context.device, dtype=self._context.dtype, noise=noise)

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

    def _own_data(
        self, task: Task, topology: Topology, owners: Sequence[str], digest: str, shape: ModelShape
    ) -> LocalData:
        """This device's partition: an equal part of its cluster's."""
        recipe, node_id = self._recipe, self._context.node_id
        cluster_index = list(topology.clusters).index(topology.cluster_of(node_id).cluster_id)
        prefix: str | None = f"{digest} {shape.lowest_tunable_block} {recipe.wire.activations}"
        if reason := why_not_kept(recipe.tuning, recipe.wire, shape):
            logger.info("activations from below the tunables are sent in every epoch: %s", reason)
            prefix = None

        def owned(domain: int = 0) -> LocalData:
            examples = task.owned(node_id, owners, domain)
            data = LocalData(examples, recipe.seed, cluster_index, owners.index(node_id))
            return data.with_views(recipe.tuning, prefix)

        later = recipe.data.sources.get(self._edge_id, recipes.PairSource()).later
        return owned() if later is None else replace(owned(), later=(later.round - 1, owned(1)))

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
        inputs, truth = await self._context.worker.compute(self._inputs, ask)
        answer = await self._held.serving.ask(ask.request_id, inputs)
        logits = answer.logits if answer.logits.ndim == 2 else answer.logits[:, -1]  # of text, after the last token
        probabilities, places = torch.softmax(logits.float(), -1).max(-1)
        labels = self._known.at(places.tolist()) if self._known else places.tolist()
        asked = Asked(labels, probabilities.tolist(), answer.record, truth)
        return Message.of(ASK, asked, counted=message.counted)

    def _inputs(self, ask: Ask) -> tuple[Tensor, list[int]]:
        if ask.paths:
            if self._recipe.data.is_text:
                raise DataError("this model's inputs are text, not pictures; ask it with `ecogen serve`")
            return load_pictures([Path(path) for path in ask.paths], self._recipe.model.image_size), []
        if self._held.task is None:
            raise DataError(f"{self._context.node_id} owns no examples; ask the first device of its cluster")
        chosen = self._held.task.asked(self._edge_id, ask.test_indices)
        if isinstance(chosen, Passages):
            return chosen.inputs, []
        return chosen.inputs, self._known.at(chosen.labels.tolist()) if self._known else chosen.labels.tolist()

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
