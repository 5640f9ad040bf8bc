"""When an edge asks for lessons out of turn: its newest pairs are no more like those that it had at its last exchange.

Both are pairs that nobody tunes on. Their losses are compared under one model, that of the exchange, so that of pairs
of one domain the two sets of losses are of one distribution, whatever that model knows; a two-sample test says whether
they are. Pairs and losses stay at the edge. That it asks is told, and by its record how probable its pairs would be
without a drift, to the cloud and to all who watch.

Shapes: N pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ecogen.models.checkpoint import load_tensors, save_tensors
from ecogen.models.tunables import Tunables
from ecogen.relay.generator import Generator
from ecogen.tuning.passages import Passages

_LOSSES = "losses of the pairs known"


def p_value(known: Sequence[float], newest: Sequence[float]) -> float:
    """How often losses of two sets of pairs of one domain would lie as far apart as these, in [0, 1].

    Kolmogorov-Smirnov, two samples, two-sided, as Rabanser et al. 2019 ("Failing Loudly", arXiv 1810.11953) apply it
    to what a model makes of examples. A drift is told wrongly in a share of rounds that is at most its level, where
    each round's pairs are new.
    """
    from scipy.stats import ks_2samp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where it has no exact value, it takes the asymptotic one
        return float(ks_2samp(known, newest).pvalue)


@dataclass(frozen=True)
class Known:
    """An edge's model at its last exchange, and what it made of the pairs that it knew then.

    Attributes:
        losses: of each pair [N].
    """

    tunables: Tunables
    losses: Tensor

    def save(self, path: Path) -> None:
        """Write it atomically."""
        save_tensors(path, {**self.tunables, _LOSSES: self.losses})

    @classmethod
    def load(cls, path: Path) -> Known:
        """What `save` wrote."""
        tensors = load_tensors(path)
        losses = tensors.pop(_LOSSES)
        return cls(tensors, losses)


class DriftWatch:
    """Looks at an edge's pairs after each round, on the compute thread.

    Args:
        path: where it keeps what was known.
        pairs: held out, as they are in a round, each both ways.
        level: of the test: drift is what is less probable without one; 0 never looks.
    """

    def __init__(self, generator: Generator, path: Path, pairs: Callable[[int], Passages], level: float) -> None:
        self._generator, self._path, self._pairs, self._level = generator, path, pairs, level

    def look(self, round_index: int, tunables: Mapping[str, Tensor]) -> float | None:
        """How probable the pairs of a round would be without a drift, where that says there is one; None if not.

        Before the first exchange, they are compared with those of the first round.
        """
        if not self._level:
            return None
        if not self._path.exists():
            self.remember(round_index, tunables)
            return None
        known = Known.load(self._path)
        found = p_value(known.losses.tolist(), self._losses(round_index, known.tunables).tolist())
        return found if found < self._level else None

    def remember(self, round_index: int, tunables: Mapping[str, Tensor]) -> None:
        """Lessons were exchanged: what is there now is known from now on."""
        if self._level:
            Known(dict(tunables), self._losses(round_index, tunables)).save(self._path)

    def _losses(self, round_index: int, tunables: Mapping[str, Tensor]) -> Tensor:
        """Of each pair: the mean of its losses as a drawing and as a description [N]."""
        losses = self._generator.losses(tunables, self._pairs(round_index))
        return torch.tensor(losses, dtype=torch.float64).view(-1, 2).mean(1)
