"""One node's persistent streams to its neighbours: opened once, kept over rounds, opened again after a loss.

Of two neighbours the one whose id sorts first opens the stream, and both use it. Receiving never waits for
sending, so a cycle of nodes cannot block itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

from ecogen.errors import NodeLostError, TransportError
from ecogen.transport.base import Message, Peer, Stream, Transport


class Neighbours:
    """Streams by neighbour.

    Args:
        deliver: called with (neighbour's id, message) for each message received; must not block.
        lost: called with the error when a neighbour's stream breaks.
        patience_s: how long to wait for a neighbour that should open the stream.
    """

    def __init__(
        self,
        transport: Transport,
        deliver: Callable[[str, Message], None],
        lost: Callable[[NodeLostError], None],
        *,
        patience_s: float = 20.0,
    ) -> None:
        self._transport = transport
        self._deliver = deliver
        self._lost = lost
        self._patience_s = patience_s
        self._addresses: dict[str, str] = {}
        self._streams: dict[str, asyncio.Future[Stream]] = {}
        self._openings: dict[str, asyncio.Task[Stream]] = {}
        self._pumps: set[asyncio.Task[None]] = set()

    @property
    def node_id(self) -> str:
        """The node whose neighbours these are."""
        return self._transport.peer.node_id

    async def send(self, node_id: str, message: Message) -> None:
        """Send to a neighbour, over the stream that there is or a new one.

        Raises:
            NodeLostError: if the neighbour cannot be reached.
        """
        stream = await self._stream(node_id)
        try:
            await stream.send(message)
        except TransportError:
            self._forget(node_id, stream)
            raise

    async def adopt(self, peer: Peer, stream: Stream) -> None:
        """Use a stream that a neighbour opened, until it ends."""
        self._slot(peer.node_id, fresh=True).set_result(stream)
        await self._pump(peer.node_id, stream)

    async def connect(self, addresses: Mapping[str, str]) -> None:
        """Learn where neighbours are, and open the streams to them that this node is to open.

        Raises:
            NodeLostError: if one cannot be reached.
        """
        for node_id, address in addresses.items():
            self._transport.learn(node_id, address)
            if self._addresses.get(node_id, address) != address and self._opens(node_id):
                self._slot(node_id, fresh=True)
                self._openings.pop(node_id, None)  # it fails, or is of the node that was there before
            self._addresses[node_id] = address
        await asyncio.gather(*(self._stream(node_id) for node_id in addresses if self._opens(node_id)))

    async def close(self) -> None:
        """Close every stream."""
        streams = [future.result() for future in self._streams.values() if future.done() and not future.cancelled()]
        for task in (*self._pumps, *self._openings.values()):
            task.cancel()
        for stream in streams:
            with suppress(TransportError):
                await stream.close()
        self._streams.clear()

    async def _stream(self, node_id: str) -> Stream:
        future = self._slot(node_id)
        if future.done():
            return future.result()
        if self._opens(node_id):
            return await asyncio.shield(self._opening(node_id))
        try:
            # Not wait_for, which swallows a cancellation where the future is done.
            async with asyncio.timeout(self._patience_s):
                return await asyncio.shield(future)
        except TimeoutError:
            raise NodeLostError(node_id, f"it opened no stream within {self._patience_s:g} s") from None

    def _opening(self, node_id: str) -> asyncio.Task[Stream]:
        """The one task that opens the stream to a neighbour, however many wait for it."""
        task = self._openings.get(node_id)
        if task is None:
            task = self._openings[node_id] = asyncio.create_task(self._open(node_id))
            task.add_done_callback(partial(self._opened, node_id))
        return task

    def _opened(self, node_id: str, task: asyncio.Task[Stream]) -> None:
        if self._openings.get(node_id) is task:
            del self._openings[node_id]
        if not task.cancelled():
            task.exception()  # seen, also where nobody waits for it any more

    async def _open(self, node_id: str) -> Stream:
        stream = await self._transport.open(node_id)
        self._slot(node_id, fresh=True).set_result(stream)
        task = asyncio.create_task(self._pump(node_id, stream))
        self._pumps.add(task)
        task.add_done_callback(self._pumps.discard)
        return stream

    async def _pump(self, node_id: str, stream: Stream) -> None:
        try:
            while (message := await stream.receive()) is not None:
                self._deliver(node_id, message)
            self._forget(node_id, stream)
            await stream.close()  # it has closed its end
        except TransportError as problem:
            if not self._is_replaced(node_id, stream):
                self._forget(node_id, stream)
                self._lost(problem if isinstance(problem, NodeLostError) else NodeLostError(node_id, str(problem)))

    def _opens(self, node_id: str) -> bool:
        return self._transport.peer.node_id < node_id

    def _slot(self, node_id: str, *, fresh: bool = False) -> asyncio.Future[Stream]:
        """Where the stream to a neighbour is, or will be."""
        future = self._streams.get(node_id)
        if future is None or (fresh and future.done()):
            future = self._streams[node_id] = asyncio.get_running_loop().create_future()
        return future

    def _is_replaced(self, node_id: str, stream: Stream) -> bool:
        """Whether another stream has taken a stream's place, or is about to."""
        future = self._streams.get(node_id)
        return future is not None and not (future.done() and future.result() is stream)

    def _forget(self, node_id: str, stream: Stream) -> None:
        future = self._streams.get(node_id)
        if future is not None and future.done() and future.result() is stream:
            del self._streams[node_id]
