"""A node that somebody starts by hand, on a machine that runs nothing else of EcoGen."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from pathlib import Path

from ecogen import config as recipes
from ecogen.engines.check import check_recipe
from ecogen.engines.served import check_serving, find_served, serving_recipe
from ecogen.errors import ConfigError
from ecogen.node.process import NodeSettings, run_node
from ecogen.transport.credentials import load_credentials


def node_settings(
    node_id: str,
    certificates: Path,
    folder: Path,
    recipe: recipes.Recipe | None,
    *,
    join: str | None,
    listen: str,
    device: str,
    dtype: str,
    advertise: str | None = None,
    revoked: Path | None = None,
    message_mib: int | None = None,
) -> NodeSettings:
    """Settings from what the command line says; the tier is what the certificate says.

    Args:
        recipe: the cloud's.
        join: the parent, as ID@HOST:PORT.
        listen, advertise: HOST:PORT, and the host by which others reach it if that is another.
        revoked: the federation's revocation list.
        message_mib: the largest message; None for what the recipe says.

    Raises:
        ConfigError: if an address is malformed, or the device's name.
        AuthenticationError: if the certificate is missing or another node's.
        EcoGenError: if the cloud's recipe cannot be carried out.
    """
    recipes.section_from_table(recipes.NodeCompute, {"device": device, "dtype": dtype})
    if recipe:
        recipe = _checked(recipe)
    tier = load_credentials(certificates, node_id=node_id).identity.tier
    host, port = _split_address("--listen", listen)
    parent = split_parent("--join", join) if join else (None, None)
    transport = recipe.transport if recipe else recipes.TransportRecipe()
    return NodeSettings(
        node_id=node_id,
        tier=tier,
        folder=folder,
        certificates=certificates,
        parent_id=parent[0],
        parent_address=parent[1],
        recipe=recipes.to_table(recipe) if recipe else {},
        revoked=revoked,
        host=host,
        advertised_host=advertise,
        port=port,
        device=device,
        dtype=dtype,
        serves=_serves(recipe, parent[0]),
        message_mib=message_mib or transport.message_mib,
    )


def _serves(recipe: recipes.Recipe | None, parent_id: str | None) -> bool | None:
    """The recipe says so, or else the parent will."""
    if recipe is not None:
        return recipe.task == "serve"
    return None if parent_id else False


def _checked(recipe: recipes.Recipe) -> recipes.Recipe:
    """The recipe with all that it leaves open, if it can be carried out."""
    if recipe.task == "tune":
        return check_recipe(recipe)
    if recipe.model.source in recipes.MADE_HERE:
        raise ConfigError([f"model.source: {recipe.model.source!r} cannot be served; name a run or a model's folder"])
    served = serving_recipe(find_served(Path(recipe.model.source)).folder, recipe)
    check_serving(served)
    return served


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
