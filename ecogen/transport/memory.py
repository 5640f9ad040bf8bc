"""All nodes in one process and event loop: the same messages and books as on the wire, tensors by reference.

Headers are really encoded and decoded, so what works here works over gRPC, and payload and header bytes are equal.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ecogen.errors import EcoGenError, NodeLostError, TransportError
from ecogen.transport.base import Message, Peer, Service, Stream, TrafficCounter
from ecogen.transport.codec import DEFAULT_LIMITS, Limits, decode_prefix, encode_prefix
from ecogen.transport.failures import answer, failure_message, internal_error, logger, raise_failure

Delay = Callable[[str, str, int], float]
"""(sender, receiver, bytes) -> seconds that a message is under way."""


class MemoryNetwork:
    """The nodes that can reach each other.

    Args:
        window: messages that a stream holds in each direction before `send` waits.
        delay: how long a message is under way; None for not at all. Messages of a stream never overtake.
        limits: as on the wire.
    """

    def __init__(self, *, window: int = 8, delay: Delay | None = None, limits: Limits = DEFAULT_LIMITS) -> None:
        self.window = window
        self.delay = delay
        self.limits = limits
        self.is_closing = False
        self._serving: dict[str, MemoryTransport] = {}

    def join(self, peer: Peer) -> MemoryTransport:
        """A transport for one more node, or for one that was killed and comes back."""
        return MemoryTransport(self, peer)

    def kill(self, node_id: str) -> None:
        """Cut a node off as if its process had died: its streams and calls fail, at both ends."""
        transport = self._serving.pop(node_id, None)
        if transport is not None:
            transport.cut_off()

    def close(self) -> None:
        """Before all nodes are stopped, one after the other: none learns any more that another is gone."""
        self.is_closing = True

    def attach(self, transport: MemoryTransport) -> None:
        """Make a node reachable under its id."""
        self._serving[transport.peer.node_id] = transport

    def detach(self, transport: MemoryTransport) -> None:
        """Make a node unreachable, unless another took its place."""
        if self._serving.get(transport.peer.node_id) is transport:
            del self._serving[transport.peer.node_id]

    def reach(self, node_id: str) -> MemoryTransport:
        """The transport of a node.

        Raises:
            NodeLostError: if it does not serve.
        """
        if node_id not in self._serving:
            raise NodeLostError(node_id, "it does not serve on this network")
        return self._serving[node_id]


@dataclass(frozen=True, slots=True)
class _Parcel:
    """A message under way: header encoded, tensors by reference."""

    prefix: bytes
    tensors: Mapping[str, Tensor]
    num_bytes: int

    def unpack(self, limits: Limits) -> Message:
        return decode_prefix(self.prefix, self.tensors, limits).message


class MemoryTransport:
    """One node's connection to the others of its `MemoryNetwork`; see `Transport`."""

    def __init__(self, network: MemoryNetwork, peer: Peer) -> None:
        self.peer = peer
        self.counter = TrafficCounter()
        self._network = network
        self._service: Service | None = None
        self._is_cut_off = False
        self._asked: set[asyncio.Future[str]] = set()  # calls of this node that wait for an answer
        self._answering: set[asyncio.Future[str]] = set()  # and those of others that wait for this one
        self._closed = asyncio.Event()
        self._streams: weakref.WeakSet[_MemoryStream] = weakref.WeakSet()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def serve(self, service: Service) -> str:
        """Begin to answer; the address is only a name, since `call` finds nodes by their id."""
        self._service = service
        self._network.attach(self)
        return f"memory:{self.peer.node_id}"

    def learn(self, node_id: str, address: str) -> None:
        """Nothing: the network knows its nodes."""

    async def call(self, node_id: str, message: Message, *, timeout_s: float | None = None) -> Message:
        """Ask a node and wait for its answer; see `Transport.call`."""
        if self._network.is_closing:
            await self._closed.wait()  # until this node is stopped as well
            raise NodeLostError(node_id, "the whole network was stopped")
        target = self._reach(node_id)
        request = self.pack(message, node_id)
        with self._watching(target) as lost:
            work = self._start(target.answer(self.peer, request))
            try:
                await asyncio.wait({work, lost}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
                if lost.done():
                    raise NodeLostError(node_id, lost.result())
                if not work.done():
                    raise NodeLostError(node_id, f"no answer to {message.method} within {timeout_s} s")
                return raise_failure(work.result().unpack(self._network.limits))
            finally:
                work.cancel()

    async def open(self, node_id: str) -> Stream:
        """Open a stream to a neighbour; see `Transport.open`."""
        await self.travel(node_id, 0)
        target = self._reach(node_id)
        there, back = (_Pipe(self._network.window) for _ in range(2))
        ours = _MemoryStream(self, node_id, outgoing=there, incoming=back)
        theirs = _MemoryStream(target, self.peer.node_id, outgoing=back, incoming=there)
        self._streams.add(ours)
        target.accept(self.peer, theirs)
        return ours

    async def close(self) -> None:
        """Close all streams in order and stop serving; calls in progress at this node fail at their callers."""
        self._network.detach(self)
        for stream in list(self._streams):
            stream.end()
        if not self._network.is_closing:
            _fail(self._answering, "it stopped serving")
        _fail(self._asked, f"node {self.peer.node_id!r} stopped")
        self._closed.set()
        await _cancel_all(self._tasks)

    def cut_off(self) -> None:
        """End abruptly, as a killed process does; only the network calls this."""
        self._network.detach(self)
        self._is_cut_off = True
        _fail(self._asked | self._answering, "its process is gone")
        for stream in list(self._streams):
            stream.lose("its process is gone")
        for task in self._tasks:
            task.cancel()

    async def answer(self, peer: Peer, request: _Parcel) -> _Parcel:
        """What a caller runs: carry the request here, handle it, carry the answer back."""
        await self._network_travel(peer.node_id, self.peer.node_id, request.num_bytes)
        try:
            assert self._service is not None
            reply = await answer(self._service, peer, request.unpack(self._network.limits))
            parcel = self.pack(reply, peer.node_id)
        except EcoGenError as error:
            parcel = self.pack(failure_message(error), peer.node_id)
        await self.travel(peer.node_id, parcel.num_bytes)
        return parcel

    def accept(self, peer: Peer, stream: _MemoryStream) -> None:
        """Let the service serve a stream that a neighbour opened."""
        self._streams.add(stream)
        self._start(self._accept(peer, stream))

    def pack(self, message: Message, receiver_id: str) -> _Parcel:
        """The message as it travels, entered into the books."""
        prefix = encode_prefix(message, self.peer.node_id, self._network.limits)
        if message.counted:
            self.counter.count(receiver_id, message.kind, prefix.payload_bytes, prefix.header_bytes)
        return _Parcel(prefix.data, message.tensors, prefix.total_bytes)

    def due(self, receiver_id: str, num_bytes: int) -> float:
        """The loop's time at which something sent now arrives."""
        delay = self._network.delay
        delay_s = 0.0 if delay is None else delay(self.peer.node_id, receiver_id, num_bytes)
        return asyncio.get_running_loop().time() + delay_s

    def unpack(self, parcel: _Parcel) -> Message:
        """The message of a parcel that has arrived."""
        return parcel.unpack(self._network.limits)

    async def travel(self, receiver_id: str, num_bytes: int) -> None:
        """Wait as long as that many bytes are under way to the receiver."""
        await self._network_travel(self.peer.node_id, receiver_id, num_bytes)

    async def _network_travel(self, sender_id: str, receiver_id: str, num_bytes: int) -> None:
        if self._network.delay is not None:
            await asyncio.sleep(self._network.delay(sender_id, receiver_id, num_bytes))

    async def _accept(self, peer: Peer, stream: _MemoryStream) -> None:
        try:
            assert self._service is not None
            await self._service.accept(peer, stream)
        except NodeLostError:
            pass
        except EcoGenError as error:
            stream.fail(error)
        except Exception:
            logger.exception("the stream from %s failed", peer.node_id)
            stream.fail(internal_error("the stream"))
        finally:
            stream.end()
            stream.hang_up()

    def _reach(self, node_id: str) -> MemoryTransport:
        if self._is_cut_off:
            raise NodeLostError(node_id, f"node {self.peer.node_id!r} is cut off from the network")
        return self._network.reach(node_id)

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @contextlib.contextmanager
    def _watching(self, target: MemoryTransport) -> Iterator[asyncio.Future[str]]:
        """A future that is done, with the reason, when either end is cut off."""
        lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._asked.add(lost)
        target._answering.add(lost)
        try:
            yield lost
        finally:
            self._asked.discard(lost)
            target._answering.discard(lost)


class _Pipe:
    """One direction of a stream: at most `window` messages, each with the time at which it arrives."""

    def __init__(self, window: int) -> None:
        self._free = asyncio.Semaphore(window)
        self._arrived = asyncio.Event()
        self._parcels: deque[tuple[float, _Parcel | None]] = deque()
        self._last_due = 0.0
        self.lost_because: str | None = None

    async def put(self, due: float, parcel: _Parcel) -> bool:
        """Add a parcel when there is room; False if the pipe broke."""
        await self._free.acquire()
        if self.lost_because is not None:
            self._free.release()  # the next that waits learns it too
            return False
        self.append(due, parcel)
        return True

    def append(self, due: float, parcel: _Parcel | None) -> None:
        """Add a parcel or, as None, the end; nothing overtakes."""
        self._last_due = max(self._last_due, due)
        self._parcels.append((self._last_due, parcel))
        self._arrived.set()

    async def get(self) -> _Parcel | None:
        """The next parcel once it is due, or None at the end and if the pipe broke. May be cancelled."""
        loop = asyncio.get_running_loop()
        while self.lost_because is None:
            self._arrived.clear()
            wait_s = self._parcels[0][0] - loop.time() if self._parcels else None
            if wait_s is None or wait_s > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._arrived.wait()
                continue
            if self._parcels[0][1] is None:
                return None
            self._free.release()
            return self._parcels.popleft()[1]
        return None

    def lose(self, reason: str) -> None:
        """Break: who waits at either end is woken."""
        if self.lost_because is None:
            self.lost_because = reason
            self._free.release()
            self._arrived.set()


class _MemoryStream:
    """One end of a stream; see `Stream`."""

    def __init__(self, transport: MemoryTransport, node_id: str, *, outgoing: _Pipe, incoming: _Pipe) -> None:
        self._transport = transport
        self._node_id = node_id
        self._outgoing = outgoing
        self._incoming = incoming
        self._is_closed = False

    async def send(self, message: Message) -> None:
        if self._is_closed:
            raise TransportError(f"{message.method}: this end of the stream to {self._node_id!r} is closed")
        if self._outgoing.lost_because is not None:
            raise NodeLostError(self._node_id, self._outgoing.lost_because)
        parcel = self._transport.pack(message, self._node_id)
        if not await self._outgoing.put(self._transport.due(self._node_id, parcel.num_bytes), parcel):
            raise NodeLostError(self._node_id, str(self._outgoing.lost_because))

    async def receive(self) -> Message | None:
        parcel = await self._incoming.get()
        if self._incoming.lost_because is not None:
            raise NodeLostError(self._node_id, self._incoming.lost_because)
        return None if parcel is None else raise_failure(self._transport.unpack(parcel))

    async def close(self) -> None:
        self.end()

    def end(self) -> None:
        """Say that nothing more comes from this end."""
        if not self._is_closed:
            self._is_closed = True
            self._outgoing.append(self._transport.due(self._node_id, 0), None)

    def fail(self, error: EcoGenError) -> None:
        """Let the other end raise an error."""
        if not self._is_closed:
            parcel = self._transport.pack(failure_message(error), self._node_id)
            self._outgoing.append(self._transport.due(self._node_id, parcel.num_bytes), parcel)

    def hang_up(self) -> None:
        """Let the other end's sends fail, since nobody receives them any more."""
        self._incoming.lose("it has closed the stream")

    def lose(self, reason: str) -> None:
        """Break both directions."""
        self._incoming.lose(reason)
        self._outgoing.lose(reason)


def _fail(exchanges: set[asyncio.Future[str]], reason: str) -> None:
    for lost in exchanges:
        if not lost.done():
            lost.set_result(reason)


async def _cancel_all(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended; the running one is left alone."""
    others = [task for task in tasks if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
