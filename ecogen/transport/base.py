"""The transport seam: messages between nodes, one-off calls and long-lived streams.

Everything remote passes through `Transport`. A node serves one `Service`; it calls others by node id, never by host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import msgspec
from torch import Tensor

from ecogen.errors import ProtocolError
from ecogen.records import Kind, Traffic

PROTOCOL_VERSION = 1

Body = TypeVar("Body", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class Message:
    """A typed header and named tensors.

    Attributes:
        method: what the receiver should do with it.
        kind: what it carries, for the books.
        body: a msgspec structure as MessagePack; `Message.of` writes it and `read` reads it.
        tensors: detached, on any device; a receiver may get them by reference and must not write into them.
        counted: False only for the collection of the books itself, which is not in the books.
    """

    method: str
    kind: Kind = "control"
    body: bytes = b""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    counted: bool = True

    @classmethod
    def of(
        cls,
        method: str,
        body: msgspec.Struct | None = None,
        *,
        kind: Kind = "control",
        tensors: Mapping[str, Tensor] | None = None,
        counted: bool = True,
    ) -> Message:
        """A message with `body` encoded."""
        return cls(method, kind, b"" if body is None else msgspec.msgpack.encode(body), tensors or {}, counted)

    def read(self, body_type: type[Body]) -> Body:
        """The body as `body_type`; fields that this version does not know are ignored.

        Raises:
            ProtocolError: if the body is not one.
        """
        try:
            return msgspec.msgpack.decode(self.body, type=body_type)
        except msgspec.MsgspecError as problem:
            raise ProtocolError(f"{self.method}: the body is not a {body_type.__name__} ({problem})") from problem


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as its certificate says: never as a message claims."""

    node_id: str
    tier: str


class Stream(Protocol):
    """An ordered, bidirectional flow of messages with one neighbour."""

    async def send(self, message: Message) -> None:
        """Queue a message; waits while the window to the neighbour is full.

        Raises:
            NodeLostError: if the neighbour is gone.
        """

    async def receive(self) -> Message | None:
        """The next message, or None once the neighbour has closed in order.

        Raises:
            NodeLostError: if the neighbour vanished.
        """

    async def close(self) -> None:
        """Close this end in order; harmless when already closed."""


class Service(Protocol):
    """What a node answers to."""

    async def handle(self, peer: Peer, message: Message) -> Message:
        """Answer one call. An EcoGenError raised here is raised again at the caller.

        The task is cancelled when the caller gives up or vanishes.
        """

    async def accept(self, peer: Peer, stream: Stream) -> None:
        """Serve a stream that a neighbour opened, until it ends; the stream closes when this returns."""


class Transport(Protocol):
    """One node's connection to the others."""

    peer: Peer
    counter: TrafficCounter

    async def serve(self, service: Service) -> str:
        """Begin to answer; returns the address under which others reach this node."""

    def learn(self, node_id: str, address: str) -> None:
        """Remember where a node is; a new address replaces the old one and its connections."""

    async def call(self, node_id: str, message: Message, *, timeout_s: float | None = None) -> Message:
        """Ask a node and wait for its answer; cancelling this cancels the work there.

        Raises:
            NodeLostError: if the node cannot be reached, vanishes or does not answer within `timeout_s`.
            AuthenticationError: if either side does not accept the other's certificate.
            EcoGenError: what the node's service raised.
        """

    async def open(self, node_id: str) -> Stream:
        """Open a stream to a neighbour.

        Raises:
            NodeLostError, AuthenticationError: as `call`.
        """

    async def close(self) -> None:
        """Close all streams and stop serving."""


class TrafficCounter:
    """Adds up what a node sends, by receiver and kind, as the codec wrote it."""

    def __init__(self) -> None:
        self._totals: dict[tuple[str, Kind], list[int]] = {}

    def count(
        self, receiver_id: str, kind: Kind, payload_bytes: int, header_bytes: int, framing_bytes: int = 0
    ) -> None:
        """Add one message."""
        total = self._totals.setdefault((receiver_id, kind), [0, 0, 0, 0])
        for index, value in enumerate((1, payload_bytes, header_bytes, framing_bytes)):
            total[index] += value

    def take(self) -> tuple[Traffic, ...]:
        """Everything counted since the last `take`."""
        totals, self._totals = self._totals, {}
        return tuple(Traffic(receiver, kind, *numbers) for (receiver, kind), numbers in sorted(totals.items()))
