"""What a generator draws for a student, and how small the student is."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, ViTForImageClassification

from ecogen import config as recipes
from ecogen.errors import DataError
from ecogen.models.image_tokenizer import ImageTokens
from ecogen.models.pair_model import PairModel
from ecogen.relay.course import Views, draw_pairs, small_classifier, small_decoder, taught_classifier, with_views
from ecogen.relay.students import labels_of
from ecogen.tuning.pairs import Pairs
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
    assert student.config.eos_token_id == 7, "it is of the teacher's tokens"
    assert student(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 40)


def test_pairs_are_drawn_of_each_caption_alike(teacher: PairModel, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sure(monkeypatch)
    told: list[tuple[int, int]] = []
    pairs = draw_pairs(teacher, CAPTIONS, 20, 0, lambda *how_far: told.append(how_far))
    assert [pairs.captions.count(caption) for caption in CAPTIONS] == [10, 10]
    assert pairs.images.shape == (20, 1, 8, 8)
    assert told == [(28, 28)]
    again = draw_pairs(teacher, CAPTIONS, 20, 0)
    assert torch.equal(pairs.images, again.images)
    assert not torch.equal(pairs.images, draw_pairs(teacher, CAPTIONS, 20, 1).images)


def test_a_teacher_that_knows_nothing_says_so(teacher: PairModel) -> None:
    with pytest.raises(DataError, match="knows none of the captions 'a handwritten one', 'a handwritten two'"):
        draw_pairs(teacher, CAPTIONS, 20, 0)


def test_views_are_of_the_same_captions_and_moved() -> None:
    pairs = Pairs(torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), ["a", "b", "c"])
    seen = with_views(pairs, Views(2, 1.0), 0)
    assert list(seen.captions) == ["a", "b", "c"] * 3
    assert torch.equal(seen.images[:3], pairs.images)
    assert not any(torch.equal(seen.images[place], pairs.images[place % 3]) for place in range(3, 9))


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
