"""What a generator draws for a student, and how small the student is."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, ViTForImageClassification

from ecogen import config as recipes
from ecogen.errors import DataError
from ecogen.models.image_tokenizer import ImageTokens
from ecogen.models.pair_model import PairModel
from ecogen.relay.course import Views, draw_pairs, small_classifier, small_decoder, taught_classifier, write_pairs
from ecogen.relay.students import labels_of
from ecogen.tuning.pairs import Pairs
from ecogen.tuning.passages import Passages
from ecogen.tuning.pretrain_decoder import llama_config
from tests.pictures import make_sure, save_pair_foundation

CAPTIONS = ["a handwritten one", "a handwritten two"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> PairModel:
    folder = save_pair_foundation(tmp_path_factory.mktemp("model"))
    return PairModel.of(LlamaForCausalLM.from_pretrained(folder).eval(), folder)


def test_students_of_the_recipe_are_four_times_smaller() -> None:
    model = recipes.load("pairs").model
    size = ImageTokens(model.image_size, model.patch_size, model.num_channels)
    with torch.device("meta"):
        teacher = LlamaForCausalLM(llama_config(model))
        students = (
            LlamaForCausalLM(small_decoder(teacher.config)),
            ViTForImageClassification(small_classifier(size, CAPTIONS)),
        )
    numbers = [sum(parameter.numel() for parameter in one.parameters()) for one in (teacher, *students)]
    assert all(4 * number <= numbers[0] for number in numbers[1:]), numbers


@pytest.mark.parametrize("width", [2, 6, 32, 100, 192, 1024])
def test_a_teacher_of_any_width_has_a_smaller_student_that_works(width: int) -> None:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=1,
        vocab_size=40,
        eos_token_id=7,
    )
    student = LlamaForCausalLM(small_decoder(config))
    assert student.config.hidden_size <= max(2, width // 2)
    assert student.config.hidden_size >= 0.4 * width - 2
    assert student.config.head_dim % 2 == 0, "as rotary positions ask"
    assert student.config.eos_token_id == 7, "it is of the teacher's tokens"
    assert student(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 40)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "gemma"])
def test_a_teacher_of_another_kind_has_a_llama_for_a_student(kind: str) -> None:
    config = AutoConfig.for_model(kind, vocab_size=40, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    student = small_decoder(config)
    assert (student.model_type, student.vocab_size, student.eos_token_id) == ("llama", 40, 2)
    assert 0 < student.num_hidden_layers < config.num_hidden_layers


def test_pairs_are_drawn_of_each_caption_alike(teacher: PairModel, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sure(monkeypatch)
    told: list[tuple[str, int, int]] = []
    pairs = draw_pairs(teacher, CAPTIONS, 200, 0, lambda *how_far: told.append(how_far))
    assert [pairs.captions.count(caption) for caption in CAPTIONS] == [100, 100]
    assert pairs.images.shape == (200, 1, 8, 8)
    assert told == [(phase, done, 280) for phase in ("drawing", "reading", "choosing") for done in (128, 256, 280)]
    again = draw_pairs(teacher, CAPTIONS, 200, 0)
    assert torch.equal(pairs.images, again.images)
    assert not torch.equal(pairs.images, draw_pairs(teacher, CAPTIONS, 200, 1).images)


def test_a_teacher_that_knows_nothing_says_so(teacher: PairModel) -> None:
    with pytest.raises(DataError, match="knows none of the captions 'a handwritten one', 'a handwritten two'"):
        draw_pairs(teacher, CAPTIONS, 20, 0)


class Scribe:
    """In place of a writer: its tokens are pixels, and it tells each pair twice."""

    def both(self, pairs: Pairs) -> Passages:
        tokens = (1000 * pairs.images.flatten(1)).long().repeat_interleave(2, 0)
        return Passages(tokens, tokens)


def test_a_decoder_is_told_pairs_and_moved_views_of_them() -> None:
    pairs = Pairs(torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), CAPTIONS[:1] * 3)
    told: list[tuple[str, int, int]] = []

    def tokens(seed: int) -> torch.Tensor:
        scribe = cast(Any, Scribe())
        return write_pairs(scribe, pairs, Views(2, 1.0), seed, lambda *how_far: told.append(how_far)).tokens

    plain, one, two = tokens(0).split(6)
    assert told == [("writing", 1, 3), ("writing", 2, 3), ("writing", 3, 3)]
    assert torch.equal(plain, Scribe().both(pairs).tokens)
    assert not torch.equal(one, plain)
    assert not torch.equal(one, two)
    assert torch.equal(tokens(0)[6:12], one)
    assert not torch.equal(tokens(1)[6:12], one)


def test_a_classifier_names_captions() -> None:
    images = torch.zeros(32, 1, 8, 8)
    images[::2, :, :4] = 1.0
    images[1::2, :, 4:] = 1.0
    pairs = Pairs(images, ["top", "bottom"] * 16)
    config = small_classifier(ImageTokens(image_size=8, patch_size=4), ["bottom", "top"])
    spec = recipes.Pretraining(steps=60, batch_size=16, learning_rate=2e-3)
    student = taught_classifier(config, pairs, spec, lambda *_: None)
    said = [student.config.id2label[label] for label in labels_of(student, images).tolist()]
    assert said == pairs.captions
