"""What a receiver takes of a lesson: as much as does not harm what it knew, or nothing.

On the line between a model's weights before and after, new knowledge comes sooner than old knowledge goes: Ilharco et
al. 2022, "Patching open-vocabulary models by interpolating weights", https://arxiv.org/abs/2208.05592, section 3.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ecogen.models.tunables import Tunables
from ecogen.records import Taught
from ecogen.relay.samples import Samples

HELD_OUT = 0.2
"""Share of a lesson that nobody learns from, so that it tells what was learnt."""

LEAST = 2
"""Samples of a lesson: one to learn from, and one that tells whether it was learnt."""

SHARES = tuple(tenth / 10 for tenth in range(10, 0, -1))
"""Of the way from the weights before to those after a lesson, the most first."""


@dataclass(frozen=True)
class Taken:
    """What became of a lesson.

    Attributes:
        scores: by what it is judged.
        share: of the way to the weights that it led to.
        reason: of a refusal; empty where it was accepted.
        tunables_share: how far from its own tunables to the mean of the edges' it began to learn; see `begun`.
    """

    tunables: Tunables
    scores: tuple[Taught, ...] = ()
    share: float = 0.0
    reason: str = ""
    tunables_share: float = 0.0


def take(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    judge: Callable[[Tunables], list[Taught]],
    tolerance: float,
) -> Taken:
    """As much of a lesson as is not refused; where all of it is, the weights before, and why the whole is."""
    refused = None
    for share in SHARES:
        tunables = {name: torch.lerp(before[name], tensor, share) for name, tensor in after.items()}
        scores = judge(tunables)
        reason = refusal(scores, tolerance)
        if not reason:
            return Taken(tunables, tuple(scores), share)
        refused = refused or Taken(dict(before), tuple(scores), 0.0, reason)
    assert refused is not None
    return refused


def refusal(scores: list[Taught], tolerance: float) -> str:
    """Why a lesson is refused; empty where it is accepted.

    It is where the mean log-perplexity of what it was about has not fallen, or that of something that was known before
    has risen by more than the tolerance.
    """
    gains = [math.log(score.before) - math.log(score.after) for score in scores if score.is_new]
    if not sum(gains) > 0:  # nor where it is no number
        return "nothing was learnt from it"
    for score in scores:
        if not score.is_new and not score.after <= score.before * (1 + tolerance):
            return f"perplexity on {score.name} rose from {score.before:.2f} to {score.after:.2f}"
    return ""


def held_out(samples: Samples) -> tuple[Samples, Samples]:
    """What tells how much was learnt of a lesson, and the rest of it, which is learnt from.

    A picture's codes say on which side it is, so it stays there whatever else it is later put together with; where all
    would be on one side, the first is held out.
    """
    every = max(2, round(1 / HELD_OUT))
    is_kept = [zlib.crc32(codes.numpy().tobytes()) % every == 0 for codes in samples.codes.long()]
    if len(set(is_kept)) < LEAST:
        is_kept = [place == 0 for place in range(len(samples))]
    kept, rest = ([place for place, own in enumerate(is_kept) if own is side] for side in (True, False))
    return samples[kept], samples[rest]
