"""The formulas of decoders equal what transformers builds and what torch counts and keeps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, Qwen2MoeConfig

from ecogen import config as recipes
from ecogen.config import BlockTunables, Tunables
from ecogen.engines.forming import announced_shape
from ecogen.models.profile import decoder_shape, shape_of
from ecogen.models.tunables import attach_to, named_tunables
from ecogen.placement import Segment
from ecogen.planning import cost
from ecogen.planning.clusters import plan_clusters
from ecogen.planning.decoder_cost import DecoderShape
from ecogen.tuning.pretrain_decoder import llama_config

TOKENS, BLOCKS, VOCABULARY = 24, 4, 300
WHOLE = Segment(0, BLOCKS, has_embedding=True, has_head=True)


def lora(**values: object) -> Tunables:
    return Tunables(prompts=0, head=False, **values)


FROZEN = lora(lora_rank=0)
SPECS = [
    lora(lora_rank=4, lora_targets=("attention", "mlp")),
    lora(lora_rank=4, lora_targets=("q_proj", "v_proj", "down_proj"), first_block=2),
    lora(lora_rank=8, lora_kind="dora", lora_targets=("attention", "gate_proj")),
    lora(lora_rank=0, ia3=True),
    lora(
        lora_rank=2,
        lora_targets=("mlp",),
        blocks={"1..2": BlockTunables(lora_rank=0), "3..4": BlockTunables(lora_rank=9)},
    ),
]


def config(**changes: object) -> LlamaConfig:
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**values | changes)


def model_of(spec: Tunables, device: str = "meta", **changes: object) -> LlamaForCausalLM:
    with torch.device(device):
        model = LlamaForCausalLM(config(**changes)).eval()
    attach_to(model, range(BLOCKS), spec)
    return model


def shape(spec: Tunables = FROZEN, **changes: object) -> DecoderShape:
    return decoder_shape(config(**changes), spec, TOKENS)


def outputs(model: LlamaForCausalLM, batch: int = 3) -> Tensor:
    device = next(model.parameters()).device
    return model(torch.zeros(batch, TOKENS, dtype=torch.int64, device=device), use_cache=False).logits


@pytest.mark.parametrize("ties", [True, False])
def test_parameters_equal_those_of_transformers(ties: bool) -> None:
    model = model_of(FROZEN, tie_word_embeddings=ties)
    assert cost.num_parameters(shape(tie_word_embeddings=ties), WHOLE) == model.num_parameters()


def test_experts_are_counted_too() -> None:
    sizes = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "hidden_size": 64}
    found = decoder_shape(Qwen2MoeConfig(num_hidden_layers=2, num_attention_heads=4, **sizes), FROZEN, TOKENS)
    assert (found.num_experts, found.active_experts, found.intermediate_size) == (6, 2, 32)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_tunables_equal_those_that_train(spec: Tunables) -> None:
    trained = sum(parameter.numel() for _, parameter in named_tunables(model_of(spec)))
    assert cost.num_tunables(shape(spec), WHOLE) == trained == cost.num_adapter_parameters(shape(spec), WHOLE)


@pytest.mark.parametrize("spec", [FROZEN, *SPECS], ids=str)
def test_forward_flops_are_those_that_torch_counts(spec: Tunables) -> None:
    model = model_of(spec, "cpu", attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        outputs(model)
    assert cost.forward_flops(shape(spec), WHOLE, 3) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_backward_flops_are_those_that_torch_counts(spec: Tunables) -> None:
    result = outputs(model_of(spec, "cpu", attn_implementation="eager")).sum()
    with FlopCounterMode(display=False) as counter:
        result.backward()
    found, counted = shape(spec), counter.get_total_flops()
    formula, lowest = cost.backward_flops(found, WHOLE, 3), found.lowest_tunable_block
    # The lowest tuned block is counted whole, though what enters it needs no gradient.
    spared = cost.backward_flops(found, Segment(lowest, lowest + 1), 3)
    assert counted * 0.97 <= formula <= counted * 1.03 + spared


@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
def test_the_kept_activations_bound_what_autograd_keeps(spec: Tunables) -> None:
    model, kept = model_of(spec, "cpu"), dict[int, Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = outputs(model).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))
    assert loss.requires_grad
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    formula = 4 * 3 * cost.kept_activations(shape(spec), WHOLE)
    assert 0.6 * formula < sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) <= formula


@given(st.lists(st.integers(1, BLOCKS - 1), unique=True), st.sampled_from(SPECS))
def test_segments_sum_to_the_whole(cuts: list[int], spec: Tunables) -> None:
    bounds = [0, *sorted(cuts), BLOCKS]
    parts = [Segment(a, b, a == 0, b == BLOCKS) for a, b in pairwise(bounds)]
    for function in (cost.num_parameters, cost.num_tunables, cost.forward_flops, cost.backward_flops):
        assert sum(function(shape(spec), part) for part in parts) == function(shape(spec), WHOLE)


def test_what_crosses_a_cut_is_every_token_and_shorter_inputs_cost_less() -> None:
    assert cost.activation_bytes(shape(), 2) == cost.activation_bytes(shape(), BLOCKS) == 4 * TOKENS * 64
    half = shape().seeing(TOKENS // 2)
    assert cost.forward_flops(half, WHOLE) < cost.forward_flops(shape(), WHOLE) / 2
    assert half.seeing(TOKENS) == shape()


def test_a_recipes_model_has_the_sizes_that_it_announces() -> None:
    recipe = recipes.load("text")
    made: PreTrainedConfig = llama_config(recipe.model)
    assert announced_shape(recipe) == shape_of(made, recipe)
    with torch.device("meta"):
        model = LlamaForCausalLM(made)
    whole = Segment(0, recipe.model.num_blocks, has_embedding=True, has_head=True)
    assert cost.num_parameters(announced_shape(recipe), whole) == model.num_parameters()


def test_a_large_vocabulary_leaves_the_start_fewer_blocks() -> None:
    """The head costs what several blocks do, so a plan gives the device that has it less."""
    recipe = recipes.load("text", ["model.num_blocks=12", "model.vocabulary_size=300", "topology.edges=1"])
    wide = recipes.load("text", ["model.num_blocks=12", "model.vocabulary_size=20000", "topology.edges=1"])
    cuts = [next(iter(plan_clusters(r, announced_shape(r)).values())).cuts for r in (recipe, wide)]
    assert cuts[1][0] < cuts[0][0]
