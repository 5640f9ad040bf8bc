"""A cluster of devices in a test: stages cut from one model, and their local steps over the in-memory network."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from ecogen.config import BlockTunables, Unlabelled, WireType
from ecogen.config import Tunables as Spec
from ecogen.errors import NodeLostError
from ecogen.metering.meter import null_meter
from ecogen.models.profile import model_shape
from ecogen.models.tunables import attach_tunables, named_tunables, tunables_of
from ecogen.models.vit import SegmentedViT, load_vit, parameter_names, whole_segment
from ecogen.placement import Placement, Segment, neighbours_of, place, rotations, segments_held
from ecogen.runtime.neighbours import Neighbours
from ecogen.runtime.prefix_cache import PrefixCache
from ecogen.runtime.stage import OptimizerSettings, Stage
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message, Peer, Stream
from ecogen.transport.memory import MemoryNetwork
from ecogen.tuning.data import Examples
from ecogen.tuning.local import LocalSteps
from ecogen.tuning.messages import AttemptKey, Flow
from ecogen.tuning.route import Route
from ecogen.tuning.visits import LocalResult
from tests.plain import PlainModel
from tests.tiny import IMAGE, tiny_config, tiny_vit

KEY = AttemptKey(0, 1)

KINDS = [
    Spec(prompts=2, lora_rank=0, prompt_depth="shallow", first_block=1),
    Spec(prompts=2, lora_rank=2),
    Spec(prompts=0, lora_rank=2, lora_kind="rslora"),
    Spec(prompts=0, lora_rank=2, lora_kind="dora"),
    Spec(prompts=0, lora_rank=0, ia3=True),
    Spec(prompts=0, lora_rank=0, bottleneck=3),
    Spec(prompts=0, lora_rank=0, backbone="biases"),
    Spec(prompts=1, lora_rank=2, blocks={"1..2": BlockTunables(prompts=0, lora_rank=3, bottleneck=2, backbone="all")}),
]
"""Every kind of tunables, and a block that has others."""


@dataclass(frozen=True)
class Case:
    """A model, how it is cut, and what trains in it."""

    num_blocks: int
    cuts: tuple[int, ...] = ()
    labels: str = "start"
    spec: Spec = field(default_factory=lambda: Spec(prompts=2, lora_rank=2))
    owners: int = 1
    goes_down: bool = False

    @property
    def config(self) -> ViTConfig:
        return tiny_config(self.num_blocks)

    @property
    def placement(self) -> Placement:
        nodes = [f"device-{index}" for index in range(len(self.cuts) + 1)]
        return place(nodes, self.cuts, self.num_blocks, self.labels)

    @property
    def routes(self) -> list[Route]:
        shape = model_shape(self.config, self.spec)
        return [Route(placement, shape, self.goes_down) for placement in rotations(self.placement, self.owners)]

    def held_by(self, node_id: str) -> list[Segment]:
        return segments_held(self.placement, self.owners, node_id)

    def neighbours_of(self, node_id: str) -> list[str]:
        return neighbours_of(self.placement, self.owners, node_id)


@st.composite
def cases(draw: st.DrawFn, max_blocks: int = 6) -> Case:
    """Any model of up to `max_blocks` blocks, any cuts, any tunables of which there is at least one."""
    num_blocks = draw(st.integers(1, max_blocks))
    cuts = draw(st.sets(st.integers(1, num_blocks - 1), max_size=3)) if num_blocks > 1 else set()
    spec = draw(specs(num_blocks))
    is_tuned = any(spec.of_block(index).is_tuned for index in range(num_blocks))
    assume(spec.head or is_tuned or spec.backbone != "frozen")
    owners = draw(st.integers(1, len(cuts) + 1))
    return Case(num_blocks, tuple(sorted(cuts)), draw(st.sampled_from(["start", "end"])), spec, owners)


@st.composite
def specs(draw: st.DrawFn, num_blocks: int) -> Spec:
    """Any tunables of a model; those of one block may differ from the others'."""
    kind = draw(st.sampled_from(["lora", "lora", "rslora", "dora", "ia3"]))
    depth = draw(st.sampled_from(["deep", "deep", "shallow"]))
    first = draw(st.integers(0, num_blocks))
    backbones = st.sampled_from(["frozen", "frozen", "biases", "all"])
    spec = Spec(
        prompts=draw(st.integers(0, 2)),
        prompt_depth=depth,
        lora_rank=0 if kind == "ia3" else draw(st.integers(0, 2)),
        lora_kind="lora" if kind == "ia3" else kind,
        ia3=kind == "ia3",
        bottleneck=draw(st.sampled_from([0, 0, 3])),
        head=draw(st.booleans()),
        backbone=draw(backbones),
        first_block=first,
    )
    if first == num_blocks or draw(st.booleans()):
        return spec
    index = draw(st.integers(first, num_blocks - 1))
    own = BlockTunables(
        prompts=None if depth == "shallow" else draw(st.sampled_from([None, 0, 1])),
        lora_rank=None if kind == "ia3" else draw(st.sampled_from([None, 0, 3])),
        ia3=draw(st.booleans()) if kind == "ia3" else None,
        bottleneck=draw(st.sampled_from([None, 0, 2])),
        backbone=draw(st.none() | backbones),
    )
    return replace(spec, blocks={f"{index}..{index + 1}": own})


