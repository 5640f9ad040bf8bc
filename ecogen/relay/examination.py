"""What a student knows beside its teacher: real test pairs that nobody learnt from, and a classifier of real images."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from transformers import ViTForImageClassification

from ecogen.config import Recipe, build_topology
from ecogen.models.pair_model import PairModel
from ecogen.relay.assessment import Assessor
from ecogen.relay.students import labels_of
from ecogen.tuning.pairs import Pairs

_DRAWN = 40
"""Pictures of each digit: 400 of all, whose share recognised has a standard error of 1.1 points where it is 0.95."""


@dataclass(frozen=True)
class Scores:
    """Shares of 0 to 1.

    Attributes:
        recognised: of drawings of digits, by a classifier of real images; None where no digit is drawn.
        captions_right: of real test pairs.
        num_drawn, num_tests: how many were judged.
    """

    recognised: float | None
    captions_right: float
    num_drawn: int
    num_tests: int


@dataclass(frozen=True)
class Examination:
    """Whoever examines reads the test pairs of all edges, as no node of the federation does.

    Attributes:
        tests: one at least.
        digits: captions of them that are of handwritten digits, which alone the judge tells apart.
    """

    assessor: Assessor
    tests: Pairs
    digits: Sequence[str]

    @classmethod
    def of(cls, assessor: Assessor, captions: Collection[str]) -> Examination | None:
        """In some captions; None where no test pair has one."""
        tests = {edge: _only(own.test, captions) for edge, own in assessor.splits.items()}
        joined = [caption for own in tests.values() for caption in own.captions]
        digits = {said for edge, own in tests.items() if assessor.knows_digits(edge) for said in own.captions}
        images = torch.cat([own.images for own in tests.values()])
        return cls(assessor, Pairs(images, joined), sorted(digits)) if joined else None

    def generator(self, model: PairModel, seed: int) -> Scores:
        """How a generator draws digits of the tests, and describes all tests."""
        asked = [caption for caption in self.digits for _ in range(_DRAWN)]
        recognised = None
        if asked:
            drawn = model.draw(asked, torch.Generator().manual_seed(seed)).images
            recognised = self.assessor.recognised(drawn, asked)
        return Scores(recognised, self._right(model.describe(self.tests.images)), len(asked), len(self.tests))

    def classifier(self, model: ViTForImageClassification) -> Scores:
        """How a classifier names what the tests show, its labels being captions."""
        said = [model.config.id2label[label] for label in labels_of(model, self.tests.images).tolist()]
        return Scores(None, self._right(said), 0, len(self.tests))

    def _right(self, said: Sequence[str]) -> float:
        return sum(ours == theirs for ours, theirs in zip(said, self.tests.captions, strict=True)) / len(said)


def assessor_of(recipe: Recipe) -> Assessor:
    """Who reads the pairs of all edges of a recipe.

    Raises:
        DataError: if a source of pairs is missing or damaged.
    """
    return Assessor.of(recipe, build_topology(recipe.topology).edge_ids)


def _only(pairs: Pairs, captions: Collection[str]) -> Pairs:
    return pairs[[place for place, said in enumerate(pairs.captions) if said in captions]]
