"""Teaching by drawing: a generator draws what captions say, and hands on what it is sure of.

Shapes: N pairs, T codes of an image.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ecogen.errors import DataError
from ecogen.models.pair_model import OnDone, PairModel
from ecogen.relay.samples import Samples, balanced

OnPhase = Callable[[str, int, int], None]
"""Told what is done, how much of it, and of how much."""

DRAWN = 2.0
"""So many times as many are drawn as are asked for, since some show something else."""

_SURE = 0.5
"""Of a caption at least this share must be read as it was drawn, or the generator does not know it."""


class Lesson(NamedTuple):
    """What a teacher hands on, and how many pictures it drew for it."""

    samples: Samples
    num_drawn: int


def teach(
    model: PairModel,
    evidence: Mapping[str, int],
    number: int,
    generator: torch.Generator,
    temperature: float,
    *,
    times: float = DRAWN,
    on_phase: OnPhase | None = None,
) -> Lesson:
    """So many pairs at most of these captions, of each as many as of the others.

    Of each caption those are kept of which its own generator, asked what they show, is surest that it is the caption.

    Args:
        evidence: the captions, and how many real examples of each the generator has learnt from.
        temperature: of the codes; what is drawn at a high one is various, and harder to learn from.
        times: as many are drawn; of more, those that are kept show what was asked for more often, and are more alike.

    Raises:
        DataError: if there is no caption, or nothing is asked for.
    """
    if not evidence or number < 1 or not times >= 1:
        raise DataError(
            f"a lesson of {number} pairs of {len(evidence)} captions, {times} times as many drawn; ask for 1 or more"
        )
    captions = sorted(evidence)
    each = max(1, round(times * number / len(captions)))
    asked = [caption for caption in captions for _ in range(each)]
    drawn = model.draw(asked, generator, temperature=temperature, on_done=_of("drawing", on_phase))
    said = model.describe_codes(drawn.codes, on_done=_of("reading", on_phase))
    sure = model.caption_log_likelihood(drawn.codes, asked, on_done=_of("choosing", on_phase))
    kept = kept_places(asked, said, sure, number)
    samples = Samples(drawn.codes, asked, dict(evidence))[kept]
    return Lesson(balanced(samples, number, generator), len(asked))


def _of(phase: str, on_phase: OnPhase | None) -> OnDone | None:
    return None if on_phase is None else partial(on_phase, phase)


def rehearse(model: PairModel, evidence: Mapping[str, int], number: int, generator: torch.Generator) -> Samples:
    """So many pairs of these captions that a generator draws for itself, unchecked: as various as what it knows."""
    captions = sorted(evidence)
    order = torch.randperm(len(captions), generator=generator).tolist()
    asked = [captions[order[place % len(captions)]] for place in range(number)]
    drawn = model.draw(asked, generator, temperature=1.0)
    return Samples(drawn.codes, asked, dict(evidence))


def kept_places(asked: Sequence[str], said: Sequence[str], sure: Tensor, number: int) -> list[int]:
    """Which pictures are handed on: what its own generator reads as it was asked for, of each caption the surest.

    Args:
        said: what each picture shows.
        sure: how likely each is to show what was asked for [N].
        number: of all captions together; those that the generator does not know leave room for others.
    """
    agreed: dict[str, list[int]] = {caption: [] for caption in asked}
    for place, (caption, other) in enumerate(zip(asked, said, strict=True)):
        agreed[caption] += [place] if caption == other else []
    counts = Counter(asked)
    known = [own for caption, own in agreed.items() if len(own) >= _SURE * counts[caption]]
    each = math.ceil(number / max(1, len(known)))
    surest = [sorted(own, key=lambda place: -float(sure[place]))[:each] for own in known]
    return sorted(place for own in surest for place in own)
