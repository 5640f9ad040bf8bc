"""Teachers of classes, one that draws and one that cannot: what they give is alike, and a student learns from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor
from transformers import ViTForImageClassification

from ecogen.config import Data, Model, Pretraining, Tunables
from ecogen.errors import DataError
from ecogen.models.adapters import classification_config, load_whole
from ecogen.models.checkpoint import open_foundation
from ecogen.models.image_tokenizer import ImageTokens
from ecogen.models.pair_model import PairModel
from ecogen.relay.inversion import InversionTeacher, Settings, statistics_of
from ecogen.relay.lessons import DrawingTeacher, ImageLesson, Teacher
from ecogen.relay.students import distillation_loss, labels_of, teach_classifier
from ecogen.tuning.captions import digit_caption
from ecogen.tuning.datasets import open_data
from ecogen.tuning.pairs import Pairs, PairWriter
from ecogen.tuning.pretrain_decoder import llama_config, pretrain_decoder
from ecogen.tuning.quantizer import train_image_tokenizer
from ecogen.tuning.vocabulary import train_tokenizer
from tests.pictures import LENGTH
from tests.tiny import tiny_config

CLASSES = (0, 1, 2)
CAPTIONS = {digit: digit_caption(digit) for digit in CLASSES}
QUICK = Settings(coarseness=1, batch_size=32)
VIT = tiny_config(2, num_labels=len(CLASSES))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quiet(*_: object) -> None:
    """Takes what a step tells."""


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Handwritten zeros, ones and twos of 8 x 8."""
    pool = open_data(Data(name="digits")).own
    chosen = torch.isin(pool.labels, torch.tensor(CLASSES))
    return pool.images[chosen].float()[:, None] / pool.white, pool.labels[chosen].long()


@pytest.fixture(scope="module")
def classifier(digits: tuple[Tensor, Tensor]) -> ViTForImageClassification:
    """Has learnt from the first 300."""
    images, labels = digits
    spec = Pretraining(steps=300, batch_size=32, learning_rate=1e-2)
    return teach_classifier(VIT, images[:300], labels[:300], spec, quiet)


@pytest.fixture(scope="module")
def inverting(digits: tuple[Tensor, Tensor], classifier: ViTForImageClassification) -> InversionTeacher:
    return InversionTeacher(classifier, statistics_of(classifier, digits[0][:300], digits[1][:300]), QUICK)


@pytest.fixture(scope="module")
def drawing(digits: tuple[Tensor, Tensor]) -> DrawingTeacher:
    """A generator made of the same images."""
    images, labels = digits[0][:300], digits[1][:300]

    def some(count: int, chance: torch.Generator) -> Tensor:
        return images[torch.randint(len(images), (count,), generator=chance)]

    sizes = ImageTokens(image_size=8, patch_size=4, codebook_size=32, hidden_size=16)
    codes = train_image_tokenizer(sizes, some, steps=300, batch_size=32, learning_rate=3e-3, seed=0, on_step=quiet)
    tokenizer = train_tokenizer(CAPTIONS.values(), 330, sizes.codebook_size)
    sizes_of_text = Model(
        hidden_size=32,
        num_blocks=2,
        num_heads=2,
        intermediate_size=48,
        vocabulary_size=len(tokenizer),
        context_length=LENGTH,
    )
    passages = PairWriter(tokenizer, codes, LENGTH).both(Pairs(images, [CAPTIONS[int(label)] for label in labels]))
    model = pretrain_decoder(
        llama_config(sizes_of_text, tokenizer),
        lambda count, chance: passages[torch.randint(len(passages), (count,), generator=chance)],
        seed=0,
        on_step=quiet,
        steps=250,
        batch_size=32,
        matrix_rate=0.02,
        learning_rate=3e-3,
        weight_decay=0.1,
    )
    return DrawingTeacher(PairModel(model.eval(), tokenizer, codes), CAPTIONS)


