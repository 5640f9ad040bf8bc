"""Members come, are heard of, fall silent and come again; a child does all it can to stay one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from ecogen.errors import AuthenticationError, NodeLostError, ProtocolError
from ecogen.records import EventRecord
from ecogen.runtime import membership
from ecogen.runtime.membership import HEARTBEAT, JOIN, READY, Alive, Join, Members, attend
from ecogen.transport.base import Message, Peer, Stream
from ecogen.transport.memory import MemoryNetwork, MemoryTransport
from tests.runs import until


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause takes longer than a few milliseconds."""
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda delay_s: sleep(min(delay_s, 0.003)))


class Clock:
    """The module's seconds, as the test says; the event loop keeps its own."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(membership, "time", SimpleNamespace(monotonic=clock.monotonic, time=time.time))
    return clock


class Site:
    """Members that keep what they announced."""

    def __init__(self, *expected: str) -> None:
        self.events: list[EventRecord] = []
        self.members = Members(expected or ["a", "b"], self.events.append)

    @property
    def news(self) -> list[tuple[str, str]]:
        return [(event.event, event.node_id) for event in self.events]


async def test_a_child_joins_and_then_is_ready() -> None:
    site = Site()
    await site.members.join("b", "host:2")
    assert not site.members.is_ready("b")
    await site.members.ready("b")
    assert site.members.is_ready("b")
    assert site.members.addresses == {"b": "host:2"}
    assert [(e.event, e.node_id, e.detail) for e in site.events] == [("joined", "b", "host:2")]


async def test_the_ready_ones_are_listed_as_they_are_expected() -> None:
    site = Site("a", "b", "c")
    for node_id in ("c", "b", "a"):
        await site.members.join(node_id, node_id)
    for node_id in ("c", "a"):
        await site.members.ready(node_id)
    assert site.members.ready_ids == ["a", "c"]
    assert site.members.are_ready(["c", "a"])
    assert not site.members.are_ready(["a", "b"])


async def test_who_is_not_expected_is_refused_by_name() -> None:
    site = Site("a", "b")
    with pytest.raises(ProtocolError, match=r"^'c' is not expected here; expected: a, b$"):
        await site.members.join("c", "host:3")
    assert not site.events
    assert not site.members.addresses


async def test_who_joins_again_was_lost_first_and_is_not_ready_any_more() -> None:
    site = Site()
    await site.members.join("a", "host:1")
    await site.members.ready("a")
    await site.members.join("a", "host:9")
    assert site.news == [("joined", "a"), ("lost", "a"), ("rejoined", "a")]
    assert site.members.addresses == {"a": "host:9"}
    assert not site.members.is_ready("a")


async def test_a_loss_is_announced_once_and_a_return_as_such() -> None:
    site = Site()
    await site.members.join("a", "host:1")
    await site.members.lose("a", "its cable")
    await site.members.lose("a", "its cable")
    await site.members.lose("b", "it never came")
    await site.members.join("a", "host:1")
    assert site.news == [("joined", "a"), ("lost", "a"), ("rejoined", "a")]
    assert site.events[1].detail == "its cable"


async def test_who_is_not_here_should_join_again_and_cannot_be_ready() -> None:
    site = Site()
    assert not site.members.seen("a")
    await site.members.ready("a")
    assert not site.members.ready_ids
    await site.members.join("a", "host:1")
    assert site.members.seen("a")


async def test_children_are_located_or_the_missing_one_is_named() -> None:
    site = Site()
    await site.members.join("a", "host:1")
    assert site.members.locate(["a"]) == {"a": "host:1"}
    with pytest.raises(NodeLostError, match="'b' is lost: it left before") as caught:
        site.members.locate(["a", "b"])
    assert caught.value.node_id == "b"


async def test_it_is_known_how_long_ago_each_was_heard_of(clock: Clock) -> None:
    site = Site()
    await site.members.join("a", "host:1")
    clock.now_s += 2
    await site.members.join("b", "host:2")
    clock.now_s += 1
    assert site.members.heard_s == {"a": 3, "b": 1}
    assert site.members.seen("a")
    assert site.members.heard_s == {"a": 0, "b": 1}
    clock.now_s += 4
    await site.members.ready("b")
    assert site.members.heard_s == {"a": 4, "b": 0}


async def test_waiting_ends_when_a_child_makes_the_condition_true() -> None:
    site = Site()
    waiting = asyncio.create_task(site.members.wait_for(lambda: site.members.is_ready("a"), 5))
    await asyncio.sleep(0)
    await site.members.join("a", "host:1")
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await site.members.ready("a")
    assert await waiting


async def test_waiting_ends_when_a_child_goes() -> None:
    site = Site()
    await site.members.join("a", "host:1")
    waiting = asyncio.create_task(site.members.wait_for(lambda: not site.members.addresses, None))
    await asyncio.sleep(0.01)
    await site.members.lose("a", "its cable")
    async with asyncio.timeout(1):
        assert await waiting


async def test_waiting_gives_up_after_its_time_and_not_at_all_where_nothing_is_to_wait_for() -> None:
    site = Site()
    assert not await site.members.wait_for(lambda: site.members.is_ready("a"), 0.01)
    assert await site.members.wait_for(lambda: True, 0)
    await site.members.join("a", "host:1")  # the lock is free again


@asynccontextmanager
async def watching(members: Members) -> AsyncIterator[None]:
    task = asyncio.create_task(members.watch_for_silence())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.usefixtures("hasty")
async def test_the_silent_are_lost_and_those_that_give_signs_of_life_are_not(clock: Clock) -> None:
    site = Site("a", "b", "c")
    for node_id in ("a", "b"):
        await site.members.join(node_id, node_id)
        await site.members.ready(node_id)
    async with watching(site.members):
        clock.now_s += 5
        site.members.seen("b")
        clock.now_s += 4
        await until(lambda: ("lost", "a") in site.news)
    assert site.events[-1].detail == "silent for 8 s"
    assert list(site.members.addresses) == ["b"]


@pytest.mark.usefixtures("hasty")
async def test_who_still_prepares_may_be_silent_for_longer(clock: Clock) -> None:
    site = Site()
    await site.members.join("a", "a")
    await site.members.join("b", "b")
    await site.members.ready("b")
    async with watching(site.members):
        clock.now_s += 119
        await until(lambda: site.news[-1] == ("lost", "b"))  # "a" was looked at before
        assert list(site.members.addresses) == ["a"]
        clock.now_s += 2
        await until(lambda: site.news[-1] == ("lost", "a"))
    assert site.events[-1].detail == "silent for 120 s"


class Parent:
    """A parent's service: it tells its members what they should prepare."""

    def __init__(self, *expected: str) -> None:
        self.site = Site(*expected)
        self.calls: list[str] = []

    async def handle(self, peer: Peer, message: Message) -> Message:
        self.calls.append(message.method)
        match message.method:
            case "join":
                await self.site.members.join(peer.node_id, message.read(Join).address)
            case "ready":
                await self.site.members.ready(peer.node_id)
            case "heartbeat":
                return Message.of(HEARTBEAT, Alive(self.site.members.seen(peer.node_id)))
        return Message("welcome")

    async def accept(self, peer: Peer, stream: Stream) -> None:
        raise AuthenticationError("nobody streams to a parent")


