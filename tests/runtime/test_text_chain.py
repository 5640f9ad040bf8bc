"""A chain of a decoder's segments equals the whole model with PEFT's adapters on it, bit for bit in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from ecogen.config import BlockTunables
from ecogen.config import Tunables as Spec
from ecogen.errors import CheckpointError
from ecogen.models.tunables import check_targets, named_tunables, set_tunables
from ecogen.placement import Segment
from ecogen.runtime.chain import Chain
from tests.texts import save_text_foundation
from tests.tuning.passages import SPEC, TextCase, lora_of, plain_loss, random_passages

FAMILIES = ("llama", "gemma2", "qwen3_next", "gpt_neox")

FolderOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_text_foundation(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return folder


def chain_of(case: TextCase) -> Chain:
    models = {node_id: case.model_of(case.placement.segments_of(node_id)) for node_id in case.placement.node_ids}
    for model in models.values():
        set_tunables(model, case.tunables)
    return Chain(case.placement, models)


@pytest.mark.parametrize("labels", ["start", "end"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_outputs_and_lora_gradients_are_those_of_the_whole_model(folder_of: FolderOf, kind: str, labels: str) -> None:
    assert_equal(TextCase(folder_of(kind), labels=labels))


@pytest.mark.parametrize(
    "spec",
    [
        Spec(prompts=0, head=False, lora_rank=2, lora_kind="dora", lora_targets=("q_proj", "down_proj")),
        Spec(prompts=0, head=False, lora_rank=2, lora_kind="rslora", first_block=1),
        Spec(prompts=0, head=False, lora_rank=2, blocks={"1..2": BlockTunables(lora_rank=4)}),
        Spec(prompts=0, head=False, lora_rank=0, ia3=True),
    ],
    ids=str,
)
def test_with_every_kind_of_adapters_they_are(folder_of: FolderOf, spec: Spec) -> None:
    assert_equal(TextCase(folder_of("llama"), cuts=(2,), spec=spec))


def assert_equal(case: TextCase) -> None:
    (batch,) = random_passages(1, 3)
    chain, plain = chain_of(case), case.plain()
    logits = chain(batch.tokens)
    assert torch.equal(logits, plain(input_ids=batch.tokens).logits)
    cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
    plain_loss(plain, batch).backward()
    grads = {name: p.grad for model in chain.held for name, p in named_tunables(model)}
    truth = {name: p.grad for name, p in lora_of(plain).items()}
    assert grads.keys() == truth.keys() != set()
    assert all(torch.equal(grads[name], truth[name]) for name in truth)


def test_blocks_may_be_run_in_parts_of_a_held_segment(folder_of: FolderOf) -> None:
    """As tuning does with what is frozen below the tunables."""
    case = TextCase(folder_of("gemma2"), cuts=())
    (node,) = case.placement.node_ids
    model, (batch,) = case.model_of(case.held_by(node)), random_passages(1, 2)
    (whole,) = case.held_by(node)
    with torch.no_grad():
        below = model(batch.tokens, Segment(0, 1, has_embedding=True))
        above = model(below, Segment(1, whole.stop, has_head=True))
        assert torch.equal(above, model(batch.tokens, whole))
        assert torch.equal(model(below, Segment(1, 1)), below)


def test_targets_are_named_as_the_family_names_them_or_by_their_part(folder_of: FolderOf) -> None:
    fused = Spec(prompts=0, head=False, lora_rank=2, lora_targets=("query_key_value",))
    assert_equal(TextCase(folder_of("gpt_neox"), spec=fused))
    parts = {"qwen3_next": {"linear_attn", "self_attn"}, "gpt_neox": {"attention"}, "llama": {"self_attn"}}
    for kind, names in parts.items():
        assert {name.split(".")[3] for name in TextCase(folder_of(kind), spec=SPEC).tunables} == names
    both = Spec(prompts=0, head=False, lora_targets=("attention", "mlp"))
    assert {name.split(".")[3] for name in TextCase(folder_of("llama"), spec=both).tunables} == {"self_attn", "mlp"}


def test_a_target_that_no_block_has_is_an_error_that_says_which_there_are(folder_of: FolderOf) -> None:
    case = TextCase(folder_of("gpt_neox"))
    model = case.model_of([Segment(0, 3, has_embedding=True, has_head=True)])
    with pytest.raises(CheckpointError, match=r"'gpt_neox' model has a linear layer 'q_proj'; name some of .*dense"):
        check_targets(model.whole, Spec(lora_targets=("q_proj",)))
    with pytest.raises(CheckpointError, match=r"tunables\.ia3: it is not known which layers of a 'gpt_neox' model"):
        check_targets(model.whole, Spec(lora_rank=0, ia3=True))