@pytest.mark.parametrize("kind", ["inverting", "drawing"])
def test_a_student_learns_from_either_teacher(
    kind: str, digits: tuple[Tensor, Tensor], request: pytest.FixtureRequest
) -> None:
    teacher: Teacher = request.getfixturevalue(kind)
    lesson = teacher.lesson(CLASSES, 96, generator())
    assert 60 <= len(lesson) <= 96
    assert set(lesson.labels.tolist()) == set(CLASSES)
    assert lesson.images.shape[1:] == (1, 8, 8)
    assert lesson.images.min() >= 0
    assert lesson.images.max() <= 1
    once, again, other = (teacher.lesson(CLASSES, 24, generator(seed)).images for seed in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.equal(once[:10], other[:10])
    student = taught(lesson)
    assert (labels_of(student, digits[0][300:]) == digits[1][300:]).double().mean() > 0.6, "guessing is a third"


def taught(lesson: ImageLesson) -> ViTForImageClassification:
    spec = Pretraining(steps=300, batch_size=32, learning_rate=1e-2)
    small = tiny_config(1, num_labels=len(CLASSES))
    return teach_classifier(small, lesson.images, lesson.labels, spec, quiet, probabilities=lesson.probabilities)


def test_a_teacher_is_sure_of_what_it_was_asked_for_and_stays_what_it_was(
    inverting: InversionTeacher, classifier: ViTForImageClassification
) -> None:
    classifier.zero_grad()  # what training left
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    lesson = inverting.lesson([2, 0], 40, generator())
    assert lesson.probabilities is not None
    assert lesson.labels.tolist() == [0] * 20 + [2] * 20
    sure = lesson.probabilities.gather(1, lesson.labels[:, None]).mean()
    noise = inverting.probabilities(torch.rand(40, 1, 8, 8, generator=generator()))
    assert sure > 0.8
    assert noise.gather(1, lesson.labels[:, None]).mean() < 0.6
    assert all(torch.equal(before[name], tensor) for name, tensor in classifier.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in classifier.parameters())
    assert not any(block._forward_hooks for block in classifier.vit.layers), "nobody goes on watching"


def test_statistics_bring_images_nearer_to_real_ones(
    digits: tuple[Tensor, Tensor], inverting: InversionTeacher, classifier: ViTForImageClassification
) -> None:
    blind = InversionTeacher(classifier, None, QUICK)
    real = digits[0][:300].mean(0)
    near, far = (teacher.lesson(CLASSES, 96, generator()).images.mean(0) for teacher in (inverting, blind))
    assert (near - real).square().mean() < 0.75 * (far - real).square().mean()


def test_statistics_are_those_of_what_each_depth_gives(
    digits: tuple[Tensor, Tensor], classifier: ViTForImageClassification
) -> None:
    images, labels = digits[0].repeat(2, 1, 1, 1), digits[1].repeat(2)  # of a label more than are passed at once
    known = statistics_of(classifier, images, labels, pixels=(-1.0, 1.0))
    assert (labels == 1).sum() > 256
    assert sorted(known) == list(CLASSES)
    with torch.no_grad():
        embedded = classifier.vit.embeddings(images[labels == 1] * 2 - 1)
        first = classifier.vit.layers[0](embedded)
    assert len(known[1]) == 3
    torch.testing.assert_close(known[1][0][0], embedded.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(known[1][1][1], first.var(0, unbiased=False), rtol=1e-3, atol=1e-5)


def test_soft_labels_tell_a_student_its_teachers_logits() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    said = logits.softmax(-1)
    wrong = torch.tensor([[0.0, 2.0, -1.0]])
    for heat in (1.0, 4.0):
        own = logits.clone().requires_grad_()
        (slope,) = torch.autograd.grad(distillation_loss(own, said, heat), own)
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-5)
        assert distillation_loss(wrong, said, heat) > distillation_loss(logits, said, heat)
    certain = torch.tensor([[1.0, 0.0, 0.0]])
    assert distillation_loss(logits, certain, 2.0).isfinite()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda teacher: teacher.lesson([0, 7], 4, generator()),
            "does not know 7; ask for some of its classes 0, 1, 2",
        ),
        (lambda teacher: teacher.lesson([], 4, generator()), "asked for no class"),
        (lambda teacher: teacher.lesson([0], 0, generator()), "a lesson of 0 images was asked for; ask for 1 or more"),
    ],
)
@pytest.mark.parametrize("kind", ["inverting", "drawing"])
def test_what_cannot_be_taught_is_said(
    kind: str, ask: Callable[[Teacher], ImageLesson], message: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(DataError, match=message):
        ask(request.getfixturevalue(kind))


def test_teachers_and_lessons_that_do_not_fit_are_refused(classifier: ViTForImageClassification) -> None:
    with pytest.raises(DataError, match=r"statistics are of label 1 at 2 depths, the teacher has .* 3 depths"):
        InversionTeacher(classifier, {1: [(torch.zeros(1), torch.ones(1))] * 2})
    with pytest.raises(DataError, match=r"\{0: 2, 1: 1\}; give some, of each label 2 or more"):
        statistics_of(classifier, torch.rand(3, 1, 8, 8), torch.tensor([0, 0, 1]))
    with pytest.raises(DataError, match="coarseness is 0; give 1 or more"):
        Settings(coarseness=0)
    with pytest.raises(DataError, match=r"call eval\(\) first"):
        InversionTeacher(ViTForImageClassification(VIT).train())
    images, labels, spec = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]), Pretraining(steps=1)
    with pytest.raises(DataError, match=r"labels are 0..3, the student knows 0..2"):
        teach_classifier(VIT, images, labels, spec, quiet)
    with pytest.raises(DataError, match="0 images and 0 labels"):
        teach_classifier(VIT, images[:0], labels[:0], spec, quiet)
    with pytest.raises(DataError, match=r"\[4, 2\]; the student learns from \[4, 3\]"):
        teach_classifier(VIT, images, labels % 3, spec, quiet, probabilities=torch.rand(4, 2))


def test_a_tuned_model_of_a_run_can_teach(foundation: Path) -> None:
    backbone = open_foundation(foundation)
    spec = Tunables(prompts=2, lora_rank=2)
    tuned = load_whole(backbone, classification_config(backbone, len(CLASSES)), spec, seed=0)
    model = cast(ViTForImageClassification, tuned.whole.eval())
    teacher = InversionTeacher(model, settings=replace(QUICK, steps=2), pixels=(-1.0, 1.0))
    images = torch.rand(3, 1, 8, 8)
    assert [each.shape for each in teacher.features(images)] == [(3, 5, 16)] * 4, "prompts are not among the tokens"
    torch.testing.assert_close(teacher.probabilities(images), model(pixel_values=images * 2 - 1).logits.softmax(-1))
    statistics = statistics_of(model, torch.rand(6, 1, 8, 8), torch.tensor([0, 1] * 3), pixels=(-1.0, 1.0))
    edge = InversionTeacher(model, statistics, replace(QUICK, steps=2), pixels=(-1.0, 1.0))
    assert edge.lesson([1, 0], 5, generator()).labels.tolist() == [0, 0, 1, 1, 1]
    with pytest.raises(DataError, match="does not know 2; ask for some of its classes 0, 1"):
        edge.lesson(CLASSES, 5, generator())
