"""What an edge has its devices hold: which segments of which model, for how many requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ecogen.models.folder import has_shard, write_index, write_shard
from ecogen.placement import Placement, Segment, Visit
from ecogen.runtime.delivery import fetch_tensors
from ecogen.transport.base import Transport

Compute = Callable[..., Awaitable[Any]]

LOAD, CONNECT = "load", "connect"


class Load(msgspec.Struct, frozen=True):
    """Edge to device: hold what is yours of this chain; what was held before is dropped.

    Attributes:
        chain: its number.
        visits: of the whole chain, in order.
        config: of the model.
        digest: of its folder, so that tensors that are on this disk already need not be fetched again.
        names: of the tensors that this device needs, by shard.
        groups, slots, max_tokens: room for requests.
    """

    chain: int
    visits: list[Visit]
    config: dict[str, Any]
    digest: str
    names: dict[str, list[str]]
    groups: int
    slots: int
    max_tokens: int

    @property
    def placement(self) -> Placement:
        return Placement(tuple(self.visits))


class Connect(msgspec.Struct, frozen=True):
    """Edge to device: here are your neighbours on the chain."""

    addresses: dict[str, str]


async def fetch_folder(
    transport: Transport,
    parent_id: str,
    path: Path,
    config: Mapping[str, Any],
    shards: Mapping[str, list[str]],
    compute: Compute,
) -> None:
    """Make a folder with some of a model's tensors, shard by shard; those that are there are not fetched again.

    Args:
        compute: runs a function on a thread.

    Raises:
        NodeLostError: if the parent is lost; what was fetched stays.
    """
    for shard, names in shards.items():
        if not await compute(has_shard, path, shard, names):
            tensors = await fetch_tensors(transport, parent_id, names)
            await compute(write_shard, path, shard, tensors)
    await compute(write_index, path, config, shards)


def segments_by_visit(placement: Placement, node_id: str) -> dict[int, Segment]:
    """What one node holds, by the index of its visits."""
    return {index: visit.segment for index, visit in enumerate(placement) if visit.node_id == node_id}
