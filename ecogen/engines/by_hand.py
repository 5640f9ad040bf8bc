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
    *,
    join: str | None,
    listen: str,
    device: str,
    dtype: str,
    **others: Any,
) -> NodeSettings:
    """Settings from what the command line says; the tier is what the certificate says.

    Args:
        others: as `NodeSettings` names them.

    Raises:
        ConfigError: if an address is malformed, or the device's name.
        AuthenticationError: if the certificate is missing or another node's.
        EcoGenError: if the cloud's recipe cannot be carried out.
    """
    recipes.section_from_table(recipes.NodeCompute, {"device": device, "dtype": dtype})
    if recipe:
        check_recipe(recipes.from_table(recipe))
    tier = load_credentials(certificates, node_id=node_id).identity.tier
    host, port = _split_address("--listen", listen)
    parent = split_parent("--join", join) if join else (None, None)
    identity: dict[str, Any] = {"node_id": node_id, "tier": tier, "folder": folder, "certificates": certificates}
    where: dict[str, Any] = {"parent_id": parent[0], "parent_address": parent[1], "host": host, "port": port}
    return NodeSettings(**identity, **where, recipe=dict(recipe), device=device, dtype=dtype, **others)


def split_parent(option: str, text: str) -> tuple[str, str]:
    """Node id and address.

    Raises:
        ConfigError: if it is no such thing.
    """
    node_id, _, address = text.partition("@")
    try:
        _split_address(option, address if node_id else "")
    except ConfigError:
        example = f"{option}: {text!r} is not ID@HOST:PORT, for example cloud@127.0.0.1:7000"
        raise ConfigError([example], "the command line") from None
    return node_id, address


async def run_by_hand(settings: NodeSettings, on_serving: Callable[[str], None]) -> None:
    """Be the node until SIGINT or SIGTERM."""
    task = asyncio.create_task(run_node(settings, on_serving))
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _split_address(option: str, address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError([f"{option}: {address!r} is not HOST:PORT, for example 127.0.0.1:7000"], "the command line")
    return host, int(port)
