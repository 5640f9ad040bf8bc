"""Teaching by drawing: a generator draws what captions say, and hands on what it is sure of.

Shapes: N pairs, T codes of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ecogen.models.pair_model import PairModel
from ecogen.relay.samples import Samples, balanced

_TEMPERATURE = 0.7
"""Of lessons. Pictures at 0.4, as users get them, are alike: who learns from them holds real ones for unlikely. At 1
too many show something else. Chosen on validation pairs among these."""

_DRAWN = 1.5
"""So many times as many are drawn as are asked for, since some are dropped."""

_UNLIKELY = 0.05
"""Share of what was drawn for each caption that is dropped as the least likely."""

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
    *,
    is_checked: bool = True,
    temperature: float = _TEMPERATURE,
) -> Lesson:
    """So many pairs at most of these captions, of each as many as of the others.

    A picture is kept if its own generator, asked what it shows, gives the caption back, and holds it for likely.

    Args:
        evidence: the captions, and how many real examples of each the generator has learnt from.
        is_checked: whether pictures are dropped that are not sure. What a generator draws for itself, to rehearse, is
            to be as various as what it knows: nothing is dropped, and it is drawn at temperature 1.
    """
    captions = sorted(evidence)
    if not is_checked:
        order = torch.randperm(len(captions), generator=generator).tolist()
        asked = [captions[order[place % len(captions)]] for place in range(number)]
        drawn = model.draw(asked, generator, temperature=1.0)
        return Lesson(Samples(drawn.codes, asked, dict(evidence)), number)
    times = max(1, round(_DRAWN * number / len(captions)))
    asked = [caption for caption in captions for _ in range(times)]
    drawn = model.draw(asked, generator, temperature=temperature)
    said = model.describe_codes(drawn.codes)
    kept = kept_places(asked, said, drawn.log_likelihood)
    samples = Samples(drawn.codes, asked, dict(evidence))[kept]
    return Lesson(balanced(samples, number, generator), len(asked))


def kept_places(asked: Sequence[str], said: Sequence[str], log_likelihood: Tensor) -> list[int]:
    """Which pictures are handed on: what its own generator reads as it was asked for, and holds for likely.

    Args:
        log_likelihood: of each picture [N].
    """
    kept: list[int] = []
    for caption in dict.fromkeys(asked):
        own = [place for place, other in enumerate(asked) if other == caption]
        agreed = [place for place in own if said[place] == caption]
        if len(agreed) < _SURE * len(own):
            continue
        least = float(log_likelihood[own].quantile(_UNLIKELY))
        kept += [place for place in agreed if float(log_likelihood[place]) >= least]
    return kept
