"""Aggregation: many updates in, one set of tunables out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ecogen.errors import AggregationError
from ecogen.models.tunables import Tunables


@dataclass(frozen=True, slots=True)
class Update:
    """The tunables of one cluster (or edge) after its local steps, and the examples behind them.

    Attributes:
        control_change: how SCAFFOLD's c_i changed, by the names of the tunables.
    """

    sender_id: str
    tunables: Mapping[str, Tensor]
    num_examples: int
    control_change: Mapping[str, Tensor] = field(default_factory=dict)


def aggregate(updates: Sequence[Update]) -> Tunables:
    """Average updates, each weighted by the examples it saw.

    FedAvg, McMahan et al. 2017, Algorithm 1: https://arxiv.org/abs/1602.05629. The average is taken in double
    precision, in the order of the senders' names, so that it does not depend on who came first.

    Raises:
        AggregationError: if names or shapes differ, a value is not finite, or nobody saw an example.
    """
    ordered = sorted(updates, key=lambda update: update.sender_id)
    total = _check_shapes(ordered)
    averages = {name: _average(name, ordered, total) for name in ordered[0].tunables}
    if not all(_is_finite(average) for average in averages.values()):
        check_updates(ordered)  # whatever is not finite in an update is not finite in the average either
    return averages


def check_update(update: Update, like: Mapping[str, Tensor]) -> None:
    """Check that a cluster sent the tunables it was asked for, and control variates for all or none, all finite.

    Raises:
        AggregationError: with the first name that is not right.
    """
    for name in sorted(like.keys() | update.tunables.keys()):
        expected, found = (tuple(t[name].shape) if name in t else "nothing" for t in (like, update.tunables))
        if expected != found:
            raise AggregationError(f"update of {update.sender_id!r} has {found} as {name!r} instead of {expected}")
    _check_finite(update)
    if update.control_change:
        check_update(replace(update, tunables=update.control_change, control_change={}), like)


def check_updates(updates: Sequence[Update]) -> None:
    """Check that updates can be put together.

    Raises:
        AggregationError: as `aggregate`.
    """
    _check_shapes(updates)
    for update in updates:
        _check_finite(update)


def _check_finite(update: Update) -> None:
    for name, tensor in update.tunables.items():
        if not _is_finite(tensor):
            raise AggregationError(f"update of {update.sender_id!r} has a value that is not finite in {name!r}")


def _average(name: str, updates: Sequence[Update], total: int) -> Tensor:
    first = updates[0].tunables[name]
    average = torch.zeros(first.shape, dtype=torch.float64)
    for update in updates:  # converted first: adding other types to double ones costs half as much again
        average.add_(update.tunables[name].double(), alpha=update.num_examples / total)
    return average.to(first.dtype)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are; their sum, where it is finite, says so in a tenth of the time."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _check_shapes(updates: Sequence[Update]) -> int:
    """All are of the same tunables; returns how many examples are behind them."""
    total = sum(update.num_examples for update in updates)
    if not updates or total <= 0:
        raise AggregationError(f"{len(updates)} updates with {total} examples in all: nothing to average")
    others = _shapes(updates[0])
    for update in updates:
        if (shapes := _shapes(update)) != others:
            name = sorted(set(shapes.items()) ^ set(others.items()))[0][0]
            raise AggregationError(f"updates of {update.sender_id!r} and {updates[0].sender_id!r} differ at {name!r}")
    return total


def _shapes(update: Update) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in update.tunables.items()}
