"""One node as a process of its own: `local` forks it, `ecogen node` is it.

Nothing here touches torch or gRPC before the process has its own life, so a fork server may import this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peft.utils.transformers_weight_conversion  # noqa: F401 - what peft and the data import later, imported once
import sklearn.datasets  # noqa: F401
import torch

from ecogen import config as recipes
from ecogen.errors import EcoGenError
from ecogen.metering.meter import CpuMeter
from ecogen.node.build import build_role
from ecogen.node.context import NodeContext
from ecogen.node.node import Newcomer, Node
from ecogen.runtime.membership import ask_task
from ecogen.runtime.worker import Worker
from ecogen.storage import make_folder, storage_error
from ecogen.topology import Tier
from ecogen.transport.base import Peer
from ecogen.transport.codec import Limits
from ecogen.transport.credentials import load_credentials
from ecogen.transport.failures import failure_of, rebuild
from ecogen.transport.wire import GrpcTransport
from ecogen.units import MIB

logger = logging.getLogger(__name__)

LOG = "log.txt"

_LINGER_S = 1.0
_ORPHAN_S = 5.0


@dataclass(frozen=True)
class NodeSettings:
    """What a node process is started with.

    Attributes:
        parent_id, parent_address: whom it joins; None for the cloud.
        recipe: for the cloud, the resolved recipe as a table; the others are told by their parents.
        tuned: for the cloud of a federation that only serves, its tunables.
        certificates: the folder with `node.pem`, `node.key` and `authority.pem`.
        revoked: the federation's revocation list, where there is one.
        serves: a language model, in a federation that tunes nothing; None to ask the parent.
        message_mib: the largest message, both ways.
    """

    node_id: str
    tier: str
    folder: Path
    certificates: Path
    parent_id: str | None = None
    parent_address: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    tuned: Path | None = None
    revoked: Path | None = None
    host: str = "127.0.0.1"
    advertised_host: str | None = None
    port: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    serves: bool | None = False
    message_mib: int = recipes.TransportRecipe.message_mib


async def run_node(settings: NodeSettings, on_serving: Callable[[str], None]) -> None:
    """Be a node until cancelled.

    Args:
        on_serving: called once with the address.

    Raises:
        EcoGenError: if it cannot go on.
    """
    torch.set_num_threads(settings.threads)
    transport = _transport(settings)
    worker = Worker(CpuMeter(settings.node_id, "process"), transport.counter)
    folder = make_folder(settings.folder)
    context = NodeContext(settings.node_id, folder, transport, worker, settings.device, settings.dtype)
    newcomer = Newcomer()
    if (serves := settings.serves) is not None:
        newcomer.become(_node(settings, context, serves))
    address = await transport.serve(newcomer)
    if settings.parent_id and settings.parent_address:
        transport.learn(settings.parent_id, settings.parent_address)
    on_serving(address)
    if serves is None:
        newcomer.become(_node(settings, context, await _asked_parent(settings, transport)))
    await newcomer.run(address)


async def _asked_parent(settings: NodeSettings, transport: GrpcTransport) -> bool:
    """Whether this node's federation serves."""
    assert settings.parent_id is not None
    try:
        return await ask_task(transport, settings.parent_id) == "serve"
    except BaseException:
        await transport.close()
        raise


def _node(settings: NodeSettings, context: NodeContext, serves: bool) -> Node:
    recipe = recipes.from_table(settings.recipe) if settings.recipe else None
    return Node(context, build_role(context, settings.tier, settings.parent_id, recipe, settings.tuned, serves=serves))


def main_of_child(settings: NodeSettings, pipe: Connection, log_level: int) -> None:
    """The main function of a forked node: reports its address, or its error, and ends when or with whoever forked it.

    Args:
        pipe: to whoever forked it; anything that is said there ends the node.
    """
    for name in (signal.SIGINT, signal.SIGHUP):  # and SIGTERM is blocked, see engines/forking.py
        signal.signal(name, signal.SIG_IGN)  # a group's are for the launcher, which ends its nodes in order
    log_to(settings.folder / LOG)
    logging.basicConfig(level=log_level, format="%(asctime)s %(levelname)s %(message)s")
    try:
        asyncio.run(_run_until_orphaned(settings, pipe))
    except Exception as problem:
        logger.exception("%s failed", settings.node_id)
        pipe.send({"failure": failure_of(_actionable(problem, settings))})


def problem_of_table(report: Mapping[str, Any]) -> EcoGenError:
    """The error that a child reported."""
    return rebuild(report["failure"])


def _actionable(problem: Exception, settings: NodeSettings) -> EcoGenError:
    if isinstance(problem, EcoGenError):
        return problem
    full = storage_error(problem) if isinstance(problem, OSError) else None
    return full or EcoGenError(f"{settings.node_id} failed: {problem!r}; see {settings.folder / LOG}")


def log_to(path: Path) -> None:
    """Let everything that this process or a library in it prints go to a file, not to the launcher's terminal."""
    logging.raiseExceptions = False  # a full disk should not stop a node for its log
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)


async def _run_until_orphaned(settings: NodeSettings, pipe: Connection) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(run_node(settings, lambda address: pipe.send({"address": address})))
    loop.add_reader(pipe.fileno(), _be_told, pipe, task)
    parent = multiprocessing.parent_process()
    if parent is not None:
        loop.add_reader(parent.sentinel, _orphan, parent.sentinel, settings.tier, task)
    try:
        await task
    except asyncio.CancelledError:
        logger.info("%s stops", settings.node_id)


def _be_told(pipe: Connection, task: asyncio.Task[None]) -> None:
    """The launcher said that this node should end; or it is gone, and `_orphan` knows what to do."""
    asyncio.get_running_loop().remove_reader(pipe.fileno())
    with contextlib.suppress(EOFError, ConnectionError):
        pipe.recv()
        task.cancel()


def _orphan(sentinel: int, tier: str, task: asyncio.Task[None]) -> None:
    """The launcher is gone: end, in order where that is quick.

    Devices stay a moment longer, or an edge would take their end for a loss and close the round without them.
    """
    loop = asyncio.get_running_loop()
    loop.remove_reader(sentinel)
    loop.call_later(_LINGER_S if tier == Tier.END else 0, task.cancel)
    deadline = threading.Timer(_ORPHAN_S, os._exit, (1,))
    deadline.daemon = True
    deadline.start()


def _transport(settings: NodeSettings) -> GrpcTransport:
    return GrpcTransport(
        Peer(settings.node_id, settings.tier),
        credentials=load_credentials(settings.certificates, node_id=settings.node_id, tier=settings.tier),
        revoked=settings.revoked,
        host=settings.host,
        port=settings.port,
        advertised_host=settings.advertised_host,
        limits=Limits(message_bytes=settings.message_mib * MIB),
    )
