"""What every transport promises, in memory and over gRPC with mutual TLS: the same tests on both."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ecogen.errors import ConfigError, NodeLostError, PlacementError, ProtocolError, TransportError
from ecogen.transport.base import Message, Peer, Transport
from ecogen.transport.codec import Limits
from ecogen.transport.credentials import load_credentials
from ecogen.transport.memory import MemoryNetwork
from ecogen.transport.wire import GrpcTransport
from tests.transport.echo import Echo

pytestmark = pytest.mark.asyncio

LIMITS = Limits(message_bytes=4 * 2**20)


@dataclass
class Pair:
    """Node edge-1, which knows node end-1, and end-1's service."""

    edge: Transport
    end: Transport
    service: Echo


Connect = Callable[[], AbstractAsyncContextManager[Pair]]


@pytest.fixture(params=["memory", "grpc"])
def connect(request: pytest.FixtureRequest, nodes: Path) -> Connect:
    """Makes a pair of nodes."""

    def make(network: MemoryNetwork, node_id: str, tier: str) -> Transport:
        if request.param == "memory":
            return network.join(Peer(node_id, tier))
        return GrpcTransport(Peer(node_id, tier), credentials=load_credentials(nodes / node_id), limits=LIMITS)

    @asynccontextmanager
    async def pair() -> AsyncIterator[Pair]:
        network = MemoryNetwork(limits=LIMITS)
        edge, end, service = make(network, "edge-1", "edge"), make(network, "end-1", "end"), Echo()
        edge.learn("end-1", await end.serve(service))
        try:
            yield Pair(edge, end, service)
        finally:
            await edge.close()
            await end.close()

    return pair


def message(method: str = "echo", size: int = 3) -> Message:
    return Message(method, "activations", b"body", {"t": torch.arange(size)})


async def test_a_call_brings_back_what_the_service_answers(connect: Connect) -> None:
    async with connect() as pair:
        reply = await pair.edge.call("end-1", message(size=1000))
        assert (reply.method, reply.kind, reply.body) == ("echo", "activations", b"body")
        assert torch.equal(reply.tensors["t"], torch.arange(1000))
        assert pair.service.peers == [Peer("edge-1", "edge")]


@pytest.mark.parametrize(
    ("method", "error", "says"),
    [
        ("config", ConfigError, "a recipe: 2 problems\n  one\n  two"),
        ("lost", NodeLostError, "node 'third' is lost: it went away"),
        ("placement", PlacementError, "blocks 0..2 need 3 GB"),
    ],
)
async def test_errors_arrive_as_what_they_are(
    connect: Connect, method: str, error: type[TransportError], says: str
) -> None:
    async with connect() as pair:
        with pytest.raises(error) as caught:
            await pair.edge.call("end-1", message(method))
        assert str(caught.value) == says
        assert type(caught.value) is error
        if isinstance(caught.value, ConfigError):
            assert caught.value.problems == ["one", "two"]
        if isinstance(caught.value, NodeLostError):
            assert caught.value.node_id == "third"


async def test_unexpected_errors_arrive_without_internals(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    async with connect() as pair:
        with pytest.raises(TransportError, match="bug failed for an unexpected reason") as caught:
            await pair.edge.call("end-1", message("bug"))
        assert "secret" not in str(caught.value)
        assert "a secret of the server" in caplog.text


async def test_cancelling_a_call_cancels_the_handler(connect: Connect) -> None:
    async with connect() as pair:
        call = asyncio.create_task(pair.edge.call("end-1", message("hang")))
        await asyncio.wait_for(pair.service.started.wait(), 5)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(pair.service.cancelled.wait(), 2)


async def test_a_call_without_an_answer_ends_in_time(connect: Connect) -> None:
    async with connect() as pair:
        with pytest.raises(NodeLostError, match=r"'end-1' is lost: no answer to hang within 0\.2 s"):
            await pair.edge.call("end-1", message("hang"), timeout_s=0.2)
        await asyncio.wait_for(pair.service.cancelled.wait(), 2)


async def test_unknown_and_closed_nodes_are_lost(connect: Connect) -> None:
    async with connect() as pair:
        with pytest.raises(NodeLostError, match="'nobody'"):
            await pair.edge.call("nobody", message())
        await pair.end.close()
        with pytest.raises(NodeLostError, match="'end-1'"):
            await pair.edge.call("end-1", message())
        with pytest.raises(NodeLostError, match="'end-1'"):
            await pair.edge.open("end-1")


async def test_closing_a_node_fails_the_calls_to_it(connect: Connect) -> None:
    async with connect() as pair:
        call = asyncio.create_task(pair.edge.call("end-1", message("hang")))
        await asyncio.wait_for(pair.service.started.wait(), 5)
        await pair.end.close()
        with pytest.raises(NodeLostError, match="'end-1'"):
            await asyncio.wait_for(call, 2)


async def test_calls_run_concurrently(connect: Connect) -> None:
    async with connect() as pair:
        hanging = asyncio.create_task(pair.edge.call("end-1", message("hang")))
        replies = await asyncio.gather(*(pair.edge.call("end-1", message(size=size)) for size in range(20)))
        assert [len(reply.tensors["t"]) for reply in replies] == list(range(20))
        hanging.cancel()


async def test_a_stream_keeps_its_order_and_ends_in_order(connect: Connect) -> None:
    async with connect() as pair:
        stream = await pair.edge.open("end-1")

        async def send_all() -> None:
            for size in range(50):
                await stream.send(message(size=size))
            await stream.close()
            await stream.close()

        sending = asyncio.create_task(send_all())
        sizes = []
        while (received := await stream.receive()) is not None:
            sizes.append(len(received.tensors["t"]))
        await sending
        assert sizes == list(range(50))
        assert await stream.receive() is None
        assert pair.service.ended.is_set()


async def test_send_waits_while_the_window_is_full(connect: Connect) -> None:
    async with connect() as pair:
        stream = await pair.edge.open("end-1")
        await stream.send(message("hold"))
        sent = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.8):
                while sent < 100:
                    await stream.send(message(size=100_000))
                    sent += 1
        assert 0 < sent < 100
        pair.service.hold.set()
        for _ in range(sent):
            received = await stream.receive()
            assert received is not None
            assert len(received.tensors["t"]) == 100_000


