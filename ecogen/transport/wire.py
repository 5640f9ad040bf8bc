"""Nodes in processes of their own: gRPC with mutual TLS, unary calls and persistent bidirectional streams.

gRPC carries bytes that `codec` wrote; there is no protobuf. A stream ends in order with an empty message, so an end
without one means that the neighbour vanished. Nothing of gRPC is made before `serve`, `call` or `open`: processes fork.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from ecogen.errors import AuthenticationError, EcoGenError, NodeLostError, TransportError
from ecogen.transport.base import Message, Peer, Service, Stream, TrafficCounter
from ecogen.transport.channel import ACCEPTED, SERVICE, Link, Options, connected, keep_freed_memory, options, outcome
from ecogen.transport.codec import DEFAULT_LIMITS, Limits, decode, encode
from ecogen.transport.credentials import Credentials, host_name
from ecogen.transport.failures import answer, check_sender, failure_message, internal_error, raise_failure
from ecogen.transport.framing import Framing, metadata_bytes
from ecogen.transport.gate import CLAIMED_NODE, CLAIMED_TIER, Context, Gate
from ecogen.transport.stream import GRACE_S, WireStream

logger = logging.getLogger(__name__)

# A node whose process hangs or whose link drops everything is found lost after at most twice this.
KEEPALIVE_S = 6.0
# How often an idle node looks whether the revocation list has changed; calls look each time.
_REVOCATION_POLL_S = 0.5


class GrpcTransport:
    """One node's connection to the others; see `Transport`.

    Args:
        peer: who this node is; its certificate must say the same.
        credentials: from `load_credentials`; required unless `insecure`.
        revoked: the federation's revocation list.
        host, port: where to listen; port 0 takes a free one.
        advertised_host: under which host others reach this node, where it is not `host`.
        limits: the largest message, both ways.
        keepalive_s: a silent neighbour is lost after at most twice this.
        insecure: no TLS, callers are who they claim to be; for tests and benchmarks on loopback only.

    Raises:
        AuthenticationError: if credentials are missing or another node's.
    """

    def __init__(
        self,
        peer: Peer,
        *,
        credentials: Credentials | None = None,
        revoked: Path | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        advertised_host: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
        keepalive_s: float = KEEPALIVE_S,
        insecure: bool = False,
    ) -> None:
        _check_credentials(peer, credentials, insecure)
        self.peer = peer
        self.counter = TrafficCounter()
        self.limits = limits
        self._credentials = credentials
        self._gate = Gate(credentials, revoked)
        self._host, self._port = host, port
        self._advertised_host = advertised_host or host
        self._options = options(limits, keepalive_s)
        claims = ((CLAIMED_NODE, peer.node_id), (CLAIMED_TIER, peer.tier))
        self._claims = claims if insecure else ()
        self._framing = Framing(tls=not insecure, claims_bytes=metadata_bytes(self._claims))
        self._unbilled: dict[str, int] = {}
        self._service: Service | None = None
        self._server: grpc.aio.Server | None = None
        self._watch: asyncio.Task[None] | None = None
        self._links: dict[str, Link] = {}
        self._opened: weakref.WeakSet[WireStream] = weakref.WeakSet()
        self._accepted: dict[WireStream, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def serve(self, service: Service) -> str:
        """Listen and begin to answer; returns host:port.

        Raises:
            TransportError: if the port is taken or the host is not this machine's.
        """
        self._service = service
        keep_freed_memory()
        self._server = grpc.aio.server(options=self._options)
        handlers = {
            "Call": grpc.unary_unary_rpc_method_handler(self._on_call),
            "Stream": grpc.stream_stream_rpc_method_handler(self._on_stream),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        port = self._listen(self._server)
        await self._server.start()
        self._watch_revocations()
        return f"{self._advertised_host}:{port}"

    def learn(self, node_id: str, address: str) -> None:
        """Remember where a node is; calls and streams to its former address fail with NodeLostError."""
        link = self._links.get(node_id)
        if link is not None and link.address == address:
            return
        self._links[node_id] = Link(self._connect, node_id, address)
        if link is not None:
            link.retire(self._start)

    async def call(self, node_id: str, message: Message, *, timeout_s: float | None = None) -> Message:
        """Ask a node and wait for its answer; see `Transport.call`."""
        link = self._link(node_id)
        link.connect()  # now, so that a new connection's bytes are billed with this message
        data = self._pack(message, node_id, self._framing.request)
        try:
            async with asyncio.timeout(timeout_s):
                reply = await outcome(link.call(data, metadata=self._claims), link)
        except TimeoutError:
            raise NodeLostError(node_id, f"no answer to {message.method} within {timeout_s} s") from None
        return raise_failure(self._unpack(reply, node_id))

    async def open(self, node_id: str) -> Stream:
        """Open a stream to a neighbour; see `Transport.open`."""
        link = self._link(node_id)
        self._watch_revocations()
        rpc = link.stream(metadata=self._claims)
        await outcome(connected(rpc), link)
        stream = WireStream(node_id, rpc, self._pack_streamed, self._unpack, link=link)
        self._opened.add(stream)
        self._bill(node_id, self._framing.stream_bytes)
        return stream

    async def close(self) -> None:
        """Close all streams in order and stop serving; calls in progress at this node fail at their callers."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S):
                await self._end_streams()
        if self._watch is not None:
            self._watch.cancel()
        if self._server is not None:
            await self._server.stop(None)
        links, self._links = self._links, {}
        for link in links.values():
            await link.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _pack_streamed(self, message: Message, receiver_id: str) -> bytes:
        """A message for a stream as bytes, entered into the books."""
        return self._pack(message, receiver_id, self._framing.streamed)

    def _unpack(self, data: bytes, sender_id: str) -> Message:
        """The message in `data`, if its header names the sender that the certificate names.

        Raises:
            ProtocolError: if it does not, or is malformed.
        """
        received = decode(data, self.limits)
        check_sender(received.sender_id, sender_id)
        return received.message

    def _pack(self, message: Message, receiver_id: str, framing_bytes: Callable[[int], int]) -> bytes:
        frame = encode(message, self.peer.node_id, self.limits)
        if message.counted:
            framing = framing_bytes(len(frame.data)) + self._unbilled.pop(receiver_id, 0)
            self.counter.count(receiver_id, message.kind, frame.payload_bytes, frame.header_bytes, framing)
        return frame.data

    def _link(self, node_id: str) -> Link:
        self._gate.check_callee(node_id)
        if node_id not in self._links:
            raise NodeLostError(node_id, "its address is not known; it has not joined yet")
        return self._links[node_id]

    def _bill(self, node_id: str, framing_bytes: int) -> None:
        """Put bytes that belong to no message into the books with the next counted one."""
        self._unbilled[node_id] = self._unbilled.get(node_id, 0) + framing_bytes

    def _connect(self, node_id: str, address: str) -> grpc.aio.Channel:
        self._bill(node_id, self._framing.connection_bytes)
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=self._options)
        credentials = grpc.ssl_channel_credentials(
            self._credentials.authority_pem, self._credentials.key_pem, self._credentials.certificate_pem
        )
        name: Options = (("grpc.ssl_target_name_override", host_name(node_id)),)
        return grpc.aio.secure_channel(address, credentials, options=(*self._options, *name))

    def _listen(self, server: grpc.aio.Server) -> int:
        address = f"{self._host}:{self._port}"
        try:
            if self._credentials is None:
                return int(server.add_insecure_port(address))
            return int(server.add_secure_port(address, _server_credentials(self._credentials)))
        except RuntimeError as problem:
            raise TransportError(
                f"cannot listen on {address}: the port is taken or the host is not this machine's; "
                "choose another port (0 takes a free one) or host"
            ) from problem

    async def _on_call(self, data: bytes, context: Context) -> bytes:
        peer, _ = await self._admit(context)
        assert self._service is not None
        try:
            reply = await answer(self._service, peer, self._unpack(data, peer.node_id))
            return self._pack(reply, peer.node_id, self._framing.reply)
        except EcoGenError as error:
            return self._pack(failure_message(error), peer.node_id, self._framing.reply)

    async def _on_stream(self, _: object, context: Context) -> None:
        peer, serial = await self._admit(context)
        await context.send_initial_metadata((ACCEPTED,))
        stream = WireStream(peer.node_id, context, self._pack_streamed, self._unpack, serial=serial)
        task = self._start(self._accept(peer, stream))
        self._accepted[stream] = task
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            stream.lose(NodeLostError(peer.node_id, "it vanished"))
            self._start(_end_soon(task))
            raise
        finally:
            del self._accepted[stream]

    async def _accept(self, peer: Peer, stream: WireStream) -> None:
        assert self._service is not None
        try:
            await self._service.accept(peer, stream)
        except NodeLostError:
            pass
        except EcoGenError as error:
            await stream.fail(error)
        except Exception:
            logger.exception("the stream from %s failed", peer.node_id)
            await stream.fail(internal_error("the stream"))
        finally:
            await stream.flush()

    async def _admit(self, context: Context) -> tuple[Peer, int | None]:
        try:
            return self._gate.admit(context)
        except AuthenticationError as error:
            logger.warning("refused a caller: %s", error)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
            raise

    def _watch_revocations(self) -> None:
        if self._watch is None and self._gate.watches:
            self._watch = asyncio.get_running_loop().create_task(self._close_revoked())

    async def _close_revoked(self) -> None:
        while True:
            await asyncio.sleep(_REVOCATION_POLL_S)
            self._gate.refresh()
            revocations = self._gate.revocations
            for stream in [stream for stream in self._accepted if stream.serial in revocations.serials]:
                self._start(stream.refuse("its certificate was revoked"))
            for stream in [stream for stream in self._opened if stream.node_id in revocations.node_ids]:
                stream.lose(NodeLostError(stream.node_id, "its certificate was revoked"))

    async def _end_streams(self) -> None:
        for task in self._accepted.values():
            task.cancel()
        await asyncio.gather(*self._accepted.values(), return_exceptions=True)
        await asyncio.gather(*(stream.flush() for stream in self._opened), return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _check_credentials(peer: Peer, credentials: Credentials | None, insecure: bool) -> None:
    if credentials is None:
        if not insecure:
            raise AuthenticationError(f"node {peer.node_id!r} has no certificate; issue one with `ecogen certs issue`")
        return
    if insecure:
        raise AuthenticationError(f"node {peer.node_id!r} has a certificate but is told to be insecure; choose one")
    identity = credentials.identity
    if (identity.node_id, identity.tier) != (peer.node_id, peer.tier):
        raise AuthenticationError(
            f"the certificate is of {identity.tier} node {identity.node_id!r}, not of {peer.tier} node {peer.node_id!r}"
        )


def _server_credentials(credentials: Credentials) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials(
        [(credentials.key_pem, credentials.certificate_pem)], credentials.authority_pem, require_client_auth=True
    )


async def _end_soon(task: asyncio.Task[None]) -> None:
    await asyncio.wait({task}, timeout=GRACE_S)
    task.cancel()
