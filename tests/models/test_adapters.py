"""The tuned model on disk: what is saved is what was tuned, and plain PEFT reads what it can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import ViTForImageClassification

from ecogen.config import BlockTunables
from ecogen.config import Tunables as Spec
from ecogen.errors import CheckpointError
from ecogen.models.adapters import classification_config, load_tuned, load_whole, save_tuned
from ecogen.models.checkpoint import load_tensors, open_foundation, save_tensors
from ecogen.models.tunables import get_tunables, set_tunables
from ecogen.models.vit import SegmentedViT, whole_segment
from tests.tiny import save_foundation
from tests.tuning.clusters import KINDS, random_batches

IMAGES = random_batches(1, 5)[0].images


def tuned(foundation_folder: Path, spec: Spec) -> tuple[SegmentedViT, dict[str, Tensor]]:
    foundation = open_foundation(foundation_folder)
    model = load_whole(foundation, classification_config(foundation, 10), spec, seed=0)
    generator = torch.Generator().manual_seed(1)
    tunables = {name: 0.2 * torch.randn(t.shape, generator=generator) for name, t in get_tunables(model).items()}
    set_tunables(model, tunables)
    return model, tunables


@torch.no_grad()
def logits_of(model: SegmentedViT) -> Tensor:
    model.gives_all_tokens = True  # then nothing is computed in another order than transformers does
    return model(IMAGES, whole_segment(model.whole.config))


@pytest.mark.parametrize(
    "spec",
    [
        Spec(prompts=2, lora_rank=2),
        Spec(prompts=0, lora_rank=3, lora_targets=("q_proj", "k_proj", "o_proj")),
        Spec(prompts=2, lora_rank=0),
        Spec(prompts=0, lora_rank=0),
        Spec(prompts=1, lora_rank=1, head=False, first_block=1),
        Spec(prompts=0, lora_rank=2, first_block=2),
        *KINDS,
    ],
    ids=str,
)
def test_a_saved_model_gives_the_same_outputs(foundation: Path, tmp_path: Path, spec: Spec) -> None:
    model, tunables = tuned(foundation, spec)
    save_tuned(tmp_path, open_foundation(foundation), tunables, spec, 10)
    with torch.no_grad():
        assert torch.equal(load_tuned(tmp_path)(IMAGES).logits, logits_of(model))


@pytest.mark.parametrize(
    "spec",
    [
        Spec(prompts=0, lora_rank=2),
        Spec(prompts=0, lora_rank=2, first_block=2),
        Spec(prompts=0, lora_rank=3, lora_kind="rslora"),
        Spec(prompts=0, lora_rank=3, lora_kind="dora", lora_targets=("k_proj", "o_proj")),
        Spec(prompts=0, lora_rank=2, blocks={"0..1": BlockTunables(lora_rank=0), "2..3": BlockTunables(lora_rank=5)}),
        Spec(prompts=0, lora_rank=2, lora_kind="rslora", blocks={"0..2": BlockTunables(lora_rank=3)}),
        Spec(prompts=0, lora_rank=0, ia3=True),
        Spec(prompts=0, lora_rank=0, ia3=True, blocks={"1..2": BlockTunables(ia3=False)}),
    ],
    ids=str,
)
def test_plain_peft_gives_the_same_outputs_with_all_that_it_knows(foundation: Path, tmp_path: Path, spec: Spec) -> None:
    model, tunables = tuned(foundation, spec)
    save_tuned(tmp_path, open_foundation(foundation), tunables, spec, 10)
    base = ViTForImageClassification.from_pretrained(tmp_path / "backbone", num_labels=10)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(IMAGES).logits, logits_of(model), rtol=1e-6, atol=1e-6)
    assert "plain PEFT gives the tuned model's outputs" in (tmp_path / "adapter/README.md").read_text()


@pytest.mark.parametrize(
    ("spec", "missed"),
    [
        (Spec(prompts=2, lora_rank=2), "misses the 2 deep visual prompts of each block, which"),
        (Spec(prompts=2, lora_rank=2, blocks={"0..1": BlockTunables(prompts=3)}), "misses the 2 to 3 deep visual prom"),
        (Spec(prompts=2, lora_rank=2, prompt_depth="shallow"), "misses the 2 shallow visual prompts, which"),
        (Spec(prompts=0, lora_rank=2, bottleneck=3), "misses the bottleneck adapters, which"),
        (Spec(prompts=0, lora_rank=2, blocks={"0..1": BlockTunables(backbone="all")}), "misses what was tuned of the"),
    ],
)
def test_the_adapter_says_what_plain_peft_misses(foundation: Path, tmp_path: Path, spec: Spec, missed: str) -> None:
    model, tunables = tuned(foundation, spec)
    save_tuned(tmp_path, open_foundation(foundation), tunables, spec, 10)
    readme = (tmp_path / "adapter/README.md").read_text()
    assert missed in readme
    assert "ecogen.load_tuned" in readme
    base = ViTForImageClassification.from_pretrained(tmp_path / "backbone", num_labels=10)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert not torch.allclose(plain(IMAGES).logits, logits_of(model), atol=1e-3)


@pytest.mark.parametrize("spec", [spec for spec in KINDS if not spec.prompts], ids=str)
def test_what_is_added_begins_by_changing_nothing(foundation: Path, spec: Spec) -> None:
    opened = open_foundation(foundation)
    config = classification_config(opened, 10)
    model = load_whole(opened, config, spec, seed=0)
    bare = load_whole(opened, config, Spec(prompts=0, lora_rank=0), seed=0)
    for classifier in (model.whole.classifier, bare.whole.classifier):
        classifier.weight.data.fill_(1.0)[0] = 2.0
    torch.testing.assert_close(logits_of(model), logits_of(bare), rtol=1e-6, atol=1e-6)


def test_doras_magnitudes_begin_as_the_norms_of_the_frozen_rows_whatever_the_seed(foundation: Path) -> None:
    opened = open_foundation(foundation)
    spec = Spec(prompts=0, lora_rank=2, lora_kind="dora")
    name = "vit.layers.1.attention.q_proj"
    (weight,) = opened.read([f"{name}.weight"]).values()
    for seed in (0, 1):
        begun = get_tunables(load_whole(opened, classification_config(opened, 10), spec, seed))
        torch.testing.assert_close(begun[f"{name}.lora_magnitude_vector.weight"], weight.square().sum(1).sqrt())


def test_a_folder_that_holds_no_tuned_model_or_a_damaged_one_says_so(foundation: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tunables\.safetensors is missing: .* holds no tunables"):
        load_tuned(tmp_path)
    spec = Spec(prompts=1, lora_rank=1)
    _, tunables = tuned(foundation, spec)
    save_tuned(tmp_path, open_foundation(foundation), tunables, spec, 10)
    path = tmp_path / "tunables.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="corrupt"):
        load_tuned(tmp_path)
    save_tensors(path, tunables)
    with pytest.raises(CheckpointError, match="does not say what it holds"):
        load_tuned(tmp_path)


# The foundation model's folder.


def test_a_sharded_folder_is_read_like_a_single_file(foundation: Path, tmp_path: Path) -> None:
    sharded = open_foundation(save_foundation(tmp_path, max_shard_size="5KB"))
    single = open_foundation(foundation)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert sharded.files.keys() == single.files.keys()
    names = list(single.files)
    one, other = single.read(names), sharded.read(names)
    assert all(torch.equal(one[name], other[name]) for name in names)


def test_only_the_named_tensors_are_read(foundation: Path) -> None:
    name = "vit.layers.1.mlp.fc1.weight"
    assert open_foundation(foundation).read([name, "vit.nonsense"]).keys() == {name}


def test_a_head_that_fits_is_kept_and_another_begins_at_zero(tmp_path: Path) -> None:
    from tests.tiny import tiny_config, tiny_vit

    whole = tiny_vit(tiny_config(2))
    whole.save_pretrained(tmp_path)
    foundation = open_foundation(tmp_path)
    spec = Spec(prompts=0, lora_rank=1, head=False)
    kept = load_whole(foundation, classification_config(foundation, 10), spec, 0)
    assert torch.equal(kept.whole.classifier.weight, whole.classifier.weight)
    other = load_whole(foundation, classification_config(foundation, 7), spec, 0)
    assert not other.whole.classifier.weight.any()


def test_a_digest_names_the_content(foundation: Path, tmp_path: Path) -> None:
    same, other = save_foundation(tmp_path / "same"), save_foundation(tmp_path / "other", seed=1)
    digests = [open_foundation(folder).digest for folder in (foundation, same, other)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "is no model folder"),
        ("config.json", "{nonsense", "is no model folder"),
        ("config.json", "[]", "is no model folder"),
        ("config.json", '{"model_type": "bert"}', "cannot be cut|is no model folder"),
        ("model.safetensors", None, r"model\.safetensors is missing or corrupt"),
        ("model.safetensors", "short", r"model\.safetensors is missing or corrupt"),
        ("model.safetensors.index.json", "[]", "is corrupt"),
    ],
)
def test_a_damaged_folder_is_a_checkpoint_error(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    folder = save_foundation(tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_foundation(folder)


def test_a_tensors_file_that_is_missing_or_damaged_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*: No such file"):
        load_tensors(tmp_path / "missing")
    (tmp_path / "bad").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="is corrupt"):
        load_tensors(tmp_path / "bad")
