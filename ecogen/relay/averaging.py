"""What the cloud's learning begins with: its own tunables, or some on the way to the mean of those of its edges.

Edges whose models are built as the cloud's may send what they have tuned, beside what they drew. Their mean may be
worth more than what the cloud has, or nothing at all, as of edges that have gone apart. So points of the line between
both are measured, and the best is taken, before anything is learnt from drawings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from torch import Tensor

from ecogen.errors import AggregationError, ProtocolError
from ecogen.models.tunables import Tunables
from ecogen.records import Cause
from ecogen.relay.messages import Tuned
from ecogen.relay.samples import Samples
from ecogen.tuning.aggregate import Update, check_update
from ecogen.tuning.ranks import LoraRanks, average

_STEPS = 4
"""From one end of the line to the other."""

Measure = Callable[[Mapping[str, Tensor]], float]
"""Perplexity with some tunables."""


class Given(NamedTuple):
    """Tunables of an edge, and what they were sent for."""

    told: Tuned
    tunables: Tunables

    def is_for(self, cause: Cause, cycle: int) -> bool:
        """Whether it was this exchange of that edge."""
        return (self.told.cause, self.told.cycle) == (cause, cycle)


class Begun(NamedTuple):
    """What learning begins with.

    Attributes:
        share: of the way from the cloud's own tunables to the mean of the edges', from 0 to 1.
    """

    tunables: Tunables
    share: float = 0.0


def begun(
    own: Tunables,
    edges: Mapping[str, Mapping[str, Tensor]],
    lessons: Mapping[str, Samples],
    measures: Sequence[Measure],
    ranks: LoraRanks | None = None,
) -> Begun:
    """The point of the line with the least mean log-perplexity; of equals, the nearest to the cloud's own tunables.

    Args:
        edges: tunables, by edge, which `checked_tunables` let pass.
        lessons: what each edge teaches; it weighs by the real examples behind that. Who teaches nothing has no weight.
        measures: each counts as much as the others.
        ranks: how LoRA is averaged where its products are.
    """
    updates = [Update(edge, edges[edge], evidence_of(lessons[edge])) for edge in sorted(edges.keys() & lessons.keys())]
    if not sum(update.num_examples for update in updates):
        return Begun(own)
    return min(_points(own, average(own, updates, ranks).tunables, ranks), key=lambda point: _height(point, measures))


def evidence_of(samples: Samples) -> int:
    """The real examples behind all captions that samples have."""
    return sum(samples.evidence.get(caption, 0) for caption in set(samples.captions))


def checked_tunables(edge_id: str, tunables: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tunables:
    """An edge's tunables, which can be averaged with the cloud's own.

    Raises:
        ProtocolError: if names, shapes or types are others than those of the cloud's, or a value is not finite.
    """
    for name in sorted(own.keys() & tunables.keys()):
        if tunables[name].dtype != own[name].dtype:
            said = f"tunables of {edge_id!r} have {tunables[name].dtype} as {name!r} instead of {own[name].dtype}"
            raise ProtocolError(f"{said}; set relay.tunables = false, or compute in one type")
    try:
        check_update(Update(edge_id, tunables, 0), own)
    except AggregationError as problem:
        said = "set relay.tunables = false where an edge's model is another than the cloud's, or diverges"
        raise ProtocolError(f"{problem}; {said}") from problem
    return dict(tunables)


def _points(own: Tunables, mean: Tunables, ranks: LoraRanks | None) -> Iterator[Begun]:
    """The points that are tried, one by one from the cloud's own tunables on.

    Each is a mean of both ends, so that LoRA's products are averaged here where they are between edges.
    """
    yield Begun(own)
    for step in range(1, _STEPS + 1):
        ends = [Update("own", own, _STEPS - step), Update("the mean", mean, step)]
        yield Begun(average(own, ends, ranks).tunables, step / _STEPS)


def _height(point: Begun, measures: Sequence[Measure]) -> float:
    """The mean log-perplexity of a point; what is no number is not to be chosen."""
    height = fmean(math.log(perplexity(point.tunables)) for perplexity in measures)
    return math.inf if math.isnan(height) else height
