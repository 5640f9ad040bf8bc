"""Rows with adapters of their own compute what PEFT computes for each alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from ecogen.errors import CheckpointError
from ecogen.models.decoder import load_decoder
from ecogen.models.mixed_lora import MixedLora, open_adapter
from ecogen.placement import Segment
from tests.models.decoders import NUM_BLOCKS, save_decoder

WHOLE = Segment(0, NUM_BLOCKS, has_embedding=True, has_head=True)
SEGMENTS = [Segment(0, 2, has_embedding=True), Segment(2, NUM_BLOCKS, has_head=True)]


def save_adapter(model: Path, folder: Path, seed: int, **settings: object) -> Path:
    """A random adapter of PEFT's."""
    values = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | settings
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(**values))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    tuned.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_decoder("llama", folder)
    return folder


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of several kinds; the last one has nothing in the lower segment."""
    folder = tmp_path_factory.mktemp("adapters")
    kinds: list[dict[str, object]] = [
        {},
        {"r": 5, "use_rslora": True, "target_modules": "all-linear"},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 7}, "alpha_pattern": {"down_proj": 2}},
        {"layers_to_transform": [4, 5]},
    ]
    return {f"a{i}": save_adapter(model, folder / f"a{i}", i, **kind) for i, kind in enumerate(kinds)}


def plain(model: Path, adapter: Path, ids: Tensor) -> Tensor:
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).eval()
    with torch.no_grad():
        return whole(ids).logits


def test_each_row_has_its_adapter(model: Path, adapters: dict[str, Path]) -> None:
    ids = torch.randint(3, 99, (6, 9), generator=torch.Generator().manual_seed(1))
    rows = ["a1", "", "a0", "a3", "a1", "a2"]
    state: Tensor = ids
    for segment in SEGMENTS:
        part = load_decoder(model, [segment])
        mixed = MixedLora(part)
        for adapter_id, folder in adapters.items():
            mixed.hold(adapter_id, open_adapter(folder).of_blocks(segment.blocks))
        with torch.no_grad(), mixed.rows(rows):
            state = part(state, segment)
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    for row, name in enumerate(rows):
        alone = plain(model, adapters[name], ids[row : row + 1]) if name else base(ids[row : row + 1]).logits
        assert torch.allclose(state[row : row + 1], alone, atol=2e-5), name
    assert not torch.allclose(state[:1], base(ids[:1]).logits, atol=0.1)


@torch.no_grad()
def test_adapters_come_and_go(model: Path, adapters: dict[str, Path]) -> None:
    ids = torch.randint(3, 99, (2, 5), generator=torch.Generator().manual_seed(2))
    part = load_decoder(model, [WHOLE])
    base, mixed = part(ids, WHOLE), MixedLora(part)
    names = {name for name, _ in part.whole.named_parameters()}
    with mixed.rows(["a0", "a0"]):
        assert torch.equal(part(ids, WHOLE), base)
    for first, second in (("a0", "a1"), ("a1", "a0")):
        mixed.hold("a", open_adapter(adapters[first]))
        mixed.hold("a", open_adapter(adapters[second]))
        assert torch.equal(part(ids, WHOLE), base), "no row asks for it"
        with mixed.rows(["a", "a"]):
            assert torch.allclose(part(ids, WHOLE), plain(model, adapters[second], ids), atol=2e-5)
    mixed.drop("a")
    with mixed.rows(["a", "a"]):
        assert torch.equal(part(ids, WHOLE), base)
    assert {name.replace(".base_layer", "") for name, _ in part.whole.named_parameters()} == names
    assert not any(parameter.requires_grad for parameter in part.whole.parameters())


# What may be wrong.


def test_an_adapter_of_another_model(model: Path, tmp_path: Path) -> None:
    save_decoder("llama", tmp_path / "wider", hidden_size=128)
    adapter = open_adapter(save_adapter(tmp_path / "wider", tmp_path / "adapter", 1))
    part = load_decoder(model, [WHOLE])
    mixed = MixedLora(part)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        mixed.hold("a", adapter)
    ids = torch.randint(3, 99, (2, 5))
    with torch.no_grad(), mixed.rows(["a", "a"]):
        assert torch.equal(part(ids, WHOLE), load_decoder(model, [WHOLE])(ids, WHOLE))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "use_dora is true, which cannot share a batch"),
        ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head.* is no LoRA of a block"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is a list"),
    ],
)
def test_kinds_that_cannot_share_a_batch(model: Path, tmp_path: Path, settings: dict[str, object], reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"cannot be served: {reason}.*; merge it"):
        open_adapter(save_adapter(model, tmp_path, 1, **settings))


def test_other_methods_and_no_adapter(model: Path, tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match='it is "IA3", and only LoRA'):
        open_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="is no adapter"):
        open_adapter(tmp_path / "none")
