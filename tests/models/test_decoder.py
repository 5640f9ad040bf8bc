"""Segments of a decoder as nodes hold them: two on one node, only the own tensors, clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

from ecogen.errors import CheckpointError
from ecogen.models.checkpoint import FILE, open_foundation
from ecogen.models.decoder import SegmentedDecoder, decoder_of, load_decoder, new_cache
from ecogen.models.family import family_of
from ecogen.placement import Segment
from tests.models.decoders import NUM_BLOCKS, save_decoder

WHOLE = Segment(0, NUM_BLOCKS, has_embedding=True, has_head=True)
LOWEST, MIDDLE, HIGHEST = Segment(0, 1, has_embedding=True), Segment(1, 5), Segment(5, NUM_BLOCKS, has_head=True)
HEAD = Segment(NUM_BLOCKS, NUM_BLOCKS, has_head=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_decoder("llama", folder, tie_word_embeddings=False)
    return folder


@pytest.fixture
def whole(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 99, (3, 10), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3_next", "gemma2"])
@pytest.mark.parametrize("above", [[HIGHEST], [Segment(5, NUM_BLOCKS), HEAD]])
def test_a_u_shape(kind: str, above: list[Segment], tmp_path: Path, ids: Tensor) -> None:
    """The start holds what is below and above; each of its segments has a cache of its own."""
    whole = save_decoder(kind, tmp_path)
    start, other = load_decoder(tmp_path, [LOWEST, *above]), load_decoder(tmp_path, [MIDDLE])
    route = [(start, LOWEST), (other, MIDDLE), *((start, segment) for segment in above)]
    caches, past = [new_cache(model) for model, _ in route], None
    for step in range(3):
        state = ids
        for (model, segment), cache in zip(route, caches, strict=True):
            state = model(state, segment, cache=cache)
        outputs = whole(ids, past_key_values=past, use_cache=True)
        assert torch.equal(state, outputs.logits), step
        past, ids = outputs.past_key_values, outputs.logits[:, -1:].argmax(-1)


@torch.no_grad()
def test_one_segment_may_be_all(folder: Path, whole: PreTrainedModel, ids: Tensor) -> None:
    assert torch.equal(load_decoder(folder, [WHOLE])(ids, WHOLE), whole(ids).logits)


def test_a_node_holds_its_own_parameters_under_the_whole_models_names(folder: Path, whole: PreTrainedModel) -> None:
    parts = [load_decoder(folder, [segment]) for segment in (LOWEST, MIDDLE, HIGHEST)]
    held = [dict(part.whole.named_parameters()) for part in parts]
    named = dict(whole.named_parameters())
    assert sorted(name for names in held for name in names) == sorted(named)
    assert all(torch.equal(tensor, named[name]) for names in held for name, tensor in names.items())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mixtral", "gpt_neox", "deepseek_v3", "phi", "qwen3_next"])
def test_segments_may_be_made_of_what_was_delivered_by_the_names_in_the_files(
    kind: str, tmp_path: Path, ids: Tensor
) -> None:
    """Whatever transformers fuses or renames as it loads them, and no tensor of another segment among them."""
    whole, state, counts = save_decoder(kind, tmp_path), ids, []
    foundation = open_foundation(tmp_path)
    for segment in (LOWEST, MIDDLE, HIGHEST):
        names = family_of(kind).names(foundation.config, [segment], foundation.offered)
        state = decoder_of(foundation.config, [segment], foundation.read(names))(state, segment)
        counts.append(len(names))
    assert torch.equal(state, whole(ids).logits)
    num_tensors = sum(not name.startswith(FILE) for name in foundation.files)
    assert sum(counts) == num_tensors + 1  # a tied embedding goes to both ends


def test_what_a_chain_tuned_is_an_adapter_of_plain_peft(folder: Path, tmp_path: Path, ids: Tensor) -> None:
    """The union of the segments' LoRA, under the names that PEFT saves."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    plain.save_pretrained(tmp_path)
    parts = [load_decoder(folder, [segment]) for segment in (LOWEST, MIDDLE, HIGHEST)]
    generator, union = torch.Generator().manual_seed(3), {}
    for part in parts:
        tuned = get_peft_model(part.whole, config)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.1, generator=generator)
                union[name.replace(".default", "")] = parameter.data
    from safetensors.torch import save_file

    save_file(union, tmp_path / "adapter_model.safetensors")
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path).eval()
    state = ids
    with torch.no_grad():
        for part, segment in zip(parts, (LOWEST, MIDDLE, HIGHEST), strict=True):
            state = part(state, segment)
        assert torch.equal(state, reloaded(ids).logits)


# What may be wrong.


def test_types_that_cannot_be_cut_are_refused_by_name(tmp_path: Path) -> None:
    for model_type, reason in {"hrm_text": "no single list", "gpt2": "not among the types", "vit": "not among"}.items():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(CheckpointError, match=rf"'{model_type}' model, which cannot be cut: .*{reason}"):
            load_decoder(tmp_path, [WHOLE])


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no model folder"):
        load_decoder(tmp_path, [WHOLE])
    with pytest.raises(CheckpointError, match="is no model folder"):
        load_decoder(tmp_path / "none", [WHOLE])


@pytest.mark.parametrize("text", ["", "nonsense", "{}", "null", '{"model_type": "llama", "hidden_size": "x"}'])
def test_a_configuration_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"is no model folder: [^\n]*; give one that save_pretrained wrote"):
        load_decoder(tmp_path, [WHOLE])


def test_loading_shows_no_bars_of_its_own(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.enable_progress_bar()
    try:
        load_decoder(folder, [WHOLE])
        assert capfd.readouterr().err == ""
        assert hf_logging.is_progress_bar_enabled()
    finally:
        if not shown:
            hf_logging.disable_progress_bar()


def test_blocks_that_the_model_does_not_have(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has 6 blocks"):
        load_decoder(folder, [Segment(4, 9)])
    with pytest.raises(CheckpointError, match="at least one block"):
        load_decoder(folder, [Segment(0, 0, has_embedding=True)])


def test_tensors_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tensors = model.state_dict()
    del tensors["model.layers.2.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=tensors)
    with pytest.raises(CheckpointError, match=r"1 tensors, 'model.layers.2.mlp.up_proj.weight' among them"):
        load_decoder(tmp_path, [MIDDLE])
    load_decoder(tmp_path, [HIGHEST])  # needs it not


def test_a_corrupt_file(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="corrupt"):
        load_decoder(tmp_path, [MIDDLE])


def test_a_segment_that_the_node_does_not_hold(folder: Path, ids: Tensor) -> None:
    model = load_decoder(folder, [LOWEST])
    with pytest.raises(KeyError):
        model(ids, MIDDLE)
    assert isinstance(model, SegmentedDecoder)
