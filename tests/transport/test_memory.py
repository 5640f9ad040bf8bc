"""What only the memory transport does: references, delays, and nodes that are killed."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch

from ecogen.errors import NodeLostError
from ecogen.transport.base import Message, Peer
from ecogen.transport.memory import MemoryNetwork, MemoryTransport
from tests.transport.echo import Echo

pytestmark = pytest.mark.asyncio


async def pair(network: MemoryNetwork) -> tuple[MemoryTransport, MemoryTransport, Echo]:
    edge, end, service = network.join(Peer("edge-1", "edge")), network.join(Peer("end-1", "end")), Echo()
    await edge.serve(Echo())
    await end.serve(service)
    return edge, end, service


async def test_tensors_go_by_reference_and_detached() -> None:
    edge, _, _ = await pair(MemoryNetwork())
    tensor = torch.randn(3, requires_grad=True)
    reply = await edge.call("end-1", Message("echo", tensors={"t": tensor}))
    assert reply.tensors["t"].data_ptr() == tensor.data_ptr()
    assert not reply.tensors["t"].requires_grad


@pytest.mark.parametrize("victim", ["end-1", "edge-1"])
async def test_a_killed_node_is_lost_to_calls_and_streams_at_once(victim: str) -> None:
    network = MemoryNetwork()
    edge, _, service = await pair(network)
    stream = await edge.open("end-1")
    waiting = [asyncio.create_task(edge.call("end-1", Message("hang"))), asyncio.create_task(stream.receive())]
    await service.started.wait()
    await asyncio.sleep(0.01)
    network.kill(victim)
    results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 1)
    assert [type(result) for result in results] == [NodeLostError, NodeLostError]
    await asyncio.wait_for(service.cancelled.wait(), 1)
    for attempt in (edge.call("end-1", Message("echo")), edge.open("end-1"), stream.send(Message("echo"))):
        with pytest.raises(NodeLostError):
            await attempt


async def test_a_neighbour_learns_that_its_caller_was_killed() -> None:
    network = MemoryNetwork()
    edge, _, service = await pair(network)
    stream = await edge.open("end-1")
    await service.started.wait()
    network.kill("edge-1")
    await asyncio.wait_for(service.lost.wait(), 1)
    with pytest.raises(NodeLostError):
        await stream.receive()


async def test_a_send_that_waits_is_woken_by_a_kill() -> None:
    network = MemoryNetwork(window=1)
    edge, _, _ = await pair(network)
    stream = await edge.open("end-1")
    await stream.send(Message("hold"))
    sends = [asyncio.create_task(stream.send(Message("echo"))) for _ in range(4)]
    await asyncio.sleep(0.02)
    network.kill("end-1")
    results = await asyncio.wait_for(asyncio.gather(*sends, return_exceptions=True), 1)
    assert sum(isinstance(result, NodeLostError) for result in results) >= 2


async def test_a_killed_node_comes_back() -> None:
    network = MemoryNetwork()
    edge, _, _ = await pair(network)
    network.kill("end-1")
    again = network.join(Peer("end-1", "end"))
    edge.learn("end-1", await again.serve(Echo()))
    assert (await edge.call("end-1", Message("echo"))).method == "echo"


async def test_delays_take_their_time_and_keep_the_order() -> None:
    delays = iter([0.0, 0.1, 0.02, 0.0, *[0.0] * 20])
    network = MemoryNetwork(delay=lambda sender, receiver, num_bytes: next(delays) if sender == "edge-1" else 0.0)
    edge, _, _ = await pair(network)
    stream = await edge.open("end-1")
    start = time.perf_counter()
    for method in ("a", "b", "c"):
        await stream.send(Message(method))
    received = [await stream.receive() for _ in range(3)]
    assert [one.method for one in received if one] == ["a", "b", "c"]
    assert 0.1 <= time.perf_counter() - start < 0.5


async def test_the_delay_is_told_who_and_how_much() -> None:
    seen: list[tuple[str, str, int]] = []

    def delay(sender: str, receiver: str, num_bytes: int) -> float:
        seen.append((sender, receiver, num_bytes))
        return 0.0

    edge, end, _ = await pair(MemoryNetwork(delay=delay))
    await edge.call("end-1", Message("echo", tensors={"t": torch.ones(100)}))
    sent, answered = edge.counter.take()[0], end.counter.take()[0]
    assert seen == [("edge-1", "end-1", sent.total_bytes), ("end-1", "edge-1", answered.total_bytes)]


@pytest.mark.parametrize("asked_before", [True, False])
async def test_while_all_is_stopped_a_call_ends_with_its_caller_not_with_its_target(asked_before: bool) -> None:
    """None learns that another is gone before it is stopped itself, and nobody waits for ever."""
    network = MemoryNetwork()
    edge, end, service = await pair(network)
    if not asked_before:
        network.close()
    waiting = asyncio.create_task(edge.call("end-1", Message("hang")))
    if asked_before:
        await service.started.wait()
        network.close()
    await end.close()
    await asyncio.sleep(0.02)
    assert not waiting.done()
    await edge.close()
    with pytest.raises(NodeLostError):
        await asyncio.wait_for(waiting, 1)
