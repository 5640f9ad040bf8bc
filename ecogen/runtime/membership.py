"""Membership: a child joins its parent and keeps telling it that it lives; the parent knows who is here and where."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import msgspec

from ecogen.errors import NodeLostError, ProtocolError
from ecogen.records import EventKind, EventRecord
from ecogen.transport.base import Message, Transport

logger = logging.getLogger(__name__)

TASK, JOIN, READY, HEARTBEAT = "task", "join", "ready", "heartbeat"
HEARTBEAT_S = 2.0
SILENCE_S = 8.0
"""A child that was silent for so long is taken as lost: four heartbeats."""
PREPARING_S = 120.0
"""How long a child may take from joining until it is ready; it sends no heartbeats meanwhile."""


class Task(msgspec.Struct, frozen=True):
    """Parent to a node that asks before it joins: what the federation does, as recipes say it."""

    task: str


class Join(msgspec.Struct, frozen=True):
    """Child to parent: I am here."""

    address: str


class Alive(msgspec.Struct, frozen=True):
    """Parent's answer to a heartbeat; `known` is False after the parent started anew, and the child joins again."""

    known: bool


@dataclass
class Member:
    """What a parent knows of one child."""

    address: str
    seen_s: float
    ready: bool = False


class Members:
    """The children of one parent.

    Args:
        expected: who may join.
        announce: called with each event: joined, rejoined, lost.
    """

    def __init__(self, expected: Iterable[str], announce: Callable[[EventRecord], None]) -> None:
        self.expected = list(expected)
        self._announce = announce
        self._here: dict[str, Member] = {}
        self._known: set[str] = set()
        self._changed = asyncio.Condition()

    def is_ready(self, node_id: str) -> bool:
        member = self._here.get(node_id)
        return member is not None and member.ready

    def are_ready(self, node_ids: Iterable[str]) -> bool:
        return all(self.is_ready(node_id) for node_id in node_ids)

    @property
    def ready_ids(self) -> list[str]:
        return [node_id for node_id in self.expected if self.is_ready(node_id)]

    @property
    def addresses(self) -> dict[str, str]:
        return {node_id: member.address for node_id, member in self._here.items()}

    @property
    def heard_s(self) -> dict[str, float]:
        """Seconds since each child that is here gave a sign of life."""
        now_s = time.monotonic()
        return {node_id: now_s - member.seen_s for node_id, member in self._here.items()}

    def locate(self, node_ids: Iterable[str]) -> dict[str, str]:
        """Where some children are.

        Raises:
            NodeLostError: if one is not here.
        """
        for node_id in node_ids:
            if node_id not in self._here:
                raise NodeLostError(node_id, "it left before the others were told where it is")
        return {node_id: self._here[node_id].address for node_id in node_ids}

    async def join(self, node_id: str, address: str) -> None:
        """A child arrives, for the first time or again.

        Raises:
            ProtocolError: if it is not one of the expected.
        """
        if node_id not in self.expected:
            raise ProtocolError(f"{node_id!r} is not expected here; expected: {', '.join(self.expected)}")
        if node_id in self._here:
            await self.lose(node_id, "it was gone before that was noticed, and joined again")
        self._here[node_id] = Member(address, time.monotonic())
        await self._notify("rejoined" if node_id in self._known else "joined", node_id, address)
        self._known.add(node_id)

    async def ready(self, node_id: str) -> None:
        """A child holds what it needs and can work."""
        if self.seen(node_id):
            self._here[node_id].ready = True
            await self.wake()

    def seen(self, node_id: str) -> bool:
        """A child gave a sign of life; False if it should join again."""
        if node_id in self._here:
            self._here[node_id].seen_s = time.monotonic()
        return node_id in self._here

    async def lose(self, node_id: str, reason: str) -> None:
        """A child is gone; harmless when that is known."""
        if self._here.pop(node_id, None) is not None:
            await self._notify("lost", node_id, reason)

    async def wait_for(self, condition: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait until the condition holds, looked at whenever a child comes or goes; False after the timeout."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(condition)
        except TimeoutError:
            return False
        return True

    async def watch_for_silence(self) -> None:
        """Forever: take those as lost that were silent for too long."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            for node_id, member in list(self._here.items()):
                patience_s = SILENCE_S if member.ready else PREPARING_S
                if time.monotonic() - member.seen_s > patience_s:
                    await self.lose(node_id, f"silent for {patience_s:g} s")

    async def _notify(self, event: EventKind, node_id: str, detail: str) -> None:
        self._announce(EventRecord(event, node_id, detail=detail, time_s=time.time()))
        await self.wake()

    async def wake(self) -> None:
        """Let those who wait look at their condition again."""
        async with self._changed:
            self._changed.notify_all()


async def attend(
    transport: Transport, parent_id: str, address: str, prepare: Callable[[Message], Awaitable[Message]]
) -> None:
    """Forever: join the parent, prepare as its welcome says, and send heartbeats; join again after a loss.

    Args:
        prepare: takes the welcome and gives the message that says this node is ready.

    Raises:
        TransportError: if the parent refuses or fails; trying again would not help.
    """
    pauses = _Pauses(transport, parent_id)
    while True:
        try:
            welcome = await transport.call(parent_id, Message.of(JOIN, Join(address)))
            await transport.call(parent_id, await prepare(welcome))
            pauses.begin_anew()
            await _keep_alive(transport, parent_id)
        except NodeLostError as problem:
            pauses.tell(problem)
        await pauses.next()


async def ask_task(transport: Transport, parent_id: str) -> str:
    """What the parent's federation does, asked for as long as it takes.

    Raises:
        TransportError: if the parent refuses or fails; trying again would not help.
    """
    pauses = _Pauses(transport, parent_id)
    while True:
        try:
            return (await transport.call(parent_id, Message.of(TASK))).read(Task).task
        except NodeLostError as problem:
            pauses.tell(problem)
        await pauses.next()


class _Pauses:
    """Between two attempts to reach a parent: longer and longer, and people are told once."""

    def __init__(self, transport: Transport, parent_id: str) -> None:
        self._who = transport.peer.node_id, parent_id
        self.begin_anew()

    def begin_anew(self) -> None:
        self._pause_s, self._level = 0.1, logging.WARNING

    def tell(self, problem: NodeLostError) -> None:
        logger.log(self._level, "%s: parent %s: %s; trying again", *self._who, problem)
        self._level = logging.INFO

    async def next(self) -> None:
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2.0, self._pause_s * 1.5)


async def _keep_alive(transport: Transport, parent_id: str) -> None:
    """Send heartbeats until the parent does not know this node any more."""
    known = True
    while known:
        await asyncio.sleep(HEARTBEAT_S)
        reply = await transport.call(parent_id, Message.of(HEARTBEAT), timeout_s=SILENCE_S)
        known = reply.read(Alive).known
