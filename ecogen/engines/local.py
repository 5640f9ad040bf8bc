"""One process a node on this machine: gRPC with mutual TLS on loopback, forked from a server that has imported everything.

A node whose process dies is started again at its old port, with its disk as it left it.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from ecogen import config as recipes
from ecogen import errors
from ecogen.engines.federation import Federation
from ecogen.errors import EcoGenError, NodeLostError
from ecogen.node.context import OPERATOR
from ecogen.node.process import NodeSettings, main_of_child
from ecogen.storage import make_folder
from ecogen.transport.base import Peer
from ecogen.transport.certs import create_authority, issue, load_authority, load_credentials
from ecogen.transport.wire import GrpcTransport

logger = logging.getLogger(__name__)

_START_S = 120.0
_RESTART_PAUSE_S = 0.5
_STOP_S = 10.0


@dataclass
class _Child:
    """A node's process, and the end of the pipe on which it reports."""

    process: ForkServerProcess
    pipe: Connection
    settings: NodeSettings
    address: str = ""


class LocalEngine:
    """The processes of one federation; they end with this one.

    Args:
        restart: start a node again when its process dies.
    """

    def __init__(
        self, recipe: recipes.Recipe, folder: Path, *, tuned: Path | None = None, restart: bool = True
    ) -> None:
        self._recipe, self._folder, self._tuned, self._restart = recipe, folder, tuned, restart
        self._topology = recipes.build_topology(recipe.topology)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["__main__", "ecogen.node.process"])
        self._children: dict[str, _Child] = {}
        self._watchers: set[asyncio.Task[None]] = set()
        self._failure: EcoGenError | None = None
        self._certificates = prepare_certificates(folder, recipe)
        credentials = load_credentials(self._certificates / OPERATOR, node_id=OPERATOR, tier=OPERATOR)
        self.transport = GrpcTransport(Peer(OPERATOR, OPERATOR), credentials=credentials)

    async def start(self) -> None:
        """Start the cloud, then the edges, then the devices, each tier at once."""
        topology = self._topology
        for tier in ([topology.cloud_id], topology.edge_ids, topology.end_ids):
            await asyncio.gather(*(self.start_node(node_id) for node_id in tier))
        self.address(topology.cloud_id)

    async def start_node(self, node_id: str, port: int = 0) -> None:
        """Start one node's process and wait until it serves.

        Raises:
            EcoGenError: what kept it from serving.
        """
        settings = self._settings(node_id, port)
        ours, theirs = self._context.Pipe()
        level = logging.getLogger().getEffectiveLevel()
        process = self._context.Process(target=main_of_child, args=(settings, theirs, level), name=node_id, daemon=True)
        await asyncio.to_thread(process.start)
        theirs.close()
        child = self._children[node_id] = _Child(process, ours, settings)
        report = await self._report(child, _START_S)
        if report is None or "error" in report:
            raise _problem(report or {}, node_id)
        child.address = report["address"]
        task = asyncio.create_task(self._watch(node_id, child))
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)

    def pid(self, node_id: str) -> int:
        """The process id of a node."""
        pid = self._children[node_id].process.pid
        assert pid is not None
        return pid

    def check(self) -> None:
        """Raise what made a node fail for good."""
        if self._failure is not None:
            raise self._failure

    def address(self, node_id: str) -> str:
        """Where a node is; the operator's transport learns it."""
        address = self._children[node_id].address
        self.transport.learn(node_id, address)
        return address

    async def stop(self) -> None:
        """End every process, in order where they listen, hard where they do not."""
        for watcher in list(self._watchers):
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await self.transport.close()
        for child in self._children.values():
            child.process.terminate()
        for child in self._children.values():
            await asyncio.to_thread(child.process.join, _STOP_S)
            if child.process.is_alive():
                child.process.kill()
            child.pipe.close()

    async def _watch(self, node_id: str, child: _Child) -> None:
        """When the process ends by an error, remember that; when it was killed, start it again."""
        report = await self._report(child, None)
        if report is not None and "error" in report:
            self._failure = self._failure or _problem(report, node_id)
            return
        logger.warning("%s died; starting it again", node_id)
        await asyncio.to_thread(child.process.join, _STOP_S)
        child.pipe.close()
        if self._restart:
            await asyncio.sleep(_RESTART_PAUSE_S)
            port = int(child.address.rpartition(":")[2])
            try:
                await self.start_node(node_id, port)
            except EcoGenError as problem:
                self._failure = self._failure or problem

    async def _report(self, child: _Child, timeout_s: float | None) -> dict[str, Any] | None:
        """The next thing that a child says; None when it died or says nothing in time."""
        loop, said = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(child.pipe.fileno(), said.set)
        try:
            await asyncio.wait_for(said.wait(), timeout_s)
            report: dict[str, Any] = child.pipe.recv()
            return report
        except (EOFError, ConnectionError, TimeoutError):
            return None
        finally:
            loop.remove_reader(child.pipe.fileno())

    def _settings(self, node_id: str, port: int) -> NodeSettings:
        node, parent_id = self._topology.nodes[node_id], self._topology.parent_of(node_id)
        compute = recipes.compute_of(self._recipe, node_id)
        settings = NodeSettings(
            node_id,
            node.tier.value,
            self._folder / "nodes" / node_id,
            self._certificates / node_id,
            port=port,
            device=compute.device,
            dtype=compute.dtype,
        )
        if parent_id is None:
            return replace(settings, recipe=recipes.to_table(self._recipe), tuned=self._tuned)
        return replace(settings, parent_id=parent_id, parent_address=self._children[parent_id].address)


def prepare_certificates(folder: Path, recipe: recipes.Recipe) -> Path:
    """The run's own authority, with a certificate for each node and the operator; those that exist are kept."""
    certificates = make_folder(folder / "certificates")
    directory = certificates / "authority"
    authority = load_authority(directory) if directory.exists() else create_authority(directory, "ecogen")
    tiers = {node_id: node.tier.value for node_id, node in recipes.build_topology(recipe.topology).nodes.items()}
    for node_id, tier in (tiers | {OPERATOR: OPERATOR}).items():
        if not (certificates / node_id / "node.pem").exists():
            issue(authority, node_id, tier, certificates / node_id)
    return certificates


def _problem(report: dict[str, Any], node_id: str) -> EcoGenError:
    """The error that a child reported, as its own class where that takes a message alone."""
    if not report:
        return NodeLostError(node_id, "its process died while it started")
    kind = getattr(errors, report["error"], EcoGenError)
    if kind in (errors.ConfigError, NodeLostError):
        kind = EcoGenError
    problem: EcoGenError = kind(report["message"])
    return problem


@asynccontextmanager
async def launch_local(recipe: recipes.Recipe, folder: Path, *, tuned: Path | None = None) -> AsyncIterator[Federation]:
    """A federation of processes on this machine, ended on leaving."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    engine = LocalEngine(recipe, folder, tuned=tuned)
    try:
        await engine.start()
        yield Federation(recipe, engine, folder)
    finally:
        await engine.stop()
