"""Passages of text as a decoder learns from them: tokens, and beside each the token that should follow it.

What is padded is padded on the right, where no token that counts looks: so nothing but tokens has to be sent.

Shapes: N passages, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecogen.tuning.data import Examples

IGNORED = -100
"""In place of the token that follows, where it is not to be learnt: cross-entropy's own mark."""


@dataclass(frozen=True)
class Passages:
    """Tokens [N, T] and labels [N, T]: the token that follows each, or `IGNORED`.

    Attributes:
        keys: of the passages, where what a frozen prefix makes of them is kept [N].
        rows: how many, side by side, are one example told in several ways.
    """

    tokens: Tensor
    labels: Tensor
    keys: Tensor | None = None
    rows: int = 1

    @property
    def num_examples(self) -> int:
        return len(self) // self.rows

    @property
    def inputs(self) -> Tensor:
        """What enters a model."""
        return self.tokens

    @property
    def is_known(self) -> Tensor:
        """Which have labels [N]: all."""
        return torch.ones(len(self), dtype=torch.bool)

    def trimmed(self) -> Passages:
        """The same without the last places, where nothing counts in any of them.

        Passages with keys keep all places, since what is kept of them is of one size.
        """
        counted = (self.labels != IGNORED).any(0).nonzero()
        if self.keys is not None or not len(counted):
            return self
        stop = int(counted[-1]) + 1
        return Passages(self.tokens[:, :stop], self.labels[:, :stop], rows=self.rows)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, indices: Sequence[int] | NDArray[np.int64] | Tensor) -> Passages:
        chosen = torch.as_tensor(np.asarray(indices))
        return Passages(self.tokens[chosen], self.labels[chosen], None if self.keys is None else self.keys[chosen])

    def split(self, count: int) -> list[Passages]:
        """So many parts of nearly equal size, in order; they share the memory."""
        keys = [None] * count if self.keys is None else self.keys.tensor_split(count)
        parts = zip(self.tokens.tensor_split(count), self.labels.tensor_split(count), keys, strict=True)
        return [Passages(*part) for part in parts]

    def split_examples(self, count: int) -> list[Passages]:
        """As `split`, with all rows of an example in one part."""
        return [self.examples(part) for part in np.array_split(np.arange(self.num_examples), count)]

    def examples(self, indices: Sequence[int] | NDArray[np.int64]) -> Passages:
        """Whole examples, each with all its rows."""
        first = np.asarray(indices, dtype=np.int64)[:, None] * self.rows
        return replace(self[(first + np.arange(self.rows)).reshape(-1)], rows=self.rows)


Batch = Examples | Passages
"""What a model learns from at once."""


def perplexity(cross_entropy: float, passages: Passages) -> float:
    """e to the mean of a cross-entropy that was summed over all tokens of some passages that count."""
    mean = cross_entropy / int((passages.labels != IGNORED).sum())
    return float(torch.tensor(mean, dtype=torch.float64).exp())


def joined(parts: Sequence[Passages]) -> Passages:
    """All passages of some parts, which are of one length."""
    return Passages(torch.cat([part.tokens for part in parts]), torch.cat([part.labels for part in parts]))
