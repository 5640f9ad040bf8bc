"""A running federation as its launcher sees it: watches the records that the nodes publish, and saves the result.

The loops run on the nodes; leaving this object stops them only because its engine owns them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from ecogen import config as recipes
from ecogen.engines.saving import keeps_edges, save_run
from ecogen.errors import NodeLostError
from ecogen.models.checkpoint import Foundation
from ecogen.node.cloud import Watch
from ecogen.node.context import END, OPERATOR, PROGRESS, RECORD, RESULT, STATUS, WATCH, ProgressReport
from ecogen.node.device import ASK, Ask, Asked
from ecogen.node.status import Status
from ecogen.records import Record, RoundRecord, from_line
from ecogen.reports.summary import Summary
from ecogen.transport.base import Message, Peer, Stream, Transport
from ecogen.transport.credentials import load_credentials
from ecogen.transport.wire import GrpcTransport
from ecogen.tuning.foundation import obtain_foundation

OnProgress = Callable[[ProgressReport], None]
T = TypeVar("T")

_PAUSE_S = 0.2


class Engine(Protocol):
    """What brings nodes to life."""

    @property
    def transport(self) -> Transport:
        """The operator's."""

    def check(self) -> None:
        """Raise what made a node fail for good, if one did."""

    def is_given_up(self, node_id: str) -> bool:
        """Whether a node has failed for good."""

    def address(self, node_id: str) -> str:
        """Let the operator's transport know where a node is."""


