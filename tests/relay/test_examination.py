"""What students are asked: tests in the captions that they were taught, and drawings of digits only."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import ViTForImageClassification

from ecogen.models.image_tokenizer import ImageTokens
from ecogen.relay.course import small_classifier
from ecogen.relay.examination import Examination, Scores
from ecogen.tuning.pairs import Pairs

ONE, TWO, HOUSE = "a handwritten one", "a handwritten two", "a house"


class Judges:
    """In place of an assessor: an edge with digits, and one with a folder, where a picture is called as a digit."""

    def __init__(self) -> None:
        images = torch.arange(6.0)[:, None, None, None].expand(-1, 1, 8, 8) / 6
        digits, others = Pairs(images[:4], [ONE, TWO, TWO, ONE]), Pairs(images[4:], [HOUSE, "a handwritten three"])
        self.splits = {"edge-0": SimpleNamespace(test=digits), "edge-1": SimpleNamespace(test=others)}
        self.asked: Sequence[str] = ()

    def knows_digits(self, edge_id: str) -> bool:
        return edge_id == "edge-0"

    def recognised(self, images: Tensor, captions: Sequence[str]) -> float:
        self.asked = captions
        return 0.25


class Speaker:
    """In place of a generator: says one thing of everything."""

    def __init__(self, said: str) -> None:
        self._said = said

    def draw(self, captions: Sequence[str], _: torch.Generator) -> Any:
        return SimpleNamespace(images=torch.zeros(len(captions), 1, 8, 8))

    def describe(self, images: Tensor) -> list[str]:
        return [self._said] * len(images)


def examination(*captions: str) -> tuple[Examination, Judges]:
    judges = Judges()
    found = Examination.of(cast(Any, judges), captions)
    assert found is not None
    return found, judges


def test_tests_are_in_the_captions_that_were_taught() -> None:
    found, judges = examination(ONE, HOUSE)
    assert found.tests.captions == [ONE, ONE, HOUSE]
    scores = found.generator(cast(Any, Speaker(ONE)), 0)
    assert scores == Scores(0.25, pytest.approx(2 / 3), 40, 3)
    assert judges.asked == [ONE] * 40, "the judge tells digits apart, and nothing else"


def test_a_picture_that_is_but_called_a_digit_is_not_drawn_for_the_judge() -> None:
    found, judges = examination(HOUSE, "a handwritten three")
    assert found.generator(cast(Any, Speaker(HOUSE)), 0) == Scores(None, 0.5, 0, 2)
    assert not judges.asked


def test_there_is_none_without_tests() -> None:
    assert Examination.of(cast(Any, Judges()), ["a seven"]) is None


def test_a_classifier_is_asked_by_its_labels() -> None:
    found, _ = examination(ONE, HOUSE)  # two and one of them
    model = ViTForImageClassification(small_classifier(ImageTokens(image_size=8, patch_size=4), [HOUSE, ONE])).eval()
    for label, right in ((0, 1 / 3), (1, 2 / 3)):
        torch.nn.init.zeros_(model.classifier.weight)
        model.classifier.bias.data = torch.eye(2)[label]  # whatever it sees
        assert found.classifier(model) == Scores(None, pytest.approx(right), 0, 3)
