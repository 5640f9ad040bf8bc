"""A stream between two nodes over gRPC; it ends in order with an empty message."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from ecogen.errors import AuthenticationError, EcoGenError, NodeLostError, TransportError
from ecogen.transport.base import Message
from ecogen.transport.channel import Link, outcome
from ecogen.transport.failures import failure_message, raise_failure

GRACE_S = 2.0
"""How long a stream's task may take to end after its neighbour is gone, before it is cancelled."""

_END = b""
# Messages that a stream reads ahead or writes behind at each end; HTTP/2's own window comes on top.
_WINDOW = 2


class WireStream:
    """One end of a stream, the opener's or the acceptor's; see `Stream`.

    gRPC ends a stream when a read or write is cancelled, so one task reads ahead and another writes behind, by at most
    `_WINDOW` messages each; `receive` and `send` only touch the queues, and may be cancelled.

    Args:
        node_id: of the other end.
        rpc: gRPC's end of it: the opener's call or the acceptor's context.
        pack, unpack: messages to bytes and back, with that node's id.
        link: of the opener.
        serial: of the certificate by which the acceptor let the opener in.
    """

    def __init__(
        self,
        node_id: str,
        rpc: Any,
        pack: Callable[[Message, str], bytes],
        unpack: Callable[[bytes, str], Message],
        *,
        link: Link | None = None,
        serial: int | None = None,
    ) -> None:
        self.node_id = node_id
        self.serial = serial
        self._pack, self._unpack = pack, unpack
        self._rpc = rpc
        self._link = link
        self._inbox: asyncio.Queue[bytes | TransportError] = asyncio.Queue()
        self._may_read = asyncio.Semaphore(_WINDOW)
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue(_WINDOW)
        self._lost: NodeLostError | None = None
        self._is_closed = False
        self._has_ended = False
        loop = asyncio.get_running_loop()
        self._reader = loop.create_task(self._read_ahead())
        self._writer = loop.create_task(self._write_behind())

    async def send(self, message: Message) -> None:
        if self._is_closed:
            raise TransportError(f"{message.method}: this end of the stream to {self.node_id!r} is closed")
        self._check_lost()
        await self._outbox.put(self._pack(message, self.node_id))
        self._check_lost()

    async def receive(self) -> Message | None:
        data = _END if self._has_ended else await self._inbox.get()
        if isinstance(data, TransportError):
            self._inbox.put_nowait(data)  # for the next one too
            raise data
        if data == _END:
            self._has_ended = True
            return None
        self._may_read.release()
        return raise_failure(self._unpack(data, self.node_id))

    async def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            if self._lost is None:
                await self._outbox.put(_END)

    async def flush(self) -> None:
        """Close, and wait until everything is on its way."""
        await self.close()
        await asyncio.wait({self._writer})

    async def fail(self, error: EcoGenError) -> None:
        """Let the other end raise an error."""
        with contextlib.suppress(TransportError):
            await self.send(failure_message(error))

    async def refuse(self, reason: str) -> None:
        """End the stream of a neighbour that is no longer accepted, and tell it."""
        await self.fail(AuthenticationError(f"this node was shut out: {reason}"))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.flush(), GRACE_S)
        self.lose(NodeLostError(self.node_id, reason))

    def lose(self, error: NodeLostError) -> None:
        """Let this end's sends and receives fail, now and later; what has not been received is dropped."""
        if self._lost is not None:
            return
        self._fail_sends(error)
        if not self._reader.done():
            self._reader.cancel()
            while not self._inbox.empty():
                self._inbox.get_nowait()
            self._inbox.put_nowait(error)

    async def _read_ahead(self) -> None:
        data: bytes | TransportError = b"unread"
        while data != _END and isinstance(data, bytes):
            await self._may_read.acquire()
            data = await self._read()
            self._inbox.put_nowait(data)
        if isinstance(data, TransportError):
            self._fail_sends(data)

    async def _read(self) -> bytes | TransportError:
        try:
            data = await self._outcome(self._rpc.read())
        except TransportError as error:
            return error
        if data is grpc.aio.EOF:
            return NodeLostError(self.node_id, "it vanished without closing the stream")
        return bytes(data)

    async def _write_behind(self) -> None:
        data = b"unwritten"
        try:
            while data != _END:
                data = await self._outbox.get()
                await self._outcome(self._rpc.write(data))
            if self._link is not None:
                await self._outcome(self._rpc.done_writing())
        except asyncio.InvalidStateError:
            self._fail_sends(NodeLostError(self.node_id, "it has closed the stream"))
        except TransportError as error:
            self._fail_sends(error)

    def _fail_sends(self, error: TransportError) -> None:
        if self._lost is None:
            self._lost = error if isinstance(error, NodeLostError) else NodeLostError(self.node_id, str(error))
        if self._writer is not asyncio.current_task():
            self._writer.cancel()
        while not self._outbox.empty():  # wakes who waits to send
            self._outbox.get_nowait()

    def _check_lost(self) -> None:
        if self._lost is not None:
            raise self._lost
        if self._link is not None and self._rpc.done():
            raise NodeLostError(self.node_id, "it has closed the stream")

    async def _outcome(self, work: Awaitable[Any]) -> Any:
        if self._link is not None:
            return await outcome(work, self._link)
        try:
            return await work
        except (grpc.aio.BaseError, asyncio.CancelledError) as problem:
            raise NodeLostError(self.node_id, "it vanished") from problem