class Federation:
    """Watches, asks and saves; made by `launch`."""

    def __init__(self, recipe: recipes.Recipe, engine: Engine, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.topology = recipes.build_topology(recipe.topology)
        self.records: list[Record] = []
        self.began_s = time.perf_counter()
        self._engine = engine

    async def watch(self, on_progress: OnProgress | None = None) -> AsyncIterator[Record]:
        """Every record, from the first of the run to the last, as the nodes publish them; waits for a lost cloud.

        Raises:
            NodeLostError: if the cloud stays away.
            EcoGenError: what made a node fail for good.
        """
        patience = _Patience(self.recipe.tuning.rejoin_timeout_s)
        while True:
            try:
                async for message in self._messages():
                    patience.renew()
                    if message.method == END:
                        return
                    if message.method == RECORD:
                        self.records.append(from_line(message.body))
                        yield self.records[-1]
                    elif message.method == PROGRESS and on_progress:
                        on_progress(message.read(ProgressReport))
            except NodeLostError as problem:
                await patience.spend(problem)

    async def tune(self, on_progress: OnProgress | None = None) -> AsyncIterator[RoundRecord]:
        """The records of rounds, of every edge and of the cloud, until the federation has finished."""
        async for record in self.watch(on_progress):
            if isinstance(record, RoundRecord):
                yield record

    @property
    def transport(self) -> Transport:
        """The operator's; it knows where the edges are."""
        for edge_id in self.topology.edge_ids:
            self._engine.address(edge_id)
        return self._engine.transport

    def check(self) -> None:
        """Raise what made a node fail for good, if one did."""
        self._engine.check()

    def is_given_up(self, node_id: str) -> bool:
        """Whether a node has failed for good; others may go on without it."""
        return self._engine.is_given_up(node_id)

    @property
    def cloud_address(self) -> str:
        """Where the cloud is, for those who come to watch."""
        return self._engine.address(self.topology.cloud_id)

    async def tunables(self) -> dict[str, Tensor]:
        """The tunables of the cloud's last average or lesson; the first edge's where edges stay alone."""
        has_cloud = self.recipe.tuning.cloud_every or self.recipe.relay.is_on
        node_id = self.topology.cloud_id if has_cloud else self.topology.edge_ids[0]
        return await self.tunables_of(node_id)

    async def save(self, folder: str | Path) -> Summary:
        """Write the run folder: tunables, PEFT adapter, records, report; returns the figures.

        Raises:
            StorageError: if the disk is full.
        """
        tunables, foundation, wall_s = await self.tunables(), await self.foundation(), self.wall_s
        edges = {e: await self.tunables_of(e) for e in self.topology.edge_ids if keeps_edges(self.recipe)}
        made = (foundation, tunables, wall_s, self.engine, edges)
        return await asyncio.to_thread(save_run, Path(folder), self.recipe, self.records, *made)

    async def foundation(self) -> Foundation:
        """The foundation model that was tuned."""
        foundation, _ = await asyncio.to_thread(obtain_foundation, self.recipe, lambda *_: None)
        return foundation

    @property
    def engine(self) -> str:
        """How the nodes came to life."""
        return self.recipe.engine

    @property
    def wall_s(self) -> float:
        """How long the federation has been running."""
        return time.perf_counter() - self.began_s

    async def tunables_of(self, node_id: str) -> dict[str, Tensor]:
        """The tunables that the cloud or an edge holds."""
        reply = await self._call(node_id, Message.of(RESULT, counted=False))
        return dict(reply.tensors)

    async def ask(self, node_id: str, paths: Sequence[Path]) -> Asked:
        """Have a start device classify pictures that it can read, through the split chain."""
        ask = Ask(f"ask-{time.time_ns()}", [str(path.resolve()) for path in paths])
        reply = await self._call(node_id, Message.of(ASK, ask, counted=False))
        return reply.read(Asked)

    async def _messages(self) -> AsyncIterator[Message]:
        """What the cloud sends to one who watches, from the first record that is not here yet."""
        self._engine.address(self.topology.cloud_id)
        stream = await self._checked(self._open_watch())
        try:
            while (message := await self._checked(stream.receive())) is not None:
                yield message
        finally:
            await stream.close()
        raise NodeLostError(self.topology.cloud_id, "it stopped before the end")

    async def _open_watch(self) -> Stream:
        stream = await self._engine.transport.open(self.topology.cloud_id)
        await stream.send(Message.of(WATCH, Watch(len(self.records)), counted=False))
        return stream

    async def _call(self, node_id: str, message: Message) -> Message:
        """A node's answer; asks again while its engine starts it anew."""
        patience = _Patience(self.recipe.tuning.rejoin_timeout_s)
        while True:
            try:
                self._engine.address(node_id)
                return await self._checked(self._engine.transport.call(node_id, message))
            except NodeLostError as problem:
                await patience.spend(problem)

    async def _checked(self, work: Coroutine[Any, Any, T]) -> T:
        """The outcome of waiting for a node, unless one fails for good: that says more than that another is gone."""
        task = asyncio.ensure_future(work)
        try:
            while True:
                await asyncio.wait([task], timeout=0.5)
                self._engine.check()
                if task.done():
                    return task.result()
        finally:
            task.cancel()


class _Patience:
    """How long somebody who is lost is waited for."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self.renew()

    def renew(self) -> None:
        """There was a sign of life."""
        self._deadline_s = time.monotonic() + self._limit_s

    async def spend(self, problem: NodeLostError) -> None:
        """Wait a little; raises the problem when there is no patience left."""
        if time.monotonic() > self._deadline_s:
            raise problem
        await asyncio.sleep(_PAUSE_S)


async def ask_status(folder: Path, cloud_address: str) -> Status:
    """How the federation of a run folder is, asked over the network with the operator's certificate.

    Raises:
        TransportError: if it does not answer.
    """
    credentials = load_credentials(folder / "certificates" / OPERATOR, node_id=OPERATOR, tier=OPERATOR)
    transport = GrpcTransport(Peer(OPERATOR, OPERATOR), credentials=credentials)
    transport.learn("cloud", cloud_address)
    try:
        reply = await transport.call("cloud", Message.of(STATUS, counted=False), timeout_s=5)
        return reply.read(Status)
    finally:
        await transport.close()
