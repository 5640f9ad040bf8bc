"""What a node is given when it starts, and what all its roles share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from ecogen.records import Usage
from ecogen.runtime.cpu import avoid_trapped_instructions
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message, Peer, Stream, Transport

INSTALL, BOOKS, PUBLISH, WATCH, RECORD, PROGRESS, END, STATUS, RESULT, DESCRIBE, LOCATE, HEARD = (
    "install",
    "books",
    "publish",
    "watch",
    "record",
    "progress",
    "end",
    "status",
    "result",
    "describe",
    "locate",
    "heard",
)

OPERATOR = "operator"
"""Node id and tier of whoever launched or watches; not a part of the federation."""


@dataclass
class NodeContext:
    """One node's own things; made before the node computes anything.

    Attributes:
        folder: its disk; what is in it survives a restart.
        device, dtype: what it computes on.
    """

    node_id: str
    folder: Path
    transport: Transport
    worker: Worker
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype == "bfloat16":
            avoid_trapped_instructions()


Handler = Callable[[Peer, Message], Awaitable[Message]]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who may call: the nodes of a tier, or one of them only."""

    tier: str
    node_id: str | None = None

    def admits(self, peer: Peer) -> bool:
        return peer.tier == self.tier and self.node_id in (None, peer.node_id)

    def __str__(self) -> str:
        return self.tier if self.node_id is None else f"{self.node_id} ({self.tier})"


@dataclass(frozen=True, slots=True)
class Method:
    """What answers a method, and who may call it."""

    handler: Handler
    callers: tuple[Caller, ...]


class Role(Protocol):
    """What a node of one tier does."""

    @property
    def methods(self) -> Mapping[str, Method]:
        """What it answers to."""

    async def run(self, address: str) -> None:
        """The node's own loops, until it is stopped."""

    async def accept(self, peer: Peer, stream: Stream) -> None:
        """Serve a stream that another node opened."""


class Ready(msgspec.Struct, frozen=True):
    """Child to parent: I hold what I need; and what fetching it took."""

    usage: Usage


class Welcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """Parent to child: what this federation is about. Tensors: the tunables to begin with, for an edge.

    Attributes:
        recipe: the resolved recipe, as a table.
        model: the configuration of the model with its head.
        digest: of the backbone, so that a child that has it already need not fetch it again.
        placement: for a device: of its cluster.
        next_round: for an edge: the round that the federation is at.
        names: for an edge that serves: of the tensors in the model's folder.
        files: for an edge that serves: the tokenizer's.
        nbytes: of the model's files, for an edge that serves.
        offered: of a decoder, the names of the backbone's tensors and files, which the configuration does not tell.
    """

    recipe: dict[str, Any]
    model: dict[str, Any]
    digest: str
    placement: list[dict[str, Any]] = msgspec.field(default_factory=list)
    next_round: int = 0
    names: list[str] = msgspec.field(default_factory=list)
    files: dict[str, bytes] = msgspec.field(default_factory=dict)
    offered: list[str] = msgspec.field(default_factory=list)
    nbytes: int = 0


class Located(msgspec.Struct, frozen=True):
    """Cloud that serves to operator: where its edges are, those that are here."""

    addresses: dict[str, str]


class ProgressReport(msgspec.Struct, frozen=True):
    """How far a long piece of work is."""

    phase: str
    done: int
    total: int
    detail: str = ""


def methods(*callers: Caller, **handlers: Handler) -> dict[str, Method]:
    """Methods that the same callers may use."""
    return {name: Method(handler, callers) for name, handler in handlers.items()}
