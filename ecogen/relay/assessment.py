"""How well each edge's generator draws and describes its domain, judged by a classifier of real images.

Whoever assesses reads the pairs of all edges, as no node of the federation does.

Shapes: N images, C channels, S side of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ecogen.config import Recipe
from ecogen.measurements import Drawings, Quality
from ecogen.models.pair_model import PairModel
from ecogen.models.pictures import grid_of, png_of
from ecogen.relay.judge import Judge, train_judge
from ecogen.relay.quality import copied_share, frechet_distance, nearest_distances, told_apart
from ecogen.tuning.captions import DIGITS, digit_of
from ecogen.tuning.pair_data import WRITTEN, PairSplits, domains_of, read_pairs
from ecogen.tuning.pairs import Pairs

_SHOWN = 10
"""Images of each caption on a sheet; and captions, where each image has its own."""


@dataclass(frozen=True)
class Assessor:
    """Knows the pairs of all edges.

    Attributes:
        splits: by edge, of the domain that it has in the end.
        earlier: of those that it had before, where it has changed.
    """

    recipe: Recipe
    splits: Mapping[str, PairSplits]
    earlier: Sequence[PairSplits] = ()

    @classmethod
    def of(cls, recipe: Recipe, edge_ids: Sequence[str]) -> Assessor:
        """Of those whose pairs are on this machine.

        Raises:
            DataError: if a source is damaged.
        """
        size = (recipe.model.num_channels, recipe.model.image_size)
        splits = {
            edge: [
                read_pairs(recipe.data, edge_ids, edge, size, recipe.seed, domain)
                for domain in range(len(domains_of(recipe.data, edge)))
            ]
            for edge in edge_ids
        }
        earlier = [before for own in splits.values() for before in own[:-1]]
        return cls(recipe, {edge: own[-1] for edge, own in splits.items()}, earlier)

    def drawings(self, edge_id: str, model: PairModel, seed: int = 0) -> Drawings:
        """How well a generator draws and describes what an edge knows."""
        own, generator = self.splits[edge_id], torch.Generator().manual_seed(seed)
        captions = sorted(set(own.test.captions))
        asked = _repeated(captions, self.recipe.evaluation.drawings)
        drawn = model.draw(asked, generator).images
        said = model.describe(own.test.images)
        is_written = self.knows_digits(edge_id)
        return Drawings(
            num_drawn=len(asked),
            recognised=self.recognised(drawn, asked) if is_written else None,
            real_recognised=self.recognised(own.test.images, own.test.captions) if is_written else None,
            frechet=self.frechet(drawn, edge_id) if is_written else None,
            real_frechet=self.frechet(own.train.images, edge_id) if is_written else None,
            copies=copied_share(drawn, own.train.images, own.test.images),
            members_by_drawings=told_apart(*(-nearest_distances(part.images, drawn) for part in (own.train, own.test))),
            members_by_model=told_apart(
                *(model.log_likelihood(part.images, part.captions) for part in (own.train, own.test))
            ),
            caption_accuracy=_share([ours == theirs for ours, theirs in zip(said, own.test.captions, strict=True)]),
            sheet=_sheet(Pairs(drawn, asked), captions),
            real_sheet=_sheet(own.test, captions),
            captions=tuple(captions[:_SHOWN]),
        )

    def quality(self, edge_id: str, model: PairModel, number: int) -> Quality:
        """How well a model draws about so many pictures of what an edge knows, and describes its test images."""
        tests = self.splits[edge_id].test
        captions = sorted(set(tests.captions))
        drawn = model.draw(_repeated(captions, number), torch.Generator().manual_seed(0)).images
        said = model.describe(tests.images)
        is_written = self.knows_digits(edge_id)
        return Quality(
            recognised=self.recognised(drawn, _repeated(captions, number)) if is_written else None,
            frechet=self.frechet(drawn, edge_id) if is_written else None,
            caption_accuracy=_share([ours == theirs for ours, theirs in zip(said, tests.captions, strict=True)]),
        )

    @property
    def data_bytes(self) -> int:
        """Of all pairs that are tuned on, as pixels of a byte and captions."""
        pairs = [own.train for own in (*self.splits.values(), *self.earlier)]
        captions = sum(len(caption.encode()) for part in pairs for caption in part.captions)
        return sum(part.images.numel() for part in pairs) + captions

    def knows_digits(self, edge_id: str) -> bool:
        """Whether an edge's pairs are of handwritten digits, which the judge tells apart."""
        return domains_of(self.recipe.data, edge_id)[-1].name in WRITTEN

    @cached_property
    def _judge(self) -> Judge:
        """Has learnt from the training images of all edges with handwritten digits."""
        written = [own.train for edge, own in self.splits.items() if self.knows_digits(edge)]
        images = torch.cat([pairs.images for pairs in written])
        labels = torch.tensor([digit_of(caption) for pairs in written for caption in pairs.captions])
        return train_judge(images, labels, len(DIGITS), self.recipe.seed)

    def recognised(self, images: Tensor, captions: Sequence[str]) -> float:
        """The share of images [N, C, S, S] that show the digits that their captions name."""
        seen = self._judge.labels(images).tolist()
        return _share([label == digit_of(caption) for label, caption in zip(seen, captions, strict=True)])

    def frechet(self, images: Tensor, edge_id: str) -> float:
        """Distance to an edge's test images, of as many images as these are."""
        real = self.splits[edge_id].test.images
        number = min(len(images), len(real))
        chosen = torch.linspace(0, len(images) - 1, number).long()
        return frechet_distance(self._judge.features(images[chosen]), self._judge.features(real[:number]))


def _repeated(captions: Sequence[str], number: int) -> list[str]:
    """About so many captions in all, each as often as the others, those that are alike side by side."""
    times = max(1, round(number / len(captions)))
    return [caption for caption in captions for _ in range(times)]


def _share(is_so: Sequence[bool]) -> float:
    return sum(is_so) / len(is_so)


def _sheet(pairs: Pairs, captions: Sequence[str]) -> bytes:
    """A row of images for each caption; where each image has its own, the first ones."""
    rows = [[at for at, own in enumerate(pairs.captions) if own == caption][:_SHOWN] for caption in captions[:_SHOWN]]
    columns = min(map(len, rows))
    chosen = [at for row in rows for at in row[:columns]]
    return png_of(grid_of(pairs.images[chosen], columns=columns))
