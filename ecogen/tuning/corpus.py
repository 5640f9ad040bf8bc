"""What the cloud pre-trains on: unlabelled images, and how far a view of one may stray from it.

Shapes: N images, S side of an image, R side of a view. Views are in [-1, 1], as the devices' images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ecogen.config import Data, Pretraining
from ecogen.tuning.datasets import corpus_digest, read_corpus, resized
from ecogen.tuning.glyphs import Augmentation, augment, blur, render_glyphs

HANDWRITING = Augmentation(
    rotation=0.3,
    shear=0.3,
    scale=(0.6, 0.85),  # MNIST's digits are 20 of 28 pixels large: 0.71
    stretch=0.2,
    elastic=0.06,
    resolution=28,
)
"""How far a view of a handwritten digit may stray: about as glyphs', but no coarser than MNIST is."""

_HANDWRITING_BLUR = 0.75  # pixels of 28: the slope that `glyphs.BLUR_SIGMA` gives a stroke's edge on twice as many


@dataclass(frozen=True)
class Corpus:
    """Images [N, 1, S, S], ink in [0, 1], or as bytes where lifelike.

    Attributes:
        amounts: how far views stray.
        blur_sigma: of the images before a view is taken, so that a stroke's edge is a slope, in pixels; 0: none.
        is_lifelike: whether the images are like the devices' as they are, and not only views of them.
    """

    images: Tensor
    amounts: Augmentation
    blur_sigma: float = 0.0
    is_lifelike: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def views(self, chosen: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """A random view of each of the images chosen: [B, 1, R, R]."""
        images = self.images[chosen]
        if images.dtype == torch.uint8:
            images = images.to(torch.float32) / 255
        if self.blur_sigma:
            images = blur(images, self.blur_sigma)
        return augment(images, generator=generator, amounts=self.amounts, size=size) * 2 - 1

    def examples(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        """The first images as devices would have them, or as near as it gets: [B, 1, R, R]."""
        chosen = torch.arange(min(count, len(self)))
        if not self.is_lifelike:
            return self.views(chosen, size, generator)
        return resized(self.images[chosen].to(torch.float32) / 127.5 - 1, size)


def open_corpus(pretraining: Pretraining, data: Data) -> Corpus:
    """The corpus of a recipe: rendered glyphs, or the images of its data set that no device owns.

    Raises:
        DataError: if the data set is missing, damaged, or has no such images.
    """
    if pretraining.corpus == "glyphs":
        return Corpus(render_glyphs(), Augmentation())
    return Corpus(read_corpus(data).unsqueeze(1), HANDWRITING, _HANDWRITING_BLUR, is_lifelike=True)


def digest_of(pretraining: Pretraining, data: Data) -> str:
    """What tells this corpus from others, wherever its file is; glyphs are the program's own.

    Raises:
        DataError: as `open_corpus`.
    """
    return corpus_digest(data) if pretraining.corpus == "data" else ""
