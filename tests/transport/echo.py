"""A service that echoes, fails and hangs on demand; `python -m tests.transport.echo` is a node process of it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from ecogen.errors import ConfigError, NodeLostError, PlacementError, TransportError
from ecogen.transport.base import Message, Peer, Stream
from ecogen.transport.credentials import load_credentials
from ecogen.transport.wire import GrpcTransport


class Echo:
    """Answers with what it is asked, or as the method says."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.lost = asyncio.Event()
        self.ended = asyncio.Event()
        self.hold = asyncio.Event()

    async def handle(self, peer: Peer, message: Message) -> Message:
        self.peers.append(peer)
        match message.method:
            case "config":
                raise ConfigError(["one", "two"], "a recipe")
            case "lost":
                raise NodeLostError("third", "it went away")
            case "placement":
                raise PlacementError("blocks 0..2 need 3 GB")
            case "bug":
                raise ValueError("a secret of the server")
            case "hang":
                await self._hang()
        return message

    async def accept(self, peer: Peer, stream: Stream) -> None:
        self.peers.append(peer)
        self.started.set()
        try:
            while (message := await stream.receive()) is not None:
                match message.method:
                    case "leave":
                        return
                    case "placement":
                        raise PlacementError("no room")
                    case "hold":
                        await self.hold.wait()
                    case _:
                        await stream.send(message)
            self.ended.set()
        except NodeLostError:
            self.lost.set()
            raise

    async def _hang(self) -> None:
        self.started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


async def _serve(directory: Path, node_id: str) -> None:
    transport = GrpcTransport(Peer(node_id, "end"), credentials=load_credentials(directory / node_id))
    try:
        print(await transport.serve(Echo()), flush=True)
        await asyncio.Event().wait()
    except TransportError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2]))
