"""The formulas equal what transformers builds and what torch counts and keeps."""

from __future__ import annotations

import weakref
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from ecogen.config import BlockTunables, Tunables
from ecogen.models.profile import model_shape
from ecogen.models.tunables import attach_tunables, is_adapter, named_tunables
from ecogen.models.vit import SegmentedViT, empty_vit
from ecogen.placement import Segment
from ecogen.planning import cost
from ecogen.planning.cost import ModelShape

Tokens = Literal["needed", "all"]

SPEC = Tunables(prompts=8, lora_rank=4, first_block=1)


def shape_of(spec: Tunables, tokens: Tokens = "needed") -> ModelShape:
    """The shape of the model of `vit_config` with these tunables, as everybody makes it."""
    return model_shape(vit_config(), spec, tokens)


WHOLE = Segment(0, 4, has_embedding=True, has_head=True)
CUT = [Segment(0, 1, has_embedding=True), Segment(1, 3), Segment(3, 4), Segment(4, 4, has_head=True)]


def vit_config(attention: str = "eager", **changes: int) -> ViTConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"image_size": 28, "patch_size": 7, "num_channels": 1, "num_labels": 10}
    return ViTConfig(**(sizes | changes), attn_implementation=attention)


def tuned_model(
    device: str, attention: str = "eager", spec: Tunables = SPEC, tokens: Tokens = "needed"
) -> SegmentedViT:
    model = empty_vit(vit_config(attention), [WHOLE]).to_empty(device=device)
    model.gives_all_tokens = tokens == "all"
    attach_tunables(model, spec)
    return model


FROZEN = ModelShape(4, 64, 128, num_tokens=17, patch_dim=49, num_labels=10)
TUNED = shape_of(SPEC)

SIZES = "hidden", "intermediate", "image", "patch", "channels"


