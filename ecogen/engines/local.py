"""One process a node on this machine: gRPC with mutual TLS on loopback, forked from a server that has imported all.

A node whose process dies is started again at its old port, with its disk as it left it. One that dies again and again
is given up, which is logged; a run ends by it, and what serves goes on with the others.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from ecogen import config as recipes
from ecogen.engines.federation import Federation
from ecogen.engines.forking import fork_server
from ecogen.engines.run_folder import NODES
from ecogen.errors import EcoGenError, NodeLostError, RunError, TransportError
from ecogen.node.context import OPERATOR
from ecogen.node.process import LOG, NodeSettings, main_of_child, problem_of_table
from ecogen.storage import make_folder
from ecogen.topology import Tier
from ecogen.transport.authority import create_authority, issue, load_authority
from ecogen.transport.base import Peer
from ecogen.transport.codec import Limits
from ecogen.transport.credentials import load_credentials
from ecogen.transport.wire import GrpcTransport
from ecogen.units import MIB

logger = logging.getLogger(__name__)

_START_S = 120.0
_STOP_S = 8.0
_PAUSE_S = 0.5
_STABLE_S = 30.0
"""A node that lived for so long has recovered; deaths are counted anew."""
_MAX_DEATHS = 5


@dataclass
class _Child:
    """A node's process, and the end of the pipe on which it reports."""

    process: ForkServerProcess
    pipe: Connection
    began_s: float
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
        self._context = fork_server()
        self._children: dict[str, _Child] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, EcoGenError] = {}  # of nodes that are given up, in that order
        self._certificates = prepare_certificates(folder, recipe)
        credentials = load_credentials(self._certificates / OPERATOR, node_id=OPERATOR, tier=OPERATOR)
        limits = Limits(message_bytes=recipe.transport.message_mib * MIB)
        atexit.register(self._dismiss_all)  # where `stop` was broken off: or their ends would be waited for
        self.transport = GrpcTransport(Peer(OPERATOR, OPERATOR), credentials=credentials, limits=limits)

    async def start(self) -> None:
        """Start the cloud, then the edges, then the devices, each tier at once.

        Raises:
            EcoGenError: what keeps a node from serving.
        """
        topology = self._topology
        for tier in ([topology.cloud_id], topology.edge_ids, topology.end_ids):
            outcomes = await asyncio.gather(*map(self.start_node, tier), return_exceptions=True)
            if problems := [*filter(None, outcomes)]:
                raise problems[0]
        self.address(topology.cloud_id)

    async def start_node(self, node_id: str) -> None:
        """Start one node's process and wait until it serves; from then on it is started again whenever it dies.

        Raises:
            EcoGenError: what keeps it from serving.
        """
        child = await self._fork(node_id)
        await self._serves(node_id, child)
        self._keepers[node_id] = asyncio.create_task(self._keep(node_id, child), name=f"keep {node_id}")

    def pid(self, node_id: str) -> int:
        """The process id of a node."""
        pid = self._children[node_id].process.pid
        assert pid is not None
        return pid

    def check(self) -> None:
        """Raise what made a node fail for good."""
        if self._failures:
            raise next(iter(self._failures.values()))

    def is_given_up(self, node_id: str) -> bool:
        """Whether a node is not started again any more."""
        return node_id in self._failures

    def address(self, node_id: str) -> str:
        """Where a node is; the operator's transport learns it."""
        address = self._children[node_id].address
        self.transport.learn(node_id, address)
        return address

    async def stop(self) -> None:
        """End every process, hard where they do not listen.

        Parents end before their children: an edge should not take its devices' end for a loss.
        """
        for keeper in self._keepers.values():
            keeper.cancel()
        await asyncio.gather(*self._keepers.values(), return_exceptions=True)
        await self.transport.close()
        deadline_s = time.monotonic() + _STOP_S
        nodes = self._topology.nodes
        for is_end in (False, True):
            await _end([c for id_, c in self._children.items() if (nodes[id_].tier == Tier.END) is is_end], deadline_s)
        atexit.unregister(self._dismiss_all)

    def _dismiss_all(self) -> None:
        for child in self._children.values():
            _dismiss(child)

    async def _keep(self, node_id: str, child: _Child) -> None:
        """Start a node again whenever it was killed, until it fails by itself or dies too often."""
        deaths, serves = 0, True
        try:
            while True:
                if serves:
                    await self._end_of(child)
                death = await _autopsy(child)
                if not self._restart:
                    return
                deaths = 1 if time.monotonic() - child.began_s > _STABLE_S else deaths + 1
                if deaths >= _MAX_DEATHS:
                    raise self._given_up(node_id, death)
                logger.warning("%s %s; starting it again", node_id, death)
                await asyncio.sleep(_PAUSE_S * 2 ** (deaths - 1))
                child = await self._fork(node_id, child.address)
                serves = await self._serves_again(node_id, child)
        except EcoGenError as problem:
            self._give_up(node_id, problem)
        except Exception as problem:
            logger.exception("%s cannot be kept alive", node_id)
            self._give_up(node_id, EcoGenError(f"{node_id} cannot be started again: {problem!r}; {self._remedy}"))

    def _give_up(self, node_id: str, problem: EcoGenError) -> None:
        self._failures[node_id] = problem
        logger.error("%s is given up: %s", node_id, problem)

    def _given_up(self, node_id: str, death: str) -> RunError:
        log = self._folder / NODES / node_id / LOG
        return RunError(
            f"{node_id} {death}, for the {_MAX_DEATHS}th time and soon after its start; "
            f"look into {log} and at the machine's memory, then {self._remedy}"
        )

    @property
    def _remedy(self) -> str:
        """What a person does once a node is mended."""
        return "serve anew" if self._recipe.task == "serve" else "--resume"

    async def _fork(self, node_id: str, address: str = "") -> _Child:
        """A node's process at a free port, or at the port that its last life had."""
        settings = self._settings(node_id, int(address.rpartition(":")[2] or 0))
        ours, theirs = self._context.Pipe()
        level = logging.getLogger().getEffectiveLevel()
        process = self._context.Process(target=main_of_child, args=(settings, theirs, level), name=node_id, daemon=True)
        child = self._children[node_id] = _Child(process, ours, time.monotonic(), address)
        await _to_its_end(asyncio.to_thread(process.start))
        theirs.close()
        return child

    async def _serves(self, node_id: str, child: _Child) -> None:
        """Wait until a new process serves.

        Raises:
            EcoGenError: what keeps it from serving; NodeLostError if it died.
        """
        report = await _report(child, _START_S)
        if report is None:
            raise NodeLostError(node_id, "its process died or hung as it started")
        if "address" not in report:
            raise problem_of_table(report)
        child.address = report["address"]

    async def _serves_again(self, node_id: str, child: _Child) -> bool:
        """Whether it does; its port may be taken for a while, and it may die once more."""
        try:
            await self._serves(node_id, child)
        except TransportError as problem:
            if type(problem) not in (NodeLostError, TransportError):
                raise
            logger.warning("%s does not serve yet: %s", node_id, problem)
            return False
        return True

    async def _end_of(self, child: _Child) -> None:
        """Wait until a process ends.

        Raises:
            EcoGenError: what it ended by, where it said so.
        """
        report = await _report(child, None)
        if report is not None:
            raise problem_of_table(report)

    def _settings(self, node_id: str, port: int) -> NodeSettings:
        node, parent_id = self._topology.nodes[node_id], self._topology.parent_of(node_id)
        compute = recipes.compute_of(self._recipe, node_id)
        settings = NodeSettings(
            node_id,
            node.tier.value,
            self._folder / NODES / node_id,
            self._certificates / node_id,
            port=port,
            device=compute.device,
            dtype=compute.dtype,
            threads=compute.threads,
            serves=self._recipe.task == "serve",
            message_mib=self._recipe.transport.message_mib,
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
        if not (certificates / node_id / "authority.pem").exists():  # written last
            issue(authority, node_id, tier, certificates / node_id)
    return certificates


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Wait for work in a thread, which cannot be broken off: a process that is half started could not be ended."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def _report(child: _Child, timeout_s: float | None) -> dict[str, Any] | None:
    """The next thing that a child says; None when it died or says nothing in time."""
    loop, said = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(child.pipe.fileno(), said.set)
    try:
        async with asyncio.timeout(timeout_s):  # `wait_for` would forget of being cancelled if the child says it now
            await said.wait()
        report: dict[str, Any] = child.pipe.recv()
        return report
    except (EOFError, ConnectionError, TimeoutError):
        return None
    finally:
        loop.remove_reader(child.pipe.fileno())


async def _autopsy(child: _Child) -> str:
    """How a process ended, in words; it is ended if it has not."""
    await _end([child], time.monotonic() + 1)
    code = child.process.exitcode
    return f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"


def _dismiss(child: _Child) -> None:
    """Tell a node to end. It does not heed SIGTERM, which a service's whole group of processes gets."""
    with suppress(OSError):  # it has ended already
        child.pipe.send(None)


async def _end(children: Iterable[_Child], deadline_s: float) -> None:
    """End processes in order; hard those that have not ended by the deadline."""
    started = [child for child in children if child.process.pid is not None]
    for child in started:
        _dismiss(child)
    for child in started:
        await asyncio.to_thread(child.process.join, max(0.1, deadline_s - time.monotonic()))
        if child.process.is_alive():
            child.process.kill()
            await asyncio.to_thread(child.process.join, 1.0)
        child.pipe.close()


@asynccontextmanager
async def launch_local(recipe: recipes.Recipe, folder: Path, *, tuned: Path | None = None) -> AsyncIterator[Federation]:
    """A federation of processes on this machine, ended on leaving."""
    engine = LocalEngine(recipe, folder, tuned=tuned)
    try:
        await engine.start()
        yield Federation(recipe, engine, folder)
    finally:
        await engine.stop()
