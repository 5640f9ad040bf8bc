"""Why devices of a pool are in no cluster, and what it would cost to have them in one: tried out, not guessed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ecogen.planning.pool import Members, Pool
from ecogen.units import format_bytes

_ALIKE = 1.005  # times as long that is told as no difference


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A device in no cluster.

    Attributes:
        slowest_s: the slowest stage of all with it where it does least harm; None where it can be nowhere.
    """

    node_id: str
    reason: str
    slowest_s: float | None = None


def left_out(pool: Pool, clusters: Sequence[Members], cluster_ids: Sequence[str]) -> list[LeftOut]:
    """Each device of the pool that is in no cluster, with the reason.

    Args:
        clusters: devices by index, each cluster able to hold the model.
        cluster_ids: their names, in the same order.
    """
    unused = sorted(set(range(len(pool.nodes))).difference(*clusters))
    return [_reason(pool, clusters, cluster_ids, index) for index in unused]


def _reason(pool: Pool, clusters: Sequence[Members], cluster_ids: Sequence[str], index: int) -> LeftOut:
    node = pool.nodes[index]
    least = pool.least_needs(min(len(members) for members in clusters))
    if least > node.device.memory_bytes:
        has = format_bytes(node.device.memory_bytes)
        reason = f"cannot hold one block: that needs {format_bytes(least)}, and it has {has}"
        return LeftOut(node.node_id, reason)
    now_s = max(pool.slowest_s(members) for members in clusters)
    with_s, cluster, instead = min(_ways(pool, clusters, index))
    if not np.isfinite(with_s):
        return LeftOut(
            node.node_id, "no cluster can hold the model with it: with one device more, more microbatches are in flight"
        )
    place = f"in {cluster_ids[cluster]}" + (f" instead of {pool.nodes[instead].node_id}" if instead >= 0 else "")
    if with_s > _ALIKE * now_s:
        reason = f"too slow: {place} the slowest stage would take {with_s / now_s:.3g} x as long"
    elif with_s < now_s / _ALIKE:
        reason = f"the clusters do not name it: {place} the slowest stage would take {with_s / now_s:.3g} x as long"
    else:
        reason = f"not needed: {place} the slowest stage would be no faster"
    return LeftOut(node.node_id, reason, with_s)


def _ways(pool: Pool, clusters: Sequence[Members], index: int) -> Iterator[tuple[float, int, int]]:
    """The slowest stage of all with a device in each cluster, and in place of which other; -1 for none."""
    for number, members in enumerate(clusters):
        others_s = max((pool.slowest_s(other) for other in clusters if other is not members), default=0.0)
        yield max(others_s, pool.slowest_s(members | {index})), number, -1
        if len(members) == pool.num_blocks:  # no block is left for one more
            for other in members:
                yield max(others_s, pool.slowest_s(members - {other} | {index})), number, other