@pytest.mark.parametrize(SIZES, [(64, 128, 28, 7, 1), (96, 200, 32, 8, 3)])
def test_parameters_equal_those_of_transformers(
    hidden: int, intermediate: int, image: int, patch: int, channels: int
) -> None:
    config = vit_config(
        hidden_size=hidden, intermediate_size=intermediate, image_size=image, patch_size=patch, num_channels=channels
    )
    with torch.device("meta"):
        model = ViTForImageClassification(config)
    tokens = (image // patch) ** 2 + 1
    shape = ModelShape(4, hidden, intermediate, tokens, patch * patch * channels, num_labels=10)
    assert cost.num_parameters(shape, WHOLE) == model.num_parameters()
    assert cost.num_parameters(shape, WHOLE) == model.num_parameters()


@pytest.mark.parametrize("segment", CUT, ids=str)
def test_each_segment_has_the_parameters_of_its_modules(segment: Segment) -> None:
    held = empty_vit(vit_config(), [segment]).whole
    assert cost.num_parameters(FROZEN, segment) == sum(p.numel() for p in held.parameters())


SPECS = [
    SPEC,
    Tunables(prompts=0, lora_rank=4, head=False),
    Tunables(prompts=2, lora_rank=4, lora_targets=("q_proj", "k_proj", "v_proj", "o_proj"), lora_kind="rslora"),
    Tunables(prompts=3, lora_rank=0),
    Tunables(prompts=6, lora_rank=0, prompt_depth="shallow", first_block=1),
    Tunables(prompts=0, lora_rank=8, lora_kind="dora"),
    Tunables(prompts=0, lora_rank=0, ia3=True),
    Tunables(prompts=2, lora_rank=0, bottleneck=12),
    Tunables(backbone="biases", first_block=0),
    Tunables(prompts=0, lora_rank=0, backbone="biases", first_block=2),
    Tunables(prompts=0, lora_rank=0, backbone="biases", first_block=4, head=False),
    Tunables(prompts=0, lora_rank=0, backbone="all"),
    Tunables(prompts=2, lora_rank=1, backbone="all", first_block=3, head=False),
    Tunables(
        first_block=1,
        blocks={
            "1..2": BlockTunables(prompts=0, lora_rank=0, bottleneck=9),
            "3..4": BlockTunables(prompts=9, lora_rank=16, backbone="all"),
        },
    ),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_tunables_equal_those_that_train(spec: Tunables) -> None:
    trained = dict(named_tunables(tuned_model("meta", spec=spec)))
    shape, count = shape_of(spec), sum(parameter.numel() for parameter in trained.values())
    assert cost.num_tunables(shape, WHOLE) == count
    assert cost.tunable_bytes(shape, WHOLE) == 4 * count
    added = sum(parameter.numel() for name, parameter in trained.items() if is_adapter(name))
    assert cost.num_adapter_parameters(shape, WHOLE) == added


@pytest.mark.parametrize("tokens", ["needed", "all"])
@pytest.mark.parametrize("spec", [None, *SPECS], ids=str)
def test_forward_flops_are_those_that_torch_counts(spec: Tunables | None, tokens: Tokens) -> None:
    spec = spec or Tunables(prompts=0, lora_rank=0)
    model, shape = tuned_model("meta", spec=spec, tokens=tokens), shape_of(spec, tokens)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(3, 1, 28, 28, device="meta"), WHOLE)
    assert cost.forward_flops(shape, WHOLE, 3) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("tokens", ["needed", "all"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_backward_flops_are_those_that_torch_counts(spec: Tunables, tokens: Tokens) -> None:
    output = tuned_model("meta", spec=spec, tokens=tokens)(torch.empty(3, 1, 28, 28, device="meta"), WHOLE).sum()
    with FlopCounterMode(display=False) as counter:
        output.backward()
    shape, counted = shape_of(spec, tokens), counter.get_total_flops()
    formula, lowest = cost.backward_flops(shape, WHOLE, 3), shape.lowest_tunable_block
    # The lowest tuned block is counted whole; without prompts its own input needs no gradient, and torch does less.
    is_exact = lowest == 4 or shape.of_block(lowest).prompts
    spared = 0 if is_exact else cost.backward_flops(shape, Segment(lowest, lowest + 1), 3)
    assert counted * 0.98 <= formula <= counted * 1.02 + spared


def test_doras_factors_are_multiplied_out_once_a_call() -> None:
    shape, alike = (shape_of(Tunables(prompts=0, lora_rank=8, lora_kind=kind)) for kind in ("dora", "lora"))
    once = cost.forward_flops(shape, WHOLE) - cost.forward_flops(alike, WHOLE)
    assert once == 4 * 2 * (4 * 64 * 64 * 8)
    assert cost.forward_flops(shape, WHOLE, 9) - cost.forward_flops(alike, WHOLE, 9) == once


def test_a_frozen_backbone_costs_about_one_forward_pass_backward_and_nothing_below_the_lowest_tunable() -> None:
    block = Segment(1, 2)
    assert 1.0 < cost.backward_flops(TUNED, block) / cost.forward_flops(TUNED, block) < 1.3
    assert cost.backward_flops(TUNED, Segment(0, 1, has_embedding=True)) == 0
    assert cost.backward_flops(FROZEN, WHOLE) == 2 * 64 * 10


@given(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(SPECS))
def test_segments_sum_to_the_whole(cuts: list[int], spec: Tunables) -> None:
    bounds, shape = [0, *sorted(cuts), 4], shape_of(spec)
    pieces = [Segment(a, b, i == 0, i == len(cuts)) for i, (a, b) in enumerate(pairwise(bounds))]
    for measure in (cost.num_parameters, cost.num_tunables, cost.forward_flops, cost.backward_flops):
        assert sum(measure(shape, piece) for piece in pieces) == measure(shape, WHOLE)


@pytest.mark.parametrize("spec", [*(spec for spec in SPECS if spec.first_block < 4), replace(SPEC, backbone="all")])
@pytest.mark.parametrize(("batch", "tokens"), [(1, "needed"), (4, "needed"), (4, "all")])
def test_the_kept_activations_bound_what_autograd_keeps(batch: int, tokens: Tokens, spec: Tunables) -> None:
    packed: weakref.WeakSet[Packed] = weakref.WeakSet()
    model = tuned_model("cpu", "sdpa", spec, tokens)

    def pack(tensor: torch.Tensor) -> Packed:
        one = Packed(tensor)
        packed.add(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        output = model(torch.zeros(batch, 1, 28, 28), WHOLE)
    assert output.requires_grad
    kept = {storage.data_ptr(): storage.nbytes() for storage in (one.tensor.untyped_storage() for one in packed)}
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    formula = 4 * batch * cost.kept_activations(shape_of(spec, tokens), WHOLE)
    assert 0.6 * formula < sum(kept.values()) <= formula


class Packed:
    """A tensor that a graph keeps; it dies with the graph."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_memory_is_parameters_states_and_activations() -> None:
    held = cost.memory_bytes(TUNED, [WHOLE], 0)
    parameters = cost.num_parameters(TUNED, WHOLE) + cost.num_adapter_parameters(TUNED, WHOLE)
    assert held == 4 * (parameters + 3 * cost.num_tunables(TUNED, WHOLE))
    in_block, in_last = (17 + 8) * (8 * 64 + 128), (17 + 8) * 4 * 64 + (4 * 64 + 128)
    in_flight = 4 * 20 * (2 * in_block + in_last + 2 * 64 + in_block)
    assert cost.memory_bytes(TUNED, [WHOLE], 20) == held + in_flight
    assert cost.memory_bytes(TUNED, [WHOLE], 0, tunes=False) == 4 * parameters


@pytest.mark.parametrize("tokens", ["needed", "all"])
@pytest.mark.parametrize("cut", range(5))
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_crosses_a_cut_is_what_the_segment_below_gives(cut: int, spec: Tunables, tokens: Tokens) -> None:
    below = tuned_model("meta", spec=spec, tokens=tokens)(
        torch.empty(1, 1, 28, 28, device="meta"), Segment(0, cut, has_embedding=True)
    )
    assert cost.activation_bytes(shape_of(spec, tokens), cut) == 4 * below.numel()


def test_deep_prompts_cross_no_cut_and_shallow_ones_all_above_their_block() -> None:
    shallow = shape_of(Tunables(prompts=6, lora_rank=0, prompt_depth="shallow", first_block=1))
    assert [TUNED.tokens_on_cut(cut) for cut in range(5)] == [17, 17, 17, 17, 1]
    assert [shallow.tokens_on_cut(cut) for cut in range(5)] == [17, 17, 23, 23, 1]


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_a_clusters_shape_is_that_of_its_own_tunables(rank: int) -> None:
    spec = replace(SPEC, blocks={"2..3": BlockTunables(lora_rank=2)}, cluster_ranks={"edge-0.cluster-0": rank})
    assert shape_of(spec).with_rank_at_most(rank) == shape_of(spec.of_cluster("edge-0.cluster-0"))
    assert shape_of(spec).with_rank_at_most(None) == shape_of(spec.of_cluster("edge-0.cluster-1"))
