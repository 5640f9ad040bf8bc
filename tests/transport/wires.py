"""Nodes on the wire in a test, each with the certificate from its own directory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from ecogen.transport import codec
from ecogen.transport.base import Peer
from ecogen.transport.codec import Limits
from ecogen.transport.credentials import load_credentials
from ecogen.transport.wire import GrpcTransport
from tests.transport.echo import Echo


def transport(
    directory: Path,
    tier: str,
    *,
    revoked: Path | None = None,
    port: int = 0,
    keepalive_s: float = 6.0,
    limits: Limits = codec.DEFAULT_LIMITS,
) -> GrpcTransport:
    """A node's transport; the directory with its certificate has its name."""
    credentials = load_credentials(directory)
    peer = Peer(directory.name, tier)
    return GrpcTransport(
        peer, credentials=credentials, revoked=revoked, port=port, keepalive_s=keepalive_s, limits=limits
    )


def end_node(nodes: Path) -> tuple[GrpcTransport, Echo]:
    """The transport of node end-1, and a service for it."""
    return transport(nodes / "end-1", "end"), Echo()


@asynccontextmanager
async def closing(*transports: GrpcTransport) -> AsyncIterator[None]:
    """Close them in the end, whatever happened."""
    try:
        yield
    finally:
        for transport in transports:
            await transport.close()
