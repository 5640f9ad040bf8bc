"""Pre-training of a text-image generator in the cloud: glyphs rendered from fonts, with captions.

First the image tokenizer learns, then the decoder of text and codes; both see a new random view of a glyph each time.

Shapes: B pairs, S side of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ecogen.tuning.captions import HANDWRITTEN, digit_caption, glyph_caption
from ecogen.tuning.glyphs import CHARACTERS, FONTS, Augmentation, augment, render_glyphs
from ecogen.tuning.pairs import Pairs, PairWriter
from ecogen.tuning.passages import Passages, joined

PAIRS_VERSION = 5
"""Raise it with any change that makes the same arguments give another model: caches are keyed by it."""

CALM = Augmentation(
    rotation=0.15, shear=0.1, scale=(0.6, 0.8), stretch=0.15, elastic=0.05, resolution=10, contrast=0.1, noise=0.0
)
"""How far a view strays from its glyph: what is drawn is to be read, and not to be told apart from others."""

_DRAWN = 0.7
"""Share of the pairs that are learnt with the caption first: drawing takes longer to learn than reading."""

_SPOKEN = 1 / 32
"""Share of the passages that are words without a picture: those of edges' captions that glyphs have not.

A foundation model has read of what it has not seen. Where it has not, a word stays unlikely however often an edge shows
it, since embeddings are not tuned. What is handwritten is left open: where that was read as well, edges' models
described less well.
"""


def glyph_captions() -> Sequence[str]:
    """Of each glyph, in the order of `render_glyphs`."""
    return [glyph_caption(font, character) for font in FONTS for character in CHARACTERS]


def all_captions() -> Sequence[str]:
    """What the vocabulary is made of: also the words for what edges may have."""
    return [*glyph_captions(), *map(digit_caption, range(10))]


def glyph_views(num_channels: int, size: int) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    """Random views [B, C, S, S] of random glyphs, and which glyphs these are [B], as a function of the generator."""
    glyphs = _glyphs()

    def drawn(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(glyphs), (count,), generator=generator)
        views = augment(glyphs[chosen], generator=generator, amounts=CALM, size=size)
        return views.expand(-1, num_channels, -1, -1), chosen

    return drawn


def glyph_passages(writer: PairWriter, num_channels: int, size: int) -> Callable[[int, torch.Generator], Passages]:
    """So many random glyphs with their captions, in a model's tokens."""
    views, captions = glyph_views(num_channels, size), glyph_captions()

    def drawn(count: int, generator: torch.Generator) -> Passages:
        images, chosen = views(count, generator)
        is_drawn = torch.rand(count, generator=generator) < _DRAWN
        return writer.mixed(Pairs(images, [captions[index] for index in chosen]), is_drawn.numpy())

    return drawn


def cloud_passages(writer: PairWriter, num_channels: int, size: int) -> Callable[[int, torch.Generator], Passages]:
    """So many passages that the cloud learns from: glyphs with captions, and words of captions that edges may have."""
    glyphs = glyph_passages(writer, num_channels, size)

    def drawn(count: int, generator: torch.Generator) -> Passages:
        number, left = divmod(_SPOKEN * count, 1)
        if left and float(torch.rand(1, generator=generator)) < left:
            number += 1
        spoken = writer.spoken([HANDWRITTEN] * int(number))
        return joined([spoken, glyphs(count - len(spoken), generator)])

    return drawn


@lru_cache(maxsize=1)
def _glyphs() -> Tensor:
    return render_glyphs()
