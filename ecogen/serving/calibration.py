"""How like each other two questions have to be, so that no more than a stated share of opposite ones is mixed up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from ecogen.serving.marks import Marks, difference, marks_of, overlap
from ecogen.serving.pairs import Pair

CONFIDENCE = 0.95
_STEPS = [step / 100 for step in range(100, 49, -1)]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was seen of pairs at the chosen threshold.

    Attributes:
        threshold: the least likeness that counts as the same; None where none keeps the budget.
        num_hits: of `num_same` pairs that mean the same.
        num_false: of `num_opposite` pairs that do not.
        bound: what the share of false hits is at most, with 95 % confidence, if questions are as these pairs are.
    """

    threshold: float | None
    num_hits: int
    num_same: int
    num_false: int
    num_opposite: int
    bound: float


def likeness(one: Marks | None, other: Marks | None) -> float:
    """How like each other two questions are, 0 to 1; 0 where something tells them apart."""
    if one is None or other is None or difference(one, other) is not None:
        return 0.0
    return overlap(one, other)


def calibrate(pairs: Iterable[Pair], budget: float) -> Calibration:
    """Choose a threshold by pairs; see `threshold_of`."""
    known = [(pair, likeness(marks_of(pair.first), marks_of(pair.second))) for pair in pairs]
    return threshold_of(
        [value for pair, value in known if pair.is_same], [value for pair, value in known if not pair.is_same], budget
    )


def threshold_of(same: Sequence[float], opposite: Sequence[float], budget: float) -> Calibration:
    """The threshold with the most hits among those that keep the budget, the strictest of these.

    Thresholds are tried from the strictest on until one does not keep the budget. In an order that is fixed before, no
    correction for trying several is needed (fixed sequence testing; Angelopoulos et al. 2021, Learn then Test,
    https://arxiv.org/abs/2110.01052).

    Args:
        same: likeness of pairs that mean the same.
        opposite: of pairs that do not.
        budget: the share of these that may be taken for the same, as its upper bound has it.
    """
    best = Calibration(None, 0, len(same), 0, len(opposite), upper_bound(0, len(opposite)))
    for threshold in _STEPS:
        num_hits, num_false = (sum(value >= threshold for value in values) for values in (same, opposite))
        if (bound := upper_bound(num_false, len(opposite))) > budget:
            break
        if best.threshold is None or num_hits > best.num_hits:
            best = Calibration(threshold, num_hits, len(same), num_false, len(opposite), bound)
    return best


def upper_bound(count: int, number: int) -> float:
    """What a share is at most, with 95 % confidence, where `count` of `number` were seen (Clopper and Pearson 1934)."""
    if not number:
        return 1.0
    return float(binomtest(count, number, alternative="less").proportion_ci(CONFIDENCE, method="exact").high)
