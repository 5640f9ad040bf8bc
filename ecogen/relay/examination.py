"""What a student knows beside its teacher: real test pairs that nobody learnt from, and a classifier of real images.

Shapes: N test pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import ViTForImageClassification

from ecogen.config import Recipe, build_topology
from ecogen.models.pair_model import PairModel
from ecogen.relay.assessment import Assessor
from ecogen.relay.students import labels_of
from ecogen.tuning.captions import DIGITS, digit_caption
from ecogen.tuning.pairs import Pairs

_DRAWN = 40
"""Pictures of each caption."""


@dataclass(frozen=True)
class Scores:
    """Shares of 0 to 1.

    Attributes:
        recognised: of drawings, by a classifier of real images; None where there is none, or nothing is drawn.
        captions_right: of real test pairs.
        num_drawn, num_tests: how many were judged.
    """

    recognised: float | None
    captions_right: float
    num_drawn: int
    num_tests: int


@dataclass(frozen=True)
class Examination:
    """Whoever examines reads the test pairs of all edges, as no node of the federation does."""

    assessor: Assessor
    tests: Pairs

    @classmethod
    def of(cls, recipe: Recipe, captions: Sequence[str]) -> Examination:
        """In the captions that are taught.

        Raises:
            DataError: if a source of pairs is missing or damaged.
        """
        assessor = Assessor.of(recipe, build_topology(recipe.topology).edge_ids)
        parts = [own.test for own in assessor.splits.values()]
        kept = [part[[place for place, said in enumerate(part.captions) if said in captions]] for part in parts]
        joined = [caption for part in kept for caption in part.captions]
        return cls(assessor, Pairs(torch.cat([part.images for part in kept]), joined))

    def generator(self, model: PairModel, seed: int) -> Scores:
        """How a generator draws what the tests show, and describes them."""
        captions, recognised = sorted(set(self.tests.captions)), None
        asked = [caption for caption in captions for _ in range(_DRAWN)] if are_digits(captions) else []
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


def are_digits(captions: Sequence[str]) -> bool:
    """Whether all are of handwritten digits, which alone the judge tells apart."""
    return set(captions) <= {digit_caption(digit) for digit in range(len(DIGITS))}