def plain_model(case: Case, *, double: bool = False) -> PlainModel:
    """The truth, with the values of `random_tunables`."""
    whole, tunables = tiny_vit(case.config), random_tunables(case)
    if double:
        whole, tunables = whole.double(), {name: tensor.double() for name, tensor in tunables.items()}
    return plain_of(whole, tunables, case.spec)


def plain_of(whole: ViTForImageClassification, tunables: Mapping[str, Tensor], spec: Spec) -> PlainModel:
    """The truth for a model with these tunables."""
    return PlainModel(
        whole,
        tunables,
        lora_alpha=spec.lora_alpha,
        root_of_rank=spec.lora_kind == "rslora",
        prompts_stay=spec.prompt_depth == "shallow",
    )


def cut_model(whole: ViTForImageClassification, segments: Sequence[Segment], spec: Spec) -> SegmentedViT:
    """The segments of a whole model, with tunables attached; shares no memory with it."""
    state = whole.state_dict()
    model = load_vit(
        whole.config, segments, {name: state[name].clone() for name in parameter_names(whole.config, segments)}
    )
    attach_tunables(model, spec)
    return model


def random_tunables(case: Case, seed: int = 1) -> dict[str, Tensor]:
    """Values for all tunables of the whole model, none of them zero."""
    whole = cut_model(tiny_vit(case.config), [whole_segment(case.config)], case.spec)
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(p.shape, generator=generator) for name, p in named_tunables(whole)}


def random_batches(count: int, size: int, seed: int = 2, *, dtype: torch.dtype = torch.float32) -> list[Examples]:
    """Batches of noise with random labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Examples(
            torch.randn(size, 1, IMAGE, IMAGE, generator=generator, dtype=dtype),
            torch.randint(0, 10, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def stages_of(case: Case, *, double: bool = False, dtype: str = "float32", device: str = "cpu") -> dict[str, Stage]:
    """One stage a node; in double precision, rounding cannot hide or fake a difference."""
    whole, stages = tiny_vit(case.config), {}
    for node_id in case.placement.node_ids:
        model = cut_model(whole, case.held_by(node_id), case.spec)
        stages[node_id] = Stage(model, device=device, dtype=dtype)
        if double:
            stages[node_id].model.double()
    return stages


@dataclass
class Tuned:
    """What a cluster has after its local steps."""

    tunables: dict[str, Tensor]
    results: dict[str, LocalResult | BaseException]


class _Device:
    """The service of a device: its neighbours' streams, and the steps that their messages go to."""

    def __init__(self, network: MemoryNetwork, node_id: str, executor: ThreadPoolExecutor) -> None:
        self.transport = network.join(Peer(node_id, "end"))
        self.neighbours = Neighbours(self.transport, self._deliver, self._lose, patience_s=5.0)
        self.worker = Worker(null_meter(node_id), self.transport.counter, executor)
        self.steps: LocalSteps | None = None

    async def handle(self, _: Peer, message: Message) -> Message:
        return message

    async def accept(self, peer: Peer, stream: Stream) -> None:
        await self.neighbours.adopt(peer, stream)

    def _deliver(self, _: str, message: Message) -> None:
        assert self.steps is not None
        self.steps.deliver(message, message.read(Flow))

    def _lose(self, error: NodeLostError) -> None:
        assert self.steps is not None
        self.steps.fail(error)


