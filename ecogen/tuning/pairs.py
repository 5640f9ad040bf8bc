"""Images with captions as passages: the caption and then the image's codes, or the other way round.

A model that learns both ways draws what a caption says, says what an image shows, and makes pairs of nothing.

Shapes: N pairs, C channels, S side of an image, T tokens of a passage.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ecogen.errors import DataError
from ecogen.models.image_tokenizer import ImageTokenizer
from ecogen.models.pair_tokens import PairTokens, pair_tokens, prompts_of
from ecogen.tuning.augment import augment
from ecogen.tuning.passages import IGNORED, Passages

WAYS = 2
"""In which each pair is told, as passages side by side: they are one example."""

_SEED_BITS = 32
"""Of a seed, all that a generator of PyTorch on the CPU makes use of."""


@dataclass(frozen=True)
class Pairs:
    """Images [N, C, S, S] in [0, 1], and what each shows."""

    images: Tensor
    captions: Sequence[str]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, indices: Sequence[int] | NDArray[np.int64]) -> Pairs:
        chosen = [int(index) for index in indices]
        return Pairs(self.images[chosen], [self.captions[index] for index in chosen])


@dataclass(frozen=True, kw_only=True)
class PairPassages(Passages):
    """Passages of pairs whose images are here too, so that they can be moved and written anew.

    Attributes:
        pairs: of each passage [N].
        is_drawn: whether the caption comes first [N].
    """

    pairs: Pairs
    is_drawn: NDArray[np.bool_]
    writer: PairWriter

    def __getitem__(self, indices: Sequence[int] | NDArray[np.int64] | Tensor) -> PairPassages:
        own, chosen = super().__getitem__(indices), np.asarray(indices, dtype=np.int64)
        pairs, is_drawn = self.pairs[chosen], self.is_drawn[chosen]
        return PairPassages(own.tokens, own.labels, own.keys, pairs=pairs, is_drawn=is_drawn, writer=self.writer)

    def moved(self, strength: float, generator: torch.Generator) -> Passages:
        """The same of images that are shifted, rotated and scaled a little, as `augment` does it."""
        if strength == 0 or not len(self):
            return self
        return self._written_anew(augment(self.pairs.images, strength, generator))

    def moved_apart(self, strength: float, source: random.Random) -> Passages:
        """As `moved`, each example by a seed of its own: one example more or less changes nothing of the others."""
        if strength == 0 or not len(self):
            return self
        generators = (torch.Generator().manual_seed(source.getrandbits(_SEED_BITS)) for _ in range(self.num_examples))
        moved = map(augment, self.pairs.images.tensor_split(self.num_examples), repeat(strength), generators)
        return self._written_anew(torch.cat([*moved]))

    def _written_anew(self, images: Tensor) -> Passages:
        pairs = Pairs(images, self.pairs.captions)
        return replace(self.writer.mixed(pairs, self.is_drawn), rows=self.rows)


class PairWriter:
    """Writes pairs in a model's tokens.

    Args:
        length: T, to which passages are padded.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, images: ImageTokenizer, length: int) -> None:
        self._tokenizer, self._images, self._length = tokenizer, images, length
        self.tokens: PairTokens = pair_tokens(tokenizer, images.config)

    def check_room(self, captions: Sequence[str]) -> None:
        """See that a picture and each of these captions fit into a passage.

        Raises:
            DataError: if one does not, or is empty.
        """
        room = self._length - 1 - len(self.tokens.written(torch.zeros(1, self.tokens.length, dtype=torch.int64))[0])
        for caption, said in zip(captions, prompts_of(self._tokenizer, captions), strict=True):
            if not 0 < len(said) <= room:
                raise DataError(f"the caption {caption[:60]!r} has {len(said)} tokens; give one of 1 to {room}")

    def captioned(self, pairs: Pairs) -> Passages:
        """Each pair with its caption before its image, for drawing."""
        return self._passages(pairs, is_drawn=np.ones(len(pairs), dtype=bool))

    def mixed(self, pairs: Pairs, is_drawn: NDArray[np.bool_]) -> Passages:
        """Each pair either way.

        Args:
            is_drawn: whether the caption comes first [N].
        """
        return self._passages(pairs, is_drawn)

    def both(self, pairs: Pairs) -> Passages:
        """Each pair both ways, one behind the other [2 N]."""
        return self.both_of(pairs.captions, self._images.encode(pairs.images))

    def movable(self, pairs: Pairs) -> PairPassages:
        """As `both`, with the images beside them."""
        written, each = self.both(pairs), pairs[np.repeat(np.arange(len(pairs)), WAYS)]
        is_drawn = np.arange(len(each)) % WAYS == 0
        tokens, labels = written.tokens, written.labels
        return PairPassages(tokens, labels, rows=WAYS, pairs=each, is_drawn=is_drawn, writer=self)

    def both_of(self, captions: Sequence[str], codes: Tensor) -> Passages:
        """As `both`, of images in codes [N, T]."""
        often = [caption for caption in captions for _ in range(WAYS)]
        passages = self._written(often, codes.repeat_interleave(WAYS, 0), np.arange(len(often)) % WAYS == 0)
        return replace(passages, rows=WAYS)

    def _passages(self, pairs: Pairs, is_drawn: NDArray[np.bool_]) -> Passages:
        return self._written(pairs.captions, self._images.encode(pairs.images), is_drawn)

    def _written(self, captions: Sequence[str], codes: Tensor, is_drawn: NDArray[np.bool_]) -> Passages:
        written = self.tokens.written(codes).tolist()
        said = prompts_of(self._tokenizer, captions)
        rows = [self._row(*pair) for pair in zip(said, written, is_drawn, strict=True)]
        return self._padded(rows)

    def spoken(self, captions: Sequence[str]) -> Passages:
        """Captions alone; what follows them is left open."""
        return self._padded([[self._tokenizer.bos_token_id, *said] for said in prompts_of(self._tokenizer, captions)])

    def _padded(self, rows: Sequence[list[int]]) -> Passages:
        places = self._length + 1
        padded = [(row + [self._padding] * places)[:places] for row in rows]
        tokens = torch.tensor(padded, dtype=torch.int64).view(len(rows), places)
        following = tokens[:, 1:].masked_fill(tokens[:, 1:] == self._padding, IGNORED)
        return Passages(tokens[:, :-1], following)

    def _row(self, said: list[int], drawn: list[int], is_drawn: bool) -> list[int]:
        content = [*said, *drawn] if is_drawn else [*drawn, *said]
        return [self._tokenizer.bos_token_id, *content, self._tokenizer.eos_token_id]

    @property
    def _padding(self) -> int:
        padding: int = self._tokenizer.pad_token_id
        return padding
