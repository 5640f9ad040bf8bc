"""Forms clusters of a pool of unlike devices, so that the slowest stage of all is as fast as it can be.

A round lasts as long as its slowest cluster, and a cluster is as fast as its slowest stage. So, in this order: the
slowest stage of all clusters is fast, and devices wait little: what makes nothing faster is left out. A solver assigns
devices to clusters by what they can hold (`planning.cover`), arrays find each cluster's best order and cuts
(`planning.pool`), and a local search by what stages really take improves the assignment.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ecogen.planning.cover import MOST_SOLVED, Assignment, Capacities, cover, least_time, plain_bound
from ecogen.planning.pool import Members, Pool
from ecogen.planning.search import Plan

_SLACKS = (1.0, 1.1, 1.25, 1.6, 2.5, 5.0)  # times the bound for which the solver is asked for assignments
_SMALL, _IMPROVED = 12, 3  # devices up to which all of those assignments are improved; else the best so many
_TRIED = 6  # numbers of clusters, where the pool is to say how many


@dataclass(frozen=True)
class Forming:
    """Clusters formed of a pool, and what is known of how fast they could be.

    Attributes:
        clusters: devices of the pool by index, of each cluster.
        plans: their placements, in the same order.
        bound_s: no clusters of this pool, so many, have a faster slowest stage.
    """

    clusters: tuple[Members, ...]
    plans: tuple[Plan, ...]
    bound_s: float

    @property
    def slowest_s(self) -> float:
        """The slowest stage of all."""
        return max(plan.bottleneck_s for plan in self.plans)

    @property
    def idle_s(self) -> float:
        """Seconds that the devices wait, together, for each microbatch that every cluster does."""
        return sum(self.slowest_s - stage_s for plan in self.plans for stage_s in plan.stage_s)


def form(pool: Pool, count: int) -> Forming | None:
    """So many clusters with the fastest slowest stage that is found; None if none is that holds the model."""
    capacities = Capacities.of(pool)
    bound_s = least_time(capacities, count)
    if bound_s is None:
        return None
    starts = sorted(_starts(pool, capacities, count, bound_s), key=lambda start: slowest_first(pool, start))
    found = [improve(pool, start) for start in starts[: None if len(pool.nodes) <= _SMALL else _IMPROVED]]
    best = min(found, key=lambda clusters: slowest_first(pool, clusters), default=None)
    if best is None or not np.isfinite(slowest_first(pool, best)[0]):
        return None
    trimmed = _trim(pool, best)
    return Forming(tuple(trimmed), tuple(pool.plan(members) for members in trimmed), bound_s)


def form_most(pool: Pool) -> Forming | None:
    """As many clusters as tune the most examples a second, each as fast as the slowest: a round waits for that one.

    It forms those numbers of clusters that promise most, by what the devices can hold at their best.
    """
    capacities = Capacities.of(pool)
    promised = {count: plain_bound(capacities, count) for count in range(1, len(pool.nodes) + 1)}
    possible = [count for count, bound_s in promised.items() if bound_s is not None]
    promising = sorted(possible, key=lambda count: (promised[count] or 0) / count)
    best: Forming | None = None
    for count in promising[:_TRIED]:
        found = form(pool, count)
        if found is not None and (best is None or _rate(found) > _rate(best)):
            best = found
    return best


def slowest_first(pool: Pool, clusters: Sequence[Members]) -> list[float]:
    """What an assignment is judged by: the slowest stage of each cluster, the slowest cluster first."""
    return sorted((pool.slowest_s(members) for members in clusters), reverse=True)


def improve(pool: Pool, clusters: Sequence[Members]) -> Assignment:
    """Change the slowest cluster, with another or with devices that are in none, while that makes it faster.

    A change moves a device or exchanges two, and neither cluster may end as slow as the slowest was.
    """
    current = list(clusters)
    while True:
        slowest = max(range(len(current)), key=lambda index: pool.slowest_s(current[index]))
        limit_s = pool.slowest_s(current[slowest])
        for changed in _changes(pool, current, slowest):
            if _all_faster(pool, changed.values(), limit_s):
                for index, members in changed.items():
                    current[index] = members
                break
        else:
            return current


def _changes(pool: Pool, clusters: Sequence[Members], slowest: int) -> Iterator[dict[int, Members]]:
    """Clusters after each change that concerns the slowest, by index."""
    own = clusters[slowest]
    unused = frozenset(range(len(pool.nodes))) - frozenset().union(*clusters)
    for come in sorted(unused):
        yield {slowest: own | {come}}
    for go in sorted(own):
        yield {slowest: own - {go}}
        for come in pool.better_than(go, unused):
            yield {slowest: own - {go} | {come}}
    for index, others in enumerate(clusters):
        if index != slowest:
            for come in sorted(others):
                yield {slowest: own | {come}, index: others - {come}}
            for go in sorted(own):
                yield {slowest: own - {go}, index: others | {go}}
                for come in pool.better_than(go, others):
                    yield {slowest: own - {go} | {come}, index: others - {come} | {go}}


def _all_faster(pool: Pool, clusters: Collection[Members], limit_s: float) -> bool:
    return all(pool.may_be_faster(members, limit_s) for members in clusters) and all(
        pool.slowest_s(members) < limit_s for members in clusters
    )


def _starts(pool: Pool, capacities: Capacities, count: int, bound_s: float) -> Iterator[Assignment]:
    """Assignments to begin with: the solver's for several times, and devices dealt out in turn, all or the fastest."""
    for slack in _SLACKS:
        found = cover(capacities, count, slack * bound_s)
        if found is not None:
            yield found
    for each in range(1, pool.num_blocks) if len(pool.nodes) > MOST_SOLVED else ():
        yield dealt(pool, count, each)
    yield dealt(pool, count)


def dealt(pool: Pool, count: int, each: int | None = None) -> Assignment:
    """Round-robin by speed, there and back; devices that cannot hold a block, and those that are too many, in none.

    Args:
        each: devices that a cluster has at most; None for as many as there are blocks.
    """
    holds = pool.least_s(np.arange(len(pool.nodes)), 2)
    useful = np.isfinite(np.stack(holds)[:, :, 1]).any(axis=0) | np.isfinite(pool.alone_s)
    order = sorted(np.flatnonzero(useful), key=lambda index: -pool.nodes[index].device.flops_per_s)
    turns = [order[turn * count : (turn + 1) * count] for turn in range(each or pool.num_blocks)]
    clusters: list[set[int]] = [set() for _ in range(count)]
    for number, turn in enumerate(turns):
        for cluster, index in zip(clusters[:: -1 if number % 2 else 1], turn, strict=False):
            cluster.add(int(index))
    return [frozenset(cluster) for cluster in clusters]


def _trim(pool: Pool, clusters: Sequence[Members]) -> Assignment:
    """Leave out, slowest device first, whatever the slowest stage of all does not need."""
    limit_s = slowest_first(pool, clusters)[0]
    return [_trimmed(pool, members, limit_s) for members in clusters]


def _trimmed(pool: Pool, members: Members, limit_s: float) -> Members:
    for index in sorted(members, key=lambda index: pool.nodes[index].device.flops_per_s):
        if pool.slowest_s(members - {index}) <= limit_s:
            members = members - {index}
    return members


def _rate(forming: Forming) -> float:
    return len(forming.clusters) / forming.slowest_s
