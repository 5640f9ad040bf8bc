"""What an edge has its devices hold: which segments of which model, for how many requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from ecogen.errors import ProtocolError
from ecogen.models.folder import has_shard, write_index, write_shard
from ecogen.models.mixed_lora import Adapter
from ecogen.placement import Placement, Segment, Visit
from ecogen.records import Usage
from ecogen.runtime.delivery import fetch_tensors
from ecogen.transport.base import Message, Transport
from ecogen.units import MIB

_PART_BYTES = 4 * MIB
_MAX_PARTS = 4096

Compute = Callable[..., Awaitable[Any]]

LOAD, CONNECT, UNLOAD = "load", "connect", "unload"
PREPARE, HOLDS, DROP, DRAIN = "prepare", "holds", "drop", "drain"


class Load(msgspec.Struct, frozen=True):
    """Edge to device: hold what is yours of this chain; what was held before is dropped.

    Attributes:
        chain: its number.
        visits: of the whole chain, in order.
        config: of the model.
        digest: of its folder, so that tensors that are on this disk already need not be fetched again.
        names: of the tensors that this device needs, by shard.
        groups, slots, max_tokens: room for requests.
        files: the tokenizer's, for the last stage, which may have to keep to a grammar.
    """

    chain: int
    visits: list[Visit]
    config: dict[str, Any]
    digest: str
    names: dict[str, list[str]]
    groups: int
    slots: int
    max_tokens: int
    files: dict[str, bytes] = msgspec.field(default_factory=dict)

    @property
    def placement(self) -> Placement:
        return Placement(tuple(self.visits))


class Loaded(msgspec.Struct, frozen=True):
    """Device to edge: I hold it; and what that took."""

    usage: Usage


class Connect(msgspec.Struct, frozen=True):
    """Edge to device: here are your neighbours on the chain."""

    addresses: dict[str, str]


class Prepare(msgspec.Struct, frozen=True):
    """Hold an adapter, so that steps may name it; its tensors come in parts.

    Attributes:
        adapter_id: of this version; no other version ever has it.
        scalings: by how much each module's product counts.
        part: the number of this one.
        is_last: whether the adapter is complete with it.
    """

    adapter_id: str
    scalings: dict[str, float]
    part: int
    is_last: bool


class Held(msgspec.Struct, frozen=True):
    """Edge to gateway: whether devices hold the adapter, and so have seen that it fits; if not, others will."""

    is_held: bool = False


class Holds(msgspec.Struct, frozen=True):
    """Gateway to edge: do devices hold this adapter by now?"""

    adapter_id: str


class Drop(msgspec.Struct, frozen=True):
    """No step names this adapter any more."""

    adapter_id: str


class Drain(msgspec.Struct, frozen=True):
    """Operator to edge: hold nothing on this device any more, or do again."""

    node_id: str
    is_out: bool = True


class Assembly:
    """Adapters of which parts have come."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[str, Tensor]] = {}

    def add(self, message: Message) -> tuple[str, Adapter | None]:
        """Take one part; gives the adapter once it is complete.

        Raises:
            ProtocolError: if it is too large, or its first parts are not here any more.
        """
        prepare = message.read(Prepare)
        if not prepare.part:
            self._parts[prepare.adapter_id] = {}
        elif prepare.adapter_id not in self._parts:
            raise ProtocolError(f"part {prepare.part} of adapter {prepare.adapter_id!r} came without those before it")
        tensors = self._parts[prepare.adapter_id]
        tensors |= message.tensors
        if prepare.part >= _MAX_PARTS:
            del self._parts[prepare.adapter_id]
            raise ProtocolError(f"adapter {prepare.adapter_id!r} has more than {_MAX_PARTS} parts")
        if not prepare.is_last:
            return prepare.adapter_id, None
        return prepare.adapter_id, Adapter(prepare.scalings, self._parts.pop(prepare.adapter_id))

    def forget(self, adapter_id: str) -> None:
        """No more parts of it come."""
        self._parts.pop(adapter_id, None)

    def clear(self) -> None:
        """No more parts of any come."""
        self._parts.clear()


def parts_of(adapter_id: str, adapter: Adapter) -> Iterator[Message]:
    """The messages that bring an adapter, one at least."""
    parts: list[dict[str, Tensor]] = [{}]
    room = _PART_BYTES
    for name, tensor in adapter.tensors.items():
        if tensor.nbytes > room and parts[-1]:
            parts.append({})
            room = _PART_BYTES
        parts[-1][name] = tensor
        room -= tensor.nbytes
    for index, tensors in enumerate(parts):
        prepare = Prepare(adapter_id, dict(adapter.scalings), index, index == len(parts) - 1)
        yield Message.of(PREPARE, prepare, kind="tunables", tensors=tensors)


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
