"""What only the wire does: limits, processes that die, connections that fall silent, honest books."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import sys
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from ecogen.errors import NodeLostError, ProtocolError, TransportError
from ecogen.transport import codec
from ecogen.transport.base import Message, Peer
from ecogen.transport.codec import Limits
from ecogen.transport.wire import GrpcTransport
from tests.transport.echo import Echo
from tests.transport.wires import closing, end_node, transport

pytestmark = pytest.mark.asyncio


class Wiretap:
    """A TCP proxy that counts what it forwards, and can fall silent."""

    def __init__(self, target: str) -> None:
        self._host, port = target.split(":")
        self._port = int(port)
        self._flows = asyncio.Event()
        self._flows.set()
        self._writers: list[asyncio.StreamWriter] = []
        self.num_bytes = 0

    async def __aenter__(self) -> Wiretap:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._flows.set()
        self._server.close()
        for writer in self._writers:
            writer.close()

    def fall_silent(self) -> None:
        self._flows.clear()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        node_reader, node_writer = await asyncio.open_connection(self._host, self._port)
        self._writers += (writer, node_writer)
        await asyncio.gather(self._forward(reader, node_writer), self._forward(node_reader, writer))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**18):
                await self._flows.wait()
                self.num_bytes += len(data)
                writer.write(data)
                await writer.drain()
            writer.close()


async def test_another_protocol_version_is_named(nodes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edge, end, service = transport(nodes / "edge-1", "edge"), *end_node(nodes)
    async with closing(edge, end):
        edge.learn("end-1", await end.serve(service))
        monkeypatch.setattr(codec, "PROTOCOL_VERSION", 2)
        data = codec.encode(Message("echo"), "edge-1").data
        monkeypatch.undo()
        monkeypatch.setattr(edge, "_pack", lambda *_: data)
        with pytest.raises(ProtocolError, match="speaks protocol version 2, this one 1"):
            await edge.call("end-1", Message("echo"))


async def test_a_message_too_large_for_the_receiver_is_refused_with_its_limit(nodes: Path) -> None:
    edge = transport(nodes / "edge-1", "edge")
    end = transport(nodes / "end-1", "end", limits=Limits(message_bytes=2**20))
    large = Message("echo", tensors={"t": torch.ones(2**19)})
    async with closing(edge, end):
        edge.learn("end-1", await end.serve(Echo()))
        with pytest.raises(ProtocolError, match=r"larger than max.*1048576.*transport.message_mib"):
            await edge.call("end-1", large)
        stream = await edge.open("end-1")
        await stream.send(large)
        with pytest.raises(TransportError):
            await asyncio.wait_for(stream.receive(), 5)
        assert await edge.call("end-1", Message("echo"))


async def test_a_taken_port_is_an_error_with_the_next_step(nodes: Path) -> None:
    first = transport(nodes / "end-1", "end")
    async with closing(first):
        port = int((await first.serve(Echo())).rsplit(":", 1)[1])
        second = transport(nodes / "end-2", "end", port=port)
        with pytest.raises(TransportError, match=rf"cannot listen on 127\.0\.0\.1:{port}.*choose another port"):
            await second.serve(Echo())


async def test_nothing_listens_there(nodes: Path) -> None:
    edge, end = transport(nodes / "edge-1", "edge"), transport(nodes / "end-1", "end")
    async with closing(edge, end):
        address = await end.serve(Echo())
        await end.close()
        edge.learn("end-1", address)
        start = time.perf_counter()
        with pytest.raises(NodeLostError, match=address):
            await edge.call("end-1", Message("echo"))
        assert time.perf_counter() - start < 1


@asynccontextmanager
async def node_process(nodes: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A process of node end-1, and its address."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.transport.echo", str(nodes), "end-1", stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        yield process, (await process.stdout.readline()).decode().strip()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def lost_within(work: Awaitable[object], seconds: float) -> None:
    start = time.perf_counter()
    with pytest.raises(NodeLostError, match="'end-1'"):
        await asyncio.wait_for(work, seconds + 5)
    assert time.perf_counter() - start < seconds


async def test_a_killed_process_is_lost_at_once_and_found_again_at_another_port(nodes: Path) -> None:
    edge = transport(nodes / "edge-1", "edge")
    async with closing(edge), node_process(nodes) as (victim, address), node_process(nodes) as (_, other_address):
        edge.learn("end-1", address)
        stream = await edge.open("end-1")
        call = asyncio.create_task(edge.call("end-1", Message("hang")))
        receiving = asyncio.create_task(stream.receive())
        await edge.call("end-1", Message("echo"))
        victim.kill()
        await lost_within(call, 1)
        await lost_within(receiving, 1)
        await lost_within(stream.send(Message("echo")), 1)
        await lost_within(edge.call("end-1", Message("echo")), 1)
        edge.learn("end-1", other_address)
        start = time.perf_counter()
        assert await edge.call("end-1", Message("echo"))
        assert time.perf_counter() - start < 1


async def test_a_new_address_ends_what_goes_to_the_old_one(nodes: Path) -> None:
    edge, end, service = transport(nodes / "edge-1", "edge"), *end_node(nodes)
    async with closing(edge, end):
        edge.learn("end-1", await end.serve(service))
        stream = await edge.open("end-1")
        call = asyncio.create_task(edge.call("end-1", Message("hang")))
        receiving = asyncio.create_task(stream.receive())
        await asyncio.sleep(0.2)
        edge.learn("end-1", "127.0.0.1:1")
        await lost_within(call, 1)
        await lost_within(receiving, 1)
        await asyncio.wait_for(service.cancelled.wait(), 1)
        await asyncio.wait_for(service.lost.wait(), 1)


async def test_a_silent_partition_is_found_on_an_idle_stream_at_both_ends(nodes: Path) -> None:
    edge, end = (
        transport(nodes / name, tier, keepalive_s=1.0) for name, tier in (("edge-1", "edge"), ("end-1", "end"))
    )
    service = Echo()
    async with closing(edge, end), Wiretap(await end.serve(service)) as tap:
        edge.learn("end-1", tap.address)
        stream = await edge.open("end-1")
        tap.fall_silent()
        await lost_within(stream.receive(), 4)
        await asyncio.wait_for(service.lost.wait(), 4)


async def test_a_partition_that_heals_is_reached_again(nodes: Path) -> None:
    edge, end = transport(nodes / "edge-1", "edge", keepalive_s=1.0), transport(nodes / "end-1", "end")
    async with closing(edge, end):
        address = await end.serve(Echo())
        edge.learn("end-1", address)
        assert await edge.call("end-1", Message("echo"))
        await end.close()
        await lost_within(edge.call("end-1", Message("echo")), 2)
        again = transport(nodes / "end-1", "end", port=int(address.rsplit(":", 1)[1]))
        async with closing(again):
            await again.serve(Echo())
            edge.learn("end-1", address)
            for _ in range(20):
                with contextlib.suppress(NodeLostError):
                    assert await edge.call("end-1", Message("echo"))
                    return
                await asyncio.sleep(0.1)
            pytest.fail("not reached within 2 s")


SIZES = {"large": [1_000_000, 10_000, 300_000] * 10, "mixed": [0, 100, 50_000, 4_096, 20, 200_000] * 8}


@pytest.mark.parametrize("secure", [True, False], ids=["mtls", "plain"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
async def test_books_equal_what_crossed_the_wire(nodes: Path, secure: bool, sizes: list[int]) -> None:
    edge, end = (
        transport(nodes / name, tier) if secure else GrpcTransport(Peer(name, tier), insecure=True)
        for name, tier in (("edge-1", "edge"), ("end-1", "end"))
    )
    async with Wiretap(await end.serve(Echo())) as tap, closing(edge, end):
        edge.learn("end-1", tap.address)
        stream = await edge.open("end-1")
        for size in sizes:
            message = Message("echo", "activations", b"x" * 20, {"t": torch.zeros(size, dtype=torch.uint8)})
            await edge.call("end-1", message)
            await stream.send(message)
            await stream.receive()
        await stream.close()
        await asyncio.sleep(0.1)
        books = sum(traffic.total_bytes for end_ in (edge, end) for traffic in end_.counter.take())
        assert books == pytest.approx(tap.num_bytes, rel=0.01)


def _forked(nodes: str, failures: multiprocessing.SimpleQueue[str]) -> None:
    async def echo() -> None:
        edge, (end, service) = transport(Path(nodes) / "edge-1", "edge"), end_node(Path(nodes))
        async with closing(edge, end):
            edge.learn("end-1", await end.serve(service))
            await edge.call("end-1", Message("echo"))

    try:
        asyncio.run(asyncio.wait_for(echo(), 10))
        failures.put("")
    except Exception as problem:
        failures.put(repr(problem))


async def test_a_forked_process_may_use_it(nodes: Path) -> None:
    """Forked from a process that has imported it, but made nothing yet: as engines do."""
    script = (
        "import multiprocessing as m, sys; from tests.transport.test_wire import _forked\n"
        "c = m.get_context('fork'); q = c.SimpleQueue(); p = c.Process(target=_forked, args=(sys.argv[1], q))\n"
        "p.start(); sys.exit(q.get() or None)"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, str(nodes))
    assert await asyncio.wait_for(process.wait(), 60) == 0