class Child:
    """A child that attends, and remembers each welcome."""

    def __init__(self, network: MemoryNetwork) -> None:
        self.transport = network.join(Peer("a", "end"))
        self.welcomes: list[str] = []

    async def attend(self) -> None:
        await attend(self.transport, "parent", "host:1", self._prepare)

    async def _prepare(self, welcome: Message) -> Message:
        self.welcomes.append(welcome.method)
        return Message(READY)


async def serve(network: MemoryNetwork, parent: Parent) -> MemoryTransport:
    transport = network.join(Peer("parent", "edge"))
    await transport.serve(parent)
    return transport


@asynccontextmanager
async def attending(child: Child) -> AsyncIterator[None]:
    task = asyncio.create_task(child.attend())
    yield
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.usefixtures("hasty")
async def test_a_child_joins_prepares_as_it_is_told_and_keeps_giving_signs_of_life() -> None:
    network, parent = MemoryNetwork(), Parent("a")
    await serve(network, parent)
    child = Child(network)
    async with attending(child):
        await until(lambda: parent.calls.count(HEARTBEAT) >= 3)
    assert parent.calls[:4] == [JOIN, READY, HEARTBEAT, HEARTBEAT]
    assert child.welcomes == ["welcome"]
    assert parent.site.members.ready_ids == ["a"]
    assert parent.site.members.addresses == {"a": "host:1"}


@pytest.mark.usefixtures("hasty")
async def test_a_child_joins_again_once_its_parent_has_forgotten_it() -> None:
    network, parent = MemoryNetwork(), Parent("a")
    await serve(network, parent)
    child = Child(network)
    async with attending(child):
        await until(lambda: parent.site.members.ready_ids)
        await parent.site.members.lose("a", "it was silent")
        await until(lambda: parent.site.members.ready_ids)
    assert parent.site.news == [("joined", "a"), ("lost", "a"), ("rejoined", "a")]
    assert child.welcomes == ["welcome", "welcome"]


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("is_missed", [True, False])
async def test_a_child_joins_a_parent_that_was_killed_and_came_back(
    caplog: pytest.LogCaptureFixture, is_missed: bool
) -> None:
    network, parent, later = MemoryNetwork(), Parent("a"), Parent("a")
    await serve(network, parent)
    async with attending(Child(network)):
        await until(lambda: parent.site.members.ready_ids)
        network.kill("parent")
        if is_missed:
            await until(lambda: caplog.messages)
        await serve(network, later)
        await until(lambda: later.site.members.ready_ids)
    assert later.site.news == [("joined", "a")]


@pytest.mark.usefixtures("hasty")
async def test_a_child_waits_for_a_parent_that_comes_later_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    network, parent = MemoryNetwork(), Parent("a")
    caplog.set_level("INFO", membership.logger.name)
    async with attending(Child(network)):
        await until(lambda: len(caplog.messages) >= 3)
        await serve(network, parent)
        await until(lambda: parent.site.members.ready_ids)
    assert [record.levelname for record in caplog.records][:3] == ["WARNING", "INFO", "INFO"]
    assert caplog.messages[0].startswith("a: parent parent: node 'parent' is lost: ")


async def test_a_refused_child_gives_up_with_the_parents_reason() -> None:
    network = MemoryNetwork()
    await serve(network, Parent("b"))
    with pytest.raises(ProtocolError, match="'a' is not expected here; expected: b"):
        await asyncio.wait_for(Child(network).attend(), 1)