async def test_waiting_to_receive_may_be_cancelled(connect: Connect) -> None:
    async with connect() as pair:
        stream = await pair.edge.open("end-1")
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(stream.receive(), 0.05)
        await stream.send(message(size=7))
        received = await stream.receive()
        assert received is not None
        assert len(received.tensors["t"]) == 7


async def test_several_tasks_may_send(connect: Connect) -> None:
    async with connect() as pair:
        stream = await pair.edge.open("end-1")
        tasks = [asyncio.create_task(stream.send(message(size=size))) for size in range(20)]
        received = [await stream.receive() for _ in range(20)]
        await asyncio.gather(*tasks)
        assert sorted(len(one.tensors["t"]) for one in received if one) == list(range(20))


async def test_a_stream_that_the_service_leaves_is_closed(connect: Connect) -> None:
    async with connect() as pair:
        stream = await pair.edge.open("end-1")
        await stream.send(message("leave"))
        assert await stream.receive() is None
        await asyncio.sleep(0.1)
        with pytest.raises(NodeLostError, match="'end-1'"):
            await stream.send(message())


async def test_an_error_in_a_stream_is_raised_at_the_other_end(connect: Connect) -> None:
    async with connect() as pair:
        stream = await pair.edge.open("end-1")
        await stream.send(message("placement"))
        with pytest.raises(PlacementError, match="no room"):
            await stream.receive()


async def test_sending_after_closing_is_an_error(connect: Connect) -> None:
    async with connect() as pair:
        stream = await pair.edge.open("end-1")
        await stream.close()
        with pytest.raises(TransportError, match="this end of the stream to 'end-1' is closed"):
            await stream.send(message())


async def test_closing_a_node_ends_its_streams_in_order(connect: Connect) -> None:
    async with connect() as pair:
        stream = await pair.edge.open("end-1")
        await stream.send(message())
        await stream.receive()
        await pair.end.close()
        assert await asyncio.wait_for(stream.receive(), 2) is None
    async with connect() as pair:
        stream = await pair.edge.open("end-1")
        await pair.edge.close()
        await asyncio.wait_for(pair.service.ended.wait(), 10)  # it has 2 s to end by itself before it is cancelled


async def test_messages_beyond_the_limit_are_refused_by_name(connect: Connect) -> None:
    async with connect() as pair:
        with pytest.raises(ProtocolError, match=r"echo has \d+ bytes, but messages may have 4194304"):
            await pair.edge.call("end-1", message(size=600_000))
        assert await pair.edge.call("end-1", message())


async def test_books_count_payload_and_header_alike(connect: Connect) -> None:
    async with connect() as pair:
        await pair.edge.call("end-1", message(size=1000))
        await pair.edge.call("end-1", Message("echo", counted=False))
        with contextlib.suppress(PlacementError):
            await pair.edge.call("end-1", Message("placement"))
        asked, answered = pair.edge.counter.take(), pair.end.counter.take()
        sizes: Any = {(one.receiver_id, one.kind): (one.messages, one.payload_bytes) for one in asked + answered}
        assert sizes == {
            ("end-1", "activations"): (1, 8000),
            ("end-1", "control"): (1, 0),
            ("edge-1", "activations"): (1, 8000),
            ("edge-1", "control"): (1, 0),
        }
        assert {one.header_bytes % 16 for one in asked + answered} == {0}
        assert pair.edge.counter.take() == ()
