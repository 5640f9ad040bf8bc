"""Which examples a local step is on where each of them is protected: every one by a draw of its own, in secret.

Poisson sampling, as the accountant of DP-SGD has it: a step has as many examples as it happens to have. One that has
none is taken all the same, on an example without a token that counts, so that devices add their noise.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ecogen.tuning.passages import IGNORED, Passages


@dataclass(frozen=True)
class Draws:
    """How a device's examples are drawn in one local epoch.

    Attributes:
        expected: examples that a step has on average.
    """

    num_examples: int
    expected: int

    @classmethod
    def of(cls, passages: Passages, batch_size: int) -> Draws:
        """So that a step has `batch_size` passages on average, or all there are."""
        return cls(passages.num_examples, max(1, min(passages.num_examples, batch_size // passages.rows)))

    @property
    def rate(self) -> float:
        """The probability with which each example is in a step."""
        return self.expected / self.num_examples

    @property
    def num_steps(self) -> int:
        """Of an epoch: as many as have each example once on average, rounded up."""
        return -(-self.num_examples // self.expected)

    def batches(self, passages: Passages, source: random.Random) -> Iterator[Passages]:
        """The batches of an epoch."""
        for _ in range(self.num_steps):
            drawn = [index for index in range(self.num_examples) if source.random() < self.rate]
            yield passages.examples(drawn) if drawn else _nothing(passages)


def _nothing(passages: Passages) -> Passages:
    """An example that nothing is learnt from, and nothing told of."""
    tokens = torch.zeros_like(passages.tokens[: passages.rows])
    return Passages(tokens, torch.full_like(tokens, IGNORED), rows=passages.rows)
