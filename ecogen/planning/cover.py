"""Assigns devices to clusters by a solver, so that each cluster can hold the model within a time.

What a device can hold within a time is counted at its best: wherever its blocks are and to whomever it sends. So where
even that leaves some cluster short, no assignment is as fast: the least time that does not is a bound.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from ecogen.planning.pool import Floats, Ints, Pool

Assignment = list[frozenset[int]]

_INFEASIBLE = 2  # the status of scipy.optimize.milp
MOST_SOLVED = 64
"""Devices of a pool up to which the solver is asked: beyond, its first relaxation alone may take minutes."""

# Of the solver's tree, and of how few devices an assignment needs; a limit in seconds would not be the same everywhere.
_MAX_NODES, _GAP = 100, 0.2


@dataclass(frozen=True)
class Capacities:
    """In what times each device can hold how many blocks, at its best.

    Attributes:
        first_s, other_s: seconds [N, B + 1] as the first of a chain and as another; infinite where it does not fit.
        alone_s: seconds [N] with the whole model.
    """

    first_s: Floats
    other_s: Floats
    alone_s: Floats

    @classmethod
    def of(cls, pool: Pool) -> Capacities:
        """Of a pool; memory is counted for as few microbatches in flight as the smallest cluster has."""
        alone_s, size = pool.alone_s, 2
        while True:
            found = cls(*pool.least_s(np.arange(len(pool.nodes)), size), alone_s)
            first, other = found.blocks(np.inf)
            most = np.sort(np.maximum(first, other))[::-1]
            if (
                np.isfinite(alone_s).any()
                or size >= min(len(most), pool.num_blocks)
                or most[:size].sum() >= pool.num_blocks
            ):
                return found
            size += 1

    @property
    def num_devices(self) -> int:
        return len(self.alone_s)

    @property
    def num_blocks(self) -> int:
        return int(self.first_s.shape[1]) - 1

    def blocks(self, within_s: float) -> tuple[Ints, Ints]:
        """The most blocks [N] that each device can hold within a time: as the first, and as another."""
        first, other = _most(self.first_s, within_s), _most(self.other_s, within_s)
        first[self.alone_s <= within_s] = self.num_blocks
        return first, other

    def are_plainly_short(self, count: int, within_s: float) -> bool:
        """Whether all devices together hold too little, without asking which goes where."""
        most = np.minimum(np.maximum(*self.blocks(within_s)), self.num_blocks)
        return bool(most.sum() < count * self.num_blocks)

    def times(self) -> Floats:
        """Every time at which some device can hold one block more."""
        every = np.concatenate([self.first_s.ravel(), self.other_s.ravel(), self.alone_s])
        return np.unique(every[np.isfinite(every) & (every > 0)])


def least_time(capacities: Capacities, count: int) -> float | None:
    """A bound: so many clusters cannot all be faster than this; None if they cannot be formed at all.

    The first time at which the devices are plainly enough is where the solver begins, in steps that double.
    """
    times, plain_s = capacities.times(), plain_bound(capacities, count)
    if plain_s is None or is_short(capacities, count, float(times[-1])):
        return None
    low = bisect_left(times, plain_s)
    step, high = 1, low
    while is_short(capacities, count, float(times[high])):
        low, high, step = high + 1, min(high + step, len(times) - 1), 2 * step
    while low < high:
        middle = (low + high) // 2
        if is_short(capacities, count, float(times[middle])):
            low = middle + 1
        else:
            high = middle
    return float(times[low])


def plain_bound(capacities: Capacities, count: int) -> float | None:
    """The same without the solver, and so lower: the first time at which all devices together hold enough."""
    times = capacities.times()
    low = bisect_left(times, True, key=lambda time_s: not capacities.are_plainly_short(count, float(time_s)))
    return float(times[low]) if low < len(times) else None


def is_short(capacities: Capacities, count: int, within_s: float) -> bool:
    """Whether it is proven that so many clusters cannot all hold the model within a time."""
    alone = int((capacities.alone_s <= within_s).sum())
    if alone >= count:
        return False
    if capacities.are_plainly_short(count, within_s):
        return True
    return capacities.num_devices <= MOST_SOLVED and _solve(capacities, count - alone, within_s)[0] == _INFEASIBLE


def cover(capacities: Capacities, count: int, within_s: float) -> Assignment | None:
    """Clusters of the fewest devices that can hold the model within a time; None if the solver finds none.

    A device that can hold all of it is a cluster, since whatever else was with it there would not be needed.
    """
    alone = np.flatnonzero(capacities.alone_s <= within_s)
    clusters = [frozenset({int(index)}) for index in alone[np.argsort(capacities.alone_s[alone])][:count]]
    if len(clusters) == count:
        return clusters
    if capacities.num_devices > MOST_SOLVED:
        return None
    counts = _solve(capacities, count - len(clusters), within_s, fewest=True)[1]
    return None if counts is None else clusters + _deal(capacities, within_s, counts)


def _solve(
    capacities: Capacities, count: int, within_s: float, *, fewest: bool = False
) -> tuple[int, NDArray[np.int64] | None]:
    """The solver's status, and how many devices of each kind each cluster gets: [2 (first, other), kinds, clusters].

    Devices that can hold equally many blocks are one kind K. With x = first, other devices of kind k in cluster c:

        sum_k first[k, c] = 1                                         each cluster has one first device
        sum_k a_k first[k, c] + b_k other[k, c] >= B                  it holds the model
        sum_k first[k, c] + other[k, c] <= B                          each device holds a block
        sum_c first[k, c] + other[k, c] <= N_k                        devices are there once
        sum_k a_k first[k, c] >= sum_k a_k first[k, c + 1]            clusters are alike: one order of them is enough
    """
    num_blocks = capacities.num_blocks
    kinds, sizes = _kinds(capacities, within_s)
    if kinds.max(axis=1, initial=0) @ sizes < count * num_blocks:
        return _INFEASIBLE, None
    shape = (2, len(kinds), count)
    rows, least, most = [], [], []

    def constrain(row: NDArray[np.float64], low: float, high: float) -> None:
        rows.append(row.ravel())
        least.append(low)
        most.append(high)

    for cluster in range(count):
        first, holds, devices = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        first[0, :, cluster], holds[:, :, cluster], devices[:, :, cluster] = 1, kinds.T, 1
        constrain(first, 1, 1)
        constrain(holds, num_blocks, np.inf)
        constrain(devices, 1, num_blocks)
        if cluster:
            ordered = np.zeros(shape)
            ordered[0, :, cluster - 1], ordered[0, :, cluster] = kinds[:, 0], -kinds[:, 0]
            constrain(ordered, 0, np.inf)
    for kind, size in enumerate(sizes):
        there = np.zeros(shape)
        there[:, kind] = 1
        constrain(there, 0, size)
    upper = np.broadcast_to(np.minimum(sizes, num_blocks)[None, :, None], shape).ravel()
    solved = milp(
        np.full(rows[0].size, float(fewest)),
        integrality=np.ones(rows[0].size),
        bounds=Bounds(0, upper),
        constraints=LinearConstraint(np.array(rows), least, most),
        options={"node_limit": _MAX_NODES, "mip_rel_gap": _GAP},
    )
    counts = None if solved.x is None else np.round(solved.x).astype(np.int64).reshape(shape)
    return int(solved.status), counts


def _kinds(capacities: Capacities, within_s: float) -> tuple[Ints, Ints]:
    """What each kind holds, as the first and as another [K, 2], and how many of it there are [K].

    Without those that hold nothing, and those that hold everything.
    """
    both = np.stack(capacities.blocks(within_s), axis=1)[capacities.alone_s > within_s]
    kinds, sizes = np.unique(both, axis=0, return_counts=True)
    useful = kinds.max(axis=1, initial=0) > 0
    return kinds[useful], sizes[useful]


def _deal(capacities: Capacities, within_s: float, counts: NDArray[np.int64]) -> Assignment:
    """Devices of each kind for each cluster: the fastest links go to the first, so that alike ones meet."""
    kinds, _ = _kinds(capacities, within_s)
    both = np.stack(capacities.blocks(within_s), axis=1)
    order = np.argsort(capacities.other_s[:, 1], kind="stable")
    order = order[capacities.alone_s[order] > within_s]
    left = [[int(index) for index in order if (both[index] == kind).all()] for kind in kinds]
    clusters = []
    for cluster in range(counts.shape[2]):
        wanted: Sequence[int] = counts[:, :, cluster].sum(axis=0)
        clusters.append(frozenset(left[kind].pop(0) for kind, count in enumerate(wanted) for _ in range(count)))
    return clusters


def _most(seconds: Floats, within_s: float) -> Ints:
    blocks: Ints = np.where(seconds <= within_s, np.arange(seconds.shape[1]), 0).max(axis=1)
    return blocks
