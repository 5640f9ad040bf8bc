"""An adapter's configuration comes from anybody: it changes what its own rows compute, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from ecogen.errors import CheckpointError
from ecogen.models import mixed_lora
from ecogen.models.decoder import SegmentedDecoder, load_decoder
from ecogen.models.lora_config import read_settings
from ecogen.models.mixed_lora import Adapter, MixedLora, open_adapter
from tests.models.decoders import save_decoder
from tests.models.test_mixed_lora import WHOLE, plain, save_adapter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_decoder("llama", folder)
    return folder


def changed(folder: Path, **fields: Any) -> Path:
    """An adapter's folder after its configuration was written anew."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def backbone(part: SegmentedDecoder) -> dict[str, Tensor]:
    """A copy of all that is no adapter's."""
    weights = part.whole.state_dict().items()
    return {name.replace(".base_layer", ""): tensor.clone() for name, tensor in weights if ".lora_" not in name}


def are_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def said(part: SegmentedDecoder, mixed: MixedLora, ids: Tensor, adapter_id: str) -> Tensor:
    with torch.no_grad(), mixed.rows([adapter_id] * len(ids)):
        return part(ids, WHOLE)


IDS = torch.randint(3, 99, (2, 5), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"init_lora_weights": "olora"}, 'is "olora".* convert it with PEFT.*path_initial_model_for_weight_conversion'),
        ({"init_lora_weights": "pissa"}, "belong to a backbone that was changed"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
        ({"init_lora_weights": [1]}, "init_lora_weights is a list"),
        ({"layer_replication": [[0, 2], [0, 4]]}, "layer_replication is a list, which cannot share a batch"),
        ({"rank_pattern": {"((([a-z._0-9]+)+)+)+X": 4}}, "rank_pattern has .* no name of a module"),
        ({"alpha_pattern": {"((([a-z._0-9]+)+)+)+X": 4}}, "alpha_pattern has .* no name of a module"),
        ({"rank_pattern": [1]}, r"Expected `object \| null`, got `array` - at `\$.rank_pattern`"),
        ({"rank_pattern": {"q_proj": "many"}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern"),
        ({"lora_alpha": "much"}, r"`\$.lora_alpha`"),
        ({"lora_alpha": float("nan")}, "must be finite"),
        ({"lora_alpha": 10**400}, "adapter_config.json"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"r": 10**9}, "says rank 1000000000 of .*, its tensors have 3"),
        ({"r": 10**30}, "adapter_config.json"),
        ({"r": -1}, r"`\$.r`"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"megatron_core": "os"}, "megatron_core"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"target_parameters": ["mlp"]}, "target_parameters"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config"),
        ({"kasa_config": {}}, "kasa_config"),
        ({"use_qalora": True}, "use_qalora"),
        ({"something_new": 1}, "something_new is 1, which cannot share a batch"),
        ({"peft_type": "VERA"}, 'it is "VERA", and only LoRA'),
    ],
)
def test_what_is_refused_changes_nothing(model: Path, tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    """And a good adapter can still be held after it."""
    part = load_decoder(model, [WHOLE])
    before, mixed = backbone(part), MixedLora(part)
    with pytest.raises(CheckpointError, match=told):
        mixed.hold("bad", open_adapter(changed(save_adapter(model, tmp_path / "bad", 1), **fields)))
    good = save_adapter(model, tmp_path / "good", 2)
    mixed.hold("good", open_adapter(good))
    assert are_equal(backbone(part), before)
    assert torch.allclose(said(part, mixed, IDS, "good"), plain(model, good, IDS), atol=2e-5)


@pytest.mark.parametrize("beginning", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_beginnings_that_leave_the_backbone_as_it_was(model: Path, tmp_path: Path, beginning: bool | str) -> None:
    adapter = save_adapter(model, tmp_path, 1, r=4)
    wanted = plain(model, adapter, IDS)
    part = load_decoder(model, [WHOLE])
    before, mixed = backbone(part), MixedLora(part)
    mixed.hold("a", open_adapter(changed(adapter, init_lora_weights=beginning)))
    assert torch.allclose(said(part, mixed, IDS, "a"), wanted, atol=2e-5)
    assert are_equal(backbone(part), before)
    mixed.drop("a")
    assert are_equal(backbone(part), before)


def test_a_converted_adapter_is_taken(model: Path, tmp_path: Path) -> None:
    """As the refusal of what PiSSA began says to convert it."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], init_lora_weights="pissa")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    tuned.peft_config["default"].init_lora_weights = True
    tuned.save_pretrained(tmp_path / "first")
    tuned.peft_config["default"].init_lora_weights = "pissa"
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    with torch.no_grad():
        wanted = tuned.eval()(IDS).logits
    tuned.save_pretrained(tmp_path / "pissa")
    with pytest.raises(CheckpointError, match="convert it"):
        open_adapter(tmp_path / "pissa")
    tuned.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    part = load_decoder(model, [WHOLE])
    mixed = MixedLora(part)
    mixed.hold("a", open_adapter(tmp_path / "plain"))
    assert torch.allclose(said(part, mixed, IDS, "a"), wanted, atol=1e-3)


@pytest.mark.parametrize("use_rslora", [True, False])
def test_patterns_are_names_and_ends_of_names(model: Path, tmp_path: Path, use_rslora: bool) -> None:
    """As PEFT has them: the first that fits counts, a dot may be escaped, a part of a word is none."""
    adapter = save_adapter(
        model,
        tmp_path,
        1,
        use_rslora=use_rslora,
        rank_pattern={re.escape("model.layers.1.self_attn.q_proj"): 7, "q_proj": 2, "layers.0.mlp.down_proj": 1},
        alpha_pattern={"self_attn.q_proj": 3, "model.layers.2.self_attn.q_proj": 5, "proj": 11},
    )
    part = load_decoder(model, [WHOLE])
    mixed = MixedLora(part)
    mixed.hold("a", open_adapter(adapter))
    assert torch.allclose(said(part, mixed, IDS, "a"), plain(model, adapter, IDS), atol=2e-5)


def test_what_only_describes_is_not_read(model: Path, tmp_path: Path) -> None:
    adapter = save_adapter(model, tmp_path, 1)
    wanted = plain(model, adapter, IDS)
    part = load_decoder(model, [WHOLE])
    mixed = MixedLora(part)
    said_of_it = {"task_type": [1], "revision": {}, "target_modules": "((a+)+)+X", "layers_pattern": "((a+)+)+X"}
    mixed.hold("a", open_adapter(changed(adapter, **said_of_it, exclude_modules=".*", lora_dropout="x")))
    assert torch.allclose(said(part, mixed, IDS, "a"), wanted, atol=2e-5)


@pytest.mark.parametrize("problem", [MemoryError("no room"), KeyboardInterrupt(), AssertionError("strange")])
def test_a_hold_that_fails_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    """Wherever and however it fails."""
    adapter = save_adapter(model, tmp_path, 1)
    part = load_decoder(model, [WHOLE])
    before, mixed = backbone(part), MixedLora(part)
    inject = mixed_lora.inject_adapter_in_model

    def inject_and_fail(*args: Any) -> None:
        inject(*args)
        raise problem

    monkeypatch.setattr(mixed_lora, "inject_adapter_in_model", inject_and_fail)
    with pytest.raises(type(problem)):
        mixed.hold("a", open_adapter(adapter))
    monkeypatch.undo()
    assert not [name for name in part.whole.state_dict() if ".lora_" in name]
    assert torch.equal(said(part, mixed, IDS, "a"), load_decoder(model, [WHOLE])(IDS, WHOLE))
    mixed.hold("a", open_adapter(adapter))
    assert torch.allclose(said(part, mixed, IDS, "a"), plain(model, adapter, IDS), atol=2e-5)
    assert are_equal(backbone(part), before)


@pytest.mark.parametrize(
    ("module", "shape", "told"),
    [
        ("model.layers.0.nothing", (3, 64), "it has no linear layer 'model.layers.0.nothing'"),
        ("model.layers.0", (3, 64), "it has no linear layer"),
        ("layers.0.self_attn.q_proj", (3, 64), "it has no linear layer"),
        ("model.layers.0.self_attn.q_proj.base_layer", (3, 64), "it has no linear layer"),
        ("model.layers.0.self_attn.q_proj", (3, 65), "takes 64 features and gives 64, not as"),
    ],
)
def test_tensors_that_do_not_fit(model: Path, module: str, shape: tuple[int, int], told: str) -> None:
    part = load_decoder(model, [WHOLE])
    before, mixed = backbone(part), MixedLora(part)
    tensors = {f"{module}.lora_A.weight": torch.ones(shape), f"{module}.lora_B.weight": torch.ones(shape[::-1])}
    with pytest.raises(CheckpointError, match=f"does not fit the model: .*{told}"):
        mixed.hold("a", Adapter({module: 1.0}, tensors))
    assert are_equal(backbone(part), before)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 10**6, b'{"peft_type": "LORA", "r": 1e999}'])
def test_what_is_no_configuration(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        read_settings(content)
