"""All nodes in this process and event loop, over the in-memory transport: the default that a newcomer meets."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import torch

from ecogen import config as recipes
from ecogen.engines.federation import Federation
from ecogen.engines.run_folder import NODES
from ecogen.metering.meter import CpuMeter
from ecogen.node.build import build_role
from ecogen.node.context import OPERATOR, NodeContext, Role
from ecogen.node.node import Node
from ecogen.runtime.worker import Worker
from ecogen.storage import make_folder
from ecogen.transport.base import Peer
from ecogen.transport.codec import Limits
from ecogen.transport.memory import MemoryNetwork, MemoryTransport
from ecogen.units import MIB

logger = logging.getLogger(__name__)


class InprocEngine:
    """The nodes of one federation as tasks of this event loop; they share threads, one a core."""

    def __init__(self, recipe: recipes.Recipe, folder: Path, network: MemoryNetwork, tuned: Path | None) -> None:
        self._recipe, self._folder, self.network, self._tuned = recipe, folder, network, tuned
        self._executor = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="compute")
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.roles: dict[str, Role] = {}
        self.transport: MemoryTransport = network.join(Peer(OPERATOR, OPERATOR))

    async def start(self) -> None:
        """Start every node, the cloud first."""
        for node_id in recipes.build_topology(self._recipe.topology).nodes:
            await self.start_node(node_id)

    async def start_node(self, node_id: str) -> None:
        """Start one node, or start it again after `kill`."""
        topology = recipes.build_topology(self._recipe.topology)
        tier, parent_id = topology.nodes[node_id].tier, topology.parent_of(node_id)
        transport = self.network.join(Peer(node_id, tier.value))
        worker = Worker(CpuMeter(node_id, "thread"), transport.counter, self._executor)
        compute = recipes.compute_of(self._recipe, node_id)
        context = NodeContext(
            node_id, make_folder(self._folder / NODES / node_id), transport, worker, compute.device, compute.dtype
        )
        serves = self._recipe.task == "serve"
        node = Node(context, build_role(context, tier, parent_id, self._recipe, self._tuned, serves=serves))
        self.roles[node_id] = node.role
        address = await node.serve()
        task = self._tasks[node_id] = asyncio.create_task(node.run(address), name=node_id)
        task.add_done_callback(_tell)

    async def kill(self, node_id: str) -> None:
        """Cut a node off abruptly, as if its process had died."""
        self.network.kill(node_id)
        task = self._tasks.pop(node_id)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def stop(self) -> None:
        """Stop every node, from the cloud down: to an edge that is still at work, its devices would be lost."""
        self.network.close()
        for node_id in recipes.build_topology(self._recipe.topology).nodes:
            if task := self._tasks.get(node_id):
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self.transport.close()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def check(self) -> None:
        """Raise what made a node fail for good."""
        if problems := [*filter(None, map(_failure, self._tasks.values()))]:
            raise problems[0]

    def is_given_up(self, node_id: str) -> bool:
        """Whether a node has failed by itself; one that was killed may be started again."""
        return node_id in self._tasks and _failure(self._tasks[node_id]) is not None

    def address(self, node_id: str) -> str:
        """Ids are addresses here."""
        return node_id


def _failure(task: asyncio.Task[None]) -> BaseException | None:
    """What a node's task failed by; None for one that goes on or was stopped."""
    return task.exception() if task.done() and not task.cancelled() else None


def _tell(task: asyncio.Task[None]) -> None:
    if problem := _failure(task):
        logger.error("%s is given up: %s", task.get_name(), problem)


@asynccontextmanager
async def launch_inproc(
    recipe: recipes.Recipe, folder: Path, *, tuned: Path | None = None, network: MemoryNetwork | None = None
) -> AsyncIterator[Federation]:
    """A federation in this process, stopped on leaving."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    limits = Limits(message_bytes=recipe.transport.message_mib * MIB)
    engine = InprocEngine(recipe, folder, network or MemoryNetwork(limits=limits), tuned)
    try:
        await engine.start()
        yield Federation(recipe, engine, folder)
    finally:
        await engine.stop()
        torch.set_num_threads(threads)
