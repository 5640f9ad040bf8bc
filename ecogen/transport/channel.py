"""The way to one node: a gRPC channel, made when first used, and what its errors mean."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import grpc
import grpc.aio

from ecogen.errors import AuthenticationError, NodeLostError, ProtocolError, TransportError
from ecogen.transport.codec import Limits
from ecogen.transport.framing import MAX_FRAME_BYTES

SERVICE = "ecogen"
ACCEPTED = ("ok", "1")
"""What a node says at once about a stream that it lets in; one that it refuses looks much the same otherwise."""

Options = Sequence[tuple[str, int | str]]

# Numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class Link:
    """The way to one node at one address; connected when first used."""

    def __init__(self, connect: Callable[[str, str], grpc.aio.Channel], node_id: str, address: str) -> None:
        self.node_id = node_id
        self.address = address
        self._make_channel = connect
        self._channel: grpc.aio.Channel | None = None
        self._call: Any = None
        self._stream: Any = None

    def call(self, data: bytes, *, metadata: Any) -> Any:
        """Begin a call; gRPC's call object, to be awaited."""
        self.connect()
        return self._call(data, metadata=metadata)

    def stream(self, *, metadata: Any) -> Any:
        """Begin a stream; gRPC's call object."""
        self.connect()
        return self._stream(metadata=metadata)

    def retire(self, start: Callable[[Coroutine[Any, Any, None]], object]) -> None:
        """Close in the background: another link took its place."""
        if self._channel is not None:
            start(self.close())

    async def close(self) -> None:
        """Close the connection; calls in progress fail."""
        if self._channel is not None:
            await self._channel.close()

    def connect(self) -> None:
        """Make the channel if there is none yet; it connects when used."""
        if self._channel is None:
            keep_freed_memory()
            self._channel = self._make_channel(self.node_id, self.address)
            self._call = self._channel.unary_unary(f"/{SERVICE}/Call")
            self._stream = self._channel.stream_stream(f"/{SERVICE}/Stream")


async def connected(rpc: Any) -> None:
    """Wait until the other node has accepted the stream."""
    metadata = await rpc.initial_metadata()
    if ACCEPTED not in tuple(metadata or ()):
        await rpc.code()
        await rpc.read()  # raises why not


async def outcome(rpc: Awaitable[Any], link: Link) -> Any:
    """What gRPC brings back, its errors as ours."""
    try:
        return await rpc
    except grpc.aio.AioRpcError as error:
        raise _translated(error.code(), error.details() or "", link) from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise NodeLostError(link.node_id, f"the connection to {link.address} was closed") from None


def _translated(code: Any, details: str, link: Link) -> TransportError:
    where = f"{link.address} ({details})"
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return AuthenticationError(f"node {link.node_id!r} refused this node: {details}")
    if code == grpc.StatusCode.UNAVAILABLE and _is_handshake(details):
        return AuthenticationError(f"this node and {link.node_id!r} at {where} do not trust each other; check both")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ProtocolError(
            f"node {link.node_id!r}: {details}; "
            "set the same transport.message_mib, or --message-mib of `ecogen node`, on both"
        )
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolError(f"what answers at {where} is not an EcoGen node")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED):
        return NodeLostError(link.node_id, f"no connection to {where}")
    return TransportError(f"node {link.node_id!r} at {where}: {code.name}")


def _is_handshake(details: str) -> bool:
    return any(sign in details for sign in ("handshake", "erification", "SSL_ERROR", "certificate"))


def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MiB of freed memory for the next message, rather than 2 MiB.

    Otherwise every message of 1 MB faults all its pages in anew, in each of its copies: measured 2.0 ms instead of
    1.4 ms one way. The setting is the process's; other C libraries are left alone.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


def options(limits: Limits, keepalive_s: float) -> Options:
    """gRPC's options, for channels and servers alike: https://grpc.github.io/grpc/core/group__grpc__arg__keys.html"""
    keepalive_ms = int(keepalive_s * 1000)
    return (
        ("grpc.max_send_message_length", -1),  # the codec checks it
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.so_reuseport", 0),  # a taken port is an error
        ("grpc.use_local_subchannel_pool", 1),  # a new channel means a new connection
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 10_000),  # how long one attempt to connect may take
        ("grpc.max_reconnect_backoff_ms", 500),
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", keepalive_ms),
        ("grpc.http2.ping_timeout_ms", keepalive_ms),  # else a keepalive ping waits 60 s, whatever its own timeout
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 16 * 2**20 - 1),
        ("grpc.http2.max_frame_size", MAX_FRAME_BYTES),
    )
