"""A node that somebody starts by hand, on a machine that runs nothing else of EcoGen."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ecogen import config as recipes
from ecogen.engines.check import check_recipe
from ecogen.errors import ConfigError
from ecogen.node.process import NodeSettings, run_node
from ecogen.transport.certs import load_credentials


def node_settings(
    node_id: str,
    certificates: Path,
    folder: Path,
    recipe: Mapping[str, Any],
    join: str | None,
    listen: str,
    advertise: str | None,
    revoked: Path | None,
    device: str,
    dtype: str,
) -> NodeSettings:
    """Settings from what the command line says; the tier is what the certificate says.

    Raises:
        ConfigError: if an address is malformed, or the device's name.
        AuthenticationError: if the certificate is missing or another node's.
        EcoGenError: if the cloud's recipe cannot be carried out.
    """
    compute = recipes.section_from_table(recipes.NodeCompute, {"device": device, "dtype": dtype})
    if recipe:
        check_recipe(recipes.from_table(recipe))
    identity = load_credentials(certificates, node_id=node_id).identity
    host, port = _split("--listen", listen)
    parent_id, _, address = (join or "").partition("@")
    if join:
        _split("--join", address)
    return NodeSettings(
        node_id,
        identity.tier,
        folder,
        certificates,
        parent_id or None,
        address or None,
        dict(recipe),
        revoked=revoked,
        host=host,
        advertised_host=advertise,
        port=port,
        device=compute.device,
        dtype=compute.dtype,
    )


async def run_by_hand(settings: NodeSettings, on_serving: Callable[[str], None]) -> None:
    """Be the node until SIGINT or SIGTERM."""
    task = asyncio.create_task(run_node(settings, on_serving))
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _split(option: str, address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError([f"{option}: {address!r} is not HOST:PORT, for example 127.0.0.1:7000"], "ecogen node")
    return host, int(port)