async def tune_cluster(
    case: Case,
    tunables: Mapping[str, Tensor],
    batches: Sequence[Examples],
    settings: OptimizerSettings,
    *,
    network: MemoryNetwork | None = None,
    num_microbatches: int = 1,
    num_epochs: int = 1,
    unlabelled: Unlabelled | None = None,
    expected: int | None = None,
    stages: Mapping[str, Stage] | None = None,
    wire_types: Mapping[str, WireType] | None = None,
    caches: Mapping[str, PrefixCache] | None = None,
    correction: Mapping[str, Tensor] | None = None,
    timeout_s: float = 30.0,
    keeps_errors: bool = False,
) -> Tuned:
    """Run the local steps of a cluster to their end; raises what a device raised, unless that is kept as its result.

    Args:
        batches: in the order of the local steps; owners take turns over them, `num_epochs` turns each.
        caches: by node, of prefix activations; the batches have keys then.
    """
    network, stages = network or MemoryNetwork(), stages or stages_of(case)
    turns = deal(batches, num_epochs * case.owners)
    with ThreadPoolExecutor(1) as executor:
        devices = {node_id: _Device(network, node_id, executor) for node_id in stages}
        for node_id, device in devices.items():
            await device.transport.serve(device)
            held = None if correction is None else tunables_of(correction, case.held_by(node_id))
            by_edge = unlabelled is not None and unlabelled.teacher == "edge"
            stages[node_id].begin(tunables, settings, held, keeps_begun=by_edge)
            index = case.placement.node_ids.index(node_id)
            own = partial(_turn_of, turns, case.owners, index) if index < case.owners else None
            make = partial(LocalSteps, KEY, case.routes, stages[node_id], device.worker, device.neighbours)
            device.steps = make(
                num_epochs=num_epochs,
                batches=own,
                num_microbatches=num_microbatches,
                unlabelled=unlabelled,
                expected=expected,
                wire_types=wire_types,
                own_keys=torch.cat([batch.keys for batch in batches]) if caches and own else None,
                cache=caches[node_id] if caches else None,
            )
        try:
            async with asyncio.timeout(timeout_s):
                for node_id, device in devices.items():
                    await device.neighbours.connect({other: other for other in case.neighbours_of(node_id)})
                runs = [device.steps.run() for device in devices.values() if device.steps is not None]
                results = await asyncio.gather(*runs, return_exceptions=keeps_errors)
        finally:
            for device in devices.values():
                await device.neighbours.close()
                await device.transport.close()
    last = case.routes[-1].placement
    parts = [tunables_of(stage.tunables, last.segments_of(node_id)) for node_id, stage in stages.items()]
    tuned = {name: tensor for part in parts for name, tensor in part.items()}
    return Tuned(tuned, dict(zip(devices, results, strict=True)))


def deal(batches: Sequence[Examples], num_turns: int) -> list[list[Examples]]:
    """The batches of each turn: consecutive, in nearly equal numbers."""
    bounds = [len(batches) * turn // num_turns for turn in range(num_turns + 1)]
    return [list(batches[start:stop]) for start, stop in pairwise(bounds)]


def _turn_of(turns: list[list[Examples]], owners: int, index: int, epoch: int) -> Iterator[Examples]:
    return iter(turns[epoch * owners + index])
