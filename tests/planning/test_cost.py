"""The formulas equal what transformers builds and what torch counts and keeps."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from ecogen.config import Tunables
from ecogen.models.tunables import attach_tunables, named_tunables
from ecogen.models.vit import SegmentedViT, empty_vit
from ecogen.placement import Segment
from ecogen.planning import cost
from ecogen.planning.cost import ModelShape

FROZEN = ModelShape(4, 64, 128, num_tokens=17, patch_dim=49, num_labels=10)
TUNED = replace(FROZEN, prompts_per_block=8, lora_rank=4, num_lora_targets=2, first_tunable_block=1)
SPEC = Tunables(prompts=8, lora_rank=4, first_block=1)
WHOLE = Segment(0, 4, has_embedding=True, has_head=True)
CUT = [Segment(0, 1, has_embedding=True), Segment(1, 3), Segment(3, 4), Segment(4, 4, has_head=True)]


def vit_config(attention: str = "eager", **changes: int) -> ViTConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"image_size": 28, "patch_size": 7, "num_channels": 1, "num_labels": 10}
    return ViTConfig(**(sizes | changes), attn_implementation=attention)


def tuned_model(device: str, attention: str = "eager", spec: Tunables = SPEC) -> SegmentedViT:
    model = empty_vit(vit_config(attention), [WHOLE]).to_empty(device=device)
    attach_tunables(model, spec)
    return model


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
    assert cost.parameter_bytes(shape, WHOLE) == 4 * model.num_parameters()


@pytest.mark.parametrize("segment", CUT, ids=str)
def test_each_segment_has_the_parameters_of_its_modules(segment: Segment) -> None:
    held = empty_vit(vit_config(), [segment]).whole
    assert cost.num_parameters(FROZEN, segment) == sum(p.numel() for p in held.parameters())


SPECS = [
    SPEC,
    Tunables(prompts=0, lora_rank=4, head=False),
    Tunables(prompts=3, lora_rank=0),
    Tunables(backbone="biases", first_block=0),
    Tunables(prompts=0, lora_rank=0, backbone="biases", first_block=2),
    Tunables(prompts=0, lora_rank=0, backbone="all"),
    Tunables(prompts=2, lora_rank=1, backbone="all", first_block=3, head=False),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_tunables_equal_those_that_train(spec: Tunables) -> None:
    shape = replace(
        FROZEN,
        prompts_per_block=spec.prompts,
        lora_rank=spec.lora_rank,
        num_lora_targets=len(spec.lora_targets),
        first_tunable_block=spec.first_block,
        head_trains=spec.head,
        backbone=spec.backbone,
    )
    trained = sum(parameter.numel() for _, parameter in named_tunables(tuned_model("meta", spec=spec)))
    assert cost.num_tunables(shape, WHOLE) == trained
    assert cost.tunable_bytes(shape, WHOLE) == 4 * trained


def test_forward_flops_are_those_that_torch_counts() -> None:
    for shape, model in ((FROZEN, empty_vit(vit_config(), [WHOLE])), (TUNED, tuned_model("meta"))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(3, 1, 28, 28, device="meta"), WHOLE)
        assert cost.forward_flops(shape, WHOLE) * 3 == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("backbone", ["frozen", "biases", "all"])
@pytest.mark.parametrize("first_block", [0, 1])
def test_backward_flops_are_those_that_torch_counts(backbone: str, first_block: int) -> None:
    shape = replace(TUNED, backbone=backbone, first_tunable_block=first_block)  # type: ignore[arg-type]
    model = tuned_model("meta", spec=replace(SPEC, backbone=backbone, first_block=first_block))  # type: ignore[arg-type]
    output = model(torch.empty(3, 1, 28, 28, device="meta"), WHOLE).sum()
    with FlopCounterMode(display=False) as counter:
        output.backward()
    assert cost.backward_flops(shape, WHOLE) * 3 == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_frozen_backbone_costs_about_one_forward_pass_backward_and_nothing_below_the_lowest_tunable() -> None:
    block = Segment(1, 2)
    assert 1.0 < cost.backward_flops(TUNED, block) / cost.forward_flops(TUNED, block) < 1.3
    assert cost.backward_flops(TUNED, Segment(0, 1, has_embedding=True)) == 0
    only_head = replace(FROZEN, num_lora_targets=2)
    assert cost.backward_flops(only_head, WHOLE) == 2 * 64 * 10


@given(st.lists(st.integers(0, 4), max_size=4))
def test_segments_sum_to_the_whole(cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), 4]
    pieces = [Segment(a, b, i == 0, i == len(cuts)) for i, (a, b) in enumerate(pairwise(bounds))]
    for measure in (cost.num_parameters, cost.num_tunables, cost.forward_flops, cost.backward_flops):
        assert sum(measure(TUNED, piece) for piece in pieces) == measure(TUNED, WHOLE)


@pytest.mark.parametrize("backbone", ["frozen", "biases", "all"])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_kept_activations_bound_what_autograd_keeps(batch: int, backbone: str) -> None:
    kept: dict[int, int] = {}
    shape, spec = (replace(value, backbone=backbone) for value in (TUNED, SPEC))  # type: ignore[type-var]
    model = tuned_model("cpu", "sdpa", spec)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.zeros(batch, 1, 28, 28), WHOLE)
    assert output.requires_grad
    formula = 4 * batch * cost.kept_activations(shape, WHOLE)
    assert 0.6 * formula < sum(kept.values()) <= formula


def test_memory_is_parameters_states_and_activations() -> None:
    held = cost.memory_bytes(TUNED, [WHOLE], 0)
    parameters = cost.num_parameters(TUNED, WHOLE) + cost.num_adapter_parameters(TUNED, WHOLE)
    assert held == 4 * (parameters + 3 * cost.num_tunables(TUNED, WHOLE))
    in_block = (17 + 8) * (8 * 64 + 128)
    in_flight = 4 * 20 * (3 * in_block + 2 * 64 + in_block)
    assert cost.memory_bytes(TUNED, [WHOLE], 20) == held + in_flight
    assert cost.memory_bytes(TUNED, [WHOLE], 0, tunes=False) == 4 * parameters


def test_activations_on_a_cut_carry_no_prompts() -> None:
    assert cost.activation_bytes(TUNED, 1) == cost.activation_bytes(FROZEN, 1) == 4 * 17 * 64
    assert cost.activation_bytes(TUNED, TUNED.num_blocks) == 4 * 64
