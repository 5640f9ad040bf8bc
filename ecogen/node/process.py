"""One node as a process of its own: `local` forks it, `ecogen node` is it.

Nothing here touches torch or gRPC before the process has its own life, so a fork server may import this module.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
from collections.abc import Callable
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
from ecogen.node.node import Node
from ecogen.runtime.worker import Worker
from ecogen.storage import make_folder
from ecogen.transport.base import Peer
from ecogen.transport.certs import load_credentials
from ecogen.transport.wire import GrpcTransport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeSettings:
    """What a node process is started with.

    Attributes:
        parent_id, parent_address: whom it joins; None for the cloud.
        recipe: for the cloud, the resolved recipe as a table; the others are told by their parents.
        tuned: for the cloud of a federation that only serves, its tunables.
        certificates: the folder with `node.pem`, `node.key` and `authority.pem`.
        revoked: the federation's revocation list, where there is one.
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
    insecure: bool = False


async def run_node(settings: NodeSettings, on_serving: Callable[[str], None]) -> None:
    """Be a node until cancelled.

    Args:
        on_serving: called once with the address.

    Raises:
        EcoGenError: if it cannot go on.
    """
    torch.set_num_threads(1)
    transport = _transport(settings)
    worker = Worker(CpuMeter(settings.node_id, "process"), transport.counter)
    folder = make_folder(settings.folder)
    context = NodeContext(settings.node_id, folder, transport, worker, settings.device, settings.dtype)
    recipe = recipes.from_table(settings.recipe) if settings.recipe else None
    node = Node(context, build_role(context, settings.tier, settings.parent_id, recipe, settings.tuned))
    address = await node.serve()
    if settings.parent_id and settings.parent_address:
        transport.learn(settings.parent_id, settings.parent_address)
    on_serving(address)
    await node.run(address)


def main_of_child(settings: NodeSettings, pipe: Connection, log_level: int) -> None:
    """The main function of a forked node: reports its address, or its error, and ends with whoever forked it."""
    logging.basicConfig(level=log_level, format=f"%(asctime)s {settings.node_id} %(levelname)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's: it ends its nodes in order
    try:
        asyncio.run(_run_until_orphaned(settings, pipe))
    except EcoGenError as problem:
        pipe.send(problem_table(problem))
    except Exception as problem:
        logger.exception("%s failed", settings.node_id)
        pipe.send(problem_table(EcoGenError(f"{settings.node_id} failed: {problem!r}; see its log")))


def problem_table(problem: EcoGenError) -> dict[str, str]:
    """An error as plain values for the pipe."""
    return {"error": type(problem).__name__, "message": str(problem)}


async def _run_until_orphaned(settings: NodeSettings, pipe: Connection) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(run_node(settings, lambda address: pipe.send({"address": address})))
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    parent = multiprocessing.parent_process()
    if parent is not None:
        loop.add_reader(parent.sentinel, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        logger.info("%s stops", settings.node_id)


def _transport(settings: NodeSettings) -> GrpcTransport:
    peer = Peer(settings.node_id, settings.tier)
    place = {"host": settings.host, "port": settings.port, "advertised_host": settings.advertised_host}
    if settings.insecure:
        return GrpcTransport(peer, insecure=True, **place)
    credentials = load_credentials(settings.certificates, node_id=settings.node_id, tier=settings.tier)
    return GrpcTransport(peer, credentials=credentials, revoked=settings.revoked, **place)
