"""Two neighbours share one stream: opened once, by the first of them, and again after a loss."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from ecogen.errors import AuthenticationError, NodeLostError
from ecogen.runtime.neighbours import Neighbours
from ecogen.transport.base import Message, Peer, Stream
from ecogen.transport.memory import MemoryNetwork
from tests.runs import until


class Node:
    """A node that has neighbours and keeps what they send."""

    def __init__(self, network: MemoryNetwork, node_id: str, patience_s: float) -> None:
        self.transport = network.join(Peer(node_id, "end"))
        self.received: list[tuple[str, str]] = []
        self.losses: list[NodeLostError] = []
        self.num_adopted = 0
        self.refusal: AuthenticationError | None = None
        self.neighbours = Neighbours(self.transport, self._deliver, self.losses.append, patience_s=patience_s)

    async def handle(self, _: Peer, message: Message) -> Message:
        return message

    async def accept(self, peer: Peer, stream: Stream) -> None:
        if self.refusal:
            raise self.refusal
        self.num_adopted += 1
        await self.neighbours.adopt(peer, stream)

    async def send(self, node_id: str, method: str) -> None:
        await self.neighbours.send(node_id, Message(method))

    async def connect(self, *node_ids: str) -> None:
        await self.neighbours.connect({node_id: f"memory:{node_id}" for node_id in node_ids})

    async def gets(self, *messages: tuple[str, str]) -> None:
        """Wait for as many messages, which should be these."""
        await until(lambda: len(self.received) >= len(messages), 2)
        assert self.received == list(messages)

    def _deliver(self, sender_id: str, message: Message) -> None:
        self.received.append((sender_id, message.method))


class Street:
    """Nodes on one network, which come and go."""

    def __init__(self, network: MemoryNetwork, patience_s: float) -> None:
        self.network, self._patience_s = network, patience_s
        self.nodes: list[Node] = []

    async def move_in(self, *node_ids: str) -> list[Node]:
        nodes = [Node(self.network, node_id, self._patience_s) for node_id in node_ids]
        for node in nodes:
            await node.transport.serve(node)
        self.nodes += nodes
        return nodes


@asynccontextmanager
async def street(network: MemoryNetwork | None = None, *, patience_s: float = 2.0) -> AsyncIterator[Street]:
    street = Street(network or MemoryNetwork(), patience_s)
    async with asyncio.timeout(5):
        yield street
    for node in street.nodes:
        await node.neighbours.close()
        await node.transport.close()


async def test_both_use_the_one_stream_that_the_first_opens() -> None:
    async with street() as lane:
        a, b = await lane.move_in("a", "b")
        await asyncio.gather(a.connect("b"), b.connect("a"))
        for number in range(3):
            await a.send("b", f"to b {number}")
            await b.send("a", f"to a {number}")
        await a.connect("b")
        await b.gets(*(("a", f"to b {number}") for number in range(3)))
        await a.gets(*(("b", f"to a {number}") for number in range(3)))
        assert (a.num_adopted, b.num_adopted) == (0, 1)


async def test_a_stream_is_opened_by_the_first_message_too() -> None:
    async with street() as lane:
        a, b = await lane.move_in("a", "b")
        await a.send("b", "hello")
        await b.gets(("a", "hello"))


async def test_who_does_not_open_waits_for_the_other_to_do_so() -> None:
    async with street() as lane:
        a, b = await lane.move_in("a", "b")
        await b.connect("a")  # which is not its to do
        sending = asyncio.create_task(b.send("a", "hello"))
        await asyncio.sleep(0.01)
        assert not sending.done()
        await a.connect("b")
        await sending
        await a.gets(("b", "hello"))


async def test_and_not_for_ever() -> None:
    async with street(patience_s=0.02) as lane:
        _, b = await lane.move_in("a", "b")
        with pytest.raises(NodeLostError, match=r"'a' is lost: it opened no stream within 0\.02 s") as caught:
            await b.send("a", "hello")
        assert caught.value.node_id == "a"


async def test_a_neighbour_that_cannot_be_reached_is_named() -> None:
    async with street() as lane:
        a, _ = await lane.move_in("a", "b")
        for attempt in (a.connect("b", "c"), a.send("c", "hello")):
            with pytest.raises(NodeLostError) as caught:
                await attempt
            assert caught.value.node_id == "c"
        (c,) = await lane.move_in("c")
        await a.send("c", "hello")  # no trace of the failure is left
        await c.gets(("a", "hello"))


async def test_messages_say_from_whom_they_are() -> None:
    async with street() as lane:
        a, b, c = await lane.move_in("a", "b", "c")
        await a.connect("b", "c")
        await b.connect("a", "c")
        await a.send("c", "one")
        await c.gets(("a", "one"))
        await b.send("c", "two")
        await c.gets(("a", "one"), ("b", "two"))


async def test_receiving_never_waits_for_sending() -> None:
    """Two that send as much as they can, over a window of one message, do not block each other."""
    async with street(MemoryNetwork(window=1)) as lane:
        a, b = await lane.move_in("a", "b")
        await a.connect("b")

        async def send_all(node: Node, node_id: str) -> None:
            for number in range(50):
                await node.send(node_id, str(number))

        await asyncio.gather(send_all(a, "b"), send_all(b, "a"))
        await b.gets(*(("a", str(number)) for number in range(50)))
        await a.gets(*(("b", str(number)) for number in range(50)))


@pytest.mark.parametrize(("victim", "other"), [("a", "b"), ("b", "a")])
async def test_a_loss_is_reported_once_and_the_next_life_is_reached(victim: str, other: str) -> None:
    async with street() as lane:
        nodes = {node.neighbours.node_id: node for node in await lane.move_in("a", "b")}
        await nodes["a"].connect("b")
        await nodes["a"].send("b", "hello")
        await nodes["b"].gets(("a", "hello"))
        lane.network.kill(victim)
        await until(lambda: nodes[other].losses, 2)
        (nodes[victim],) = await lane.move_in(victim)
        await nodes["a"].connect("b")
        await nodes["a"].send("b", "again")
        await nodes["b"].send("a", "welcome back")
        await until(lambda: ("a", "again") in nodes["b"].received, 2)
        await nodes["a"].gets(("b", "welcome back"))
        assert [loss.node_id for loss in nodes[other].losses] == [victim]


async def test_sending_to_a_node_that_has_just_vanished_fails_and_the_next_opens_anew() -> None:
    async with street() as lane:
        a, _ = await lane.move_in("a", "b")
        await a.connect("b")
        lane.network.kill("b")
        (b,) = await lane.move_in("b")
        with pytest.raises(NodeLostError):
            await a.send("b", "lost")
        await a.send("b", "again")
        await b.gets(("a", "again"))


async def test_an_orderly_end_is_no_loss() -> None:
    async with street() as lane:
        a, b = await lane.move_in("a", "b")
        await a.connect("b")
        await a.send("b", "bye")
        await b.gets(("a", "bye"))
        await a.neighbours.close()
        await asyncio.sleep(0.01)
        assert not a.losses
        assert not b.losses
        await a.send("b", "I forgot something")
        await b.send("a", "so did I")
        await b.gets(("a", "bye"), ("a", "I forgot something"))
        await a.gets(("b", "so did I"))


async def test_a_neighbour_that_refuses_a_stream_is_lost_with_its_reason() -> None:
    async with street() as lane:
        a, b = await lane.move_in("a", "b")
        b.refusal = AuthenticationError("'a' is no neighbour of 'b'")
        await a.connect("b")
        await until(lambda: a.losses, 2)
        assert [str(loss) for loss in a.losses] == ["node 'b' is lost: 'a' is no neighbour of 'b'"]
        b.refusal = None
        await a.send("b", "may I now?")
        await b.gets(("a", "may I now?"))


async def test_a_stream_that_a_neighbours_next_life_opens_takes_the_formers_place() -> None:
    async with street() as lane:
        former, b = await lane.move_in("a", "b")
        await former.connect("b")
        (latter,) = await lane.move_in("a")
        await latter.connect("b")
        await latter.send("b", "hello")
        await b.gets(("a", "hello"))
        await b.send("a", "welcome back")
        await latter.gets(("b", "welcome back"))
        assert not former.received


async def test_two_messages_at_once_open_a_stream_that_both_can_use() -> None:
    async with street(MemoryNetwork(delay=lambda *_: 0.002), patience_s=0.05) as lane:
        a, b = await lane.move_in("a", "b")
        await asyncio.gather(a.send("b", "one"), a.send("b", "two"))
        await b.gets(("a", "one"), ("a", "two"))
        await asyncio.sleep(0.01)
        await b.send("a", "three")
        await a.gets(("b", "three"))


async def test_a_neighbour_that_moved_is_met_at_its_new_address() -> None:
    async with street() as lane:
        a, former = await lane.move_in("a", "b")
        await a.neighbours.connect({"b": "host:1"})
        (latter,) = await lane.move_in("b")
        await a.neighbours.connect({"b": "host:2"})
        await a.send("b", "hello")
        await asyncio.sleep(0.01)
        assert (former.received, latter.received) == ([], [("a", "hello")])


async def test_the_end_of_a_stream_that_was_replaced_is_no_loss() -> None:
    async with street() as lane:
        former, b = await lane.move_in("a", "b")
        await former.connect("b")
        (latter,) = await lane.move_in("a")
        await latter.connect("b")
        await latter.send("b", "hello")
        await b.gets(("a", "hello"))
        former.transport.cut_off()
        await asyncio.sleep(0.01)
        assert not b.losses
