"""What the cloud is to its edges and an edge to its devices: welcomes them, and hands out the backbone."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping

from torch import Tensor

from ecogen.node.context import OPERATOR, Caller, Method, NodeContext, Ready, methods
from ecogen.records import PhaseRecord, Record
from ecogen.runtime.delivery import FETCH, serve_pieces
from ecogen.runtime.membership import HEARTBEAT, JOIN, READY, TASK, Alive, Join, Members, Task
from ecogen.topology import Tier
from ecogen.transport.base import Message, Peer


class Parent:
    """Answers the children of one node.

    Args:
        tier: of the children.
        welcome: what a child is told when it joins; waits until this node is prepared itself.
        read: gives named tensors of the backbone, for children to fetch.
        publish: takes a record of each delivery.
        task: what the federation does.
    """

    def __init__(
        self,
        tier: Tier,
        context: NodeContext,
        members: Members,
        welcome: Callable[[str], Awaitable[Message]],
        read: Callable[[Iterable[str]], Mapping[str, Tensor]],
        publish: Callable[[Record], None],
        task: str = "tune",
    ) -> None:
        self._tier, self._context, self._members = tier, context, members
        self._welcome, self._read, self._publish, self._task = welcome, read, publish, task

    def methods(self) -> dict[str, Method]:
        """The methods that only the children's tier may use; the backbone an operator may fetch too.

        Any node may ask for the task: which is its parent, it is told when it joins.
        """
        children = Caller(self._tier)
        handlers = {JOIN: self._join, READY: self._ready, HEARTBEAT: self._heartbeat}
        fetching = methods(children, Caller(OPERATOR), **{FETCH: self._fetch})
        return methods(children, **handlers) | fetching | methods(*map(Caller, Tier), **{TASK: self._tell_task})

    async def _tell_task(self, _: Peer, __: Message) -> Message:
        return Message.of(TASK, Task(self._task))

    async def _join(self, peer: Peer, message: Message) -> Message:
        welcome = await self._welcome(peer.node_id)
        address = message.read(Join).address
        self._context.transport.learn(peer.node_id, address)
        await self._members.join(peer.node_id, address)
        return welcome

    async def _ready(self, peer: Peer, message: Message) -> Message:
        usage = message.read(Ready).usage
        self._publish(PhaseRecord(peer.node_id, "delivery", usage.wall_s, (usage,), time_s=time.time()))
        await self._members.ready(peer.node_id)
        return Message.of(READY)

    async def _heartbeat(self, peer: Peer, _: Message) -> Message:
        return Message.of(HEARTBEAT, Alive(self._members.seen(peer.node_id)))

    async def _fetch(self, _: Peer, message: Message) -> Message:
        return await self._context.worker.compute(serve_pieces, message, self._read)
