"""The one node class: a transport, a worker and a role. It admits callers and leaves the rest to the role."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from ecogen.errors import AuthenticationError, EcoGenError, ProtocolError
from ecogen.node.context import NodeContext, Role
from ecogen.transport.base import Message, Peer, Stream


class Node:
    """A running node: serves its role's methods, and runs its role's loops until it is stopped."""

    def __init__(self, context: NodeContext, role: Role) -> None:
        self.context = context
        self.role = role

    async def serve(self) -> str:
        """Begin to answer; returns the address."""
        return await self.context.transport.serve(self)

    async def run(self, address: str) -> None:
        """The role's loops; closes the node at the end."""
        try:
            await self.role.run(address)
        except ExceptionGroup as problems:
            raise first_cause(problems) from problems
        finally:
            await self.context.transport.close()
            self.context.worker.close()

    async def handle(self, peer: Peer, message: Message) -> Message:
        """Answer one call, if the caller may make it.

        Raises:
            ProtocolError: if the role has no such method.
            AuthenticationError: if the caller is not allowed to use it.
        """
        method = self.role.methods.get(message.method)
        if method is None:
            raise ProtocolError(f"{self.context.node_id} has no method {message.method!r}")
        if not any(caller.admits(peer) for caller in method.callers):
            raise AuthenticationError(
                f"{peer.node_id!r} ({peer.tier}) may not call {message.method!r} of {self.context.node_id!r}; "
                f"only {', '.join(map(str, method.callers))} may"
            )
        return await method.handler(peer, message)

    async def accept(self, peer: Peer, stream: Stream) -> None:
        """Serve a stream."""
        await self.role.accept(peer, stream)


class Newcomer:
    """Stands in for a node that listens already and has yet to be told its role; callers wait until it has one."""

    def __init__(self) -> None:
        self._node: asyncio.Future[Node] = asyncio.get_running_loop().create_future()

    def become(self, node: Node) -> None:
        """From now on the node answers."""
        self._node.set_result(node)

    async def run(self, address: str) -> None:
        """The node's own loops."""
        await (await asyncio.shield(self._node)).run(address)

    async def handle(self, peer: Peer, message: Message) -> Message:
        """What the node answers."""
        return await (await asyncio.shield(self._node)).handle(peer, message)

    async def accept(self, peer: Peer, stream: Stream) -> None:
        """Leave a stream to the node."""
        await (await asyncio.shield(self._node)).accept(peer, stream)


def first_cause(problems: ExceptionGroup[Exception]) -> Exception:
    """Of the errors of a node's loops the first that a user can act on, or else the first."""
    causes = list(_leaves(problems))
    return next((cause for cause in causes if isinstance(cause, EcoGenError)), causes[0])


def _leaves(problems: ExceptionGroup[Exception]) -> Iterator[Exception]:
    for problem in problems.exceptions:
        if isinstance(problem, ExceptionGroup):
            yield from _leaves(problem)
        else:
            yield problem
