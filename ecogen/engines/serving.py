"""Serve a language model: a federation that does, its gateway, and the API server in front of it."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ecogen import config as recipes
from ecogen.engines.books import begin_books
from ecogen.engines.joined import join_serving
from ecogen.engines.launch import ENGINES
from ecogen.engines.run_folder import locked
from ecogen.engines.served import Served, check_serving, serving_recipe
from ecogen.engines.session import ended_in_order, remember
from ecogen.errors import NodeLostError, ServingError
from ecogen.models.mixed_lora import Adapter, open_adapter
from ecogen.node.books import hand_in_books
from ecogen.serving.gateway import Gateway
from ecogen.serving.generation import GenerationRequest
from ecogen.serving.openai.app import build_app
from ecogen.serving.openai.keys import Keys
from ecogen.serving.openai.limits import Limits
from ecogen.serving.openai.listening import Address, serve_http
from ecogen.serving.openai.text import TextModel, load_text
from ecogen.serving.sampling import Sampling

logger = logging.getLogger(__name__)

_PAUSE_S, _SOON_S = 1.0, 5.0


def ready_line(address: Address, gateway: Gateway) -> str:
    """What is served, and where."""
    return f"ready: {address}/v1 serves {', '.join(model.name for model in gateway.models())}"


@asynccontextmanager
async def launch_serving(
    recipe: recipes.Recipe, *, name: str | None = None, folder: Path | None = None
) -> AsyncIterator[Gateway]:
    """A federation that serves, and a gateway to it; its nodes are stopped on leaving.

    Args:
        name: of the model; None for its folder's.
        folder: where the nodes keep their disks; None for a temporary one.

    Raises:
        CheckpointError: if there is no model that can be cut.
        PlacementError: if a cluster cannot hold it.
        ConfigError: if a zone is unknown.
        ServingError: if the pairs of questions for semantic answers cannot be read.
    """
    served = check_serving(recipe, name)
    with tempfile.TemporaryDirectory(prefix="ecogen-") as temporary:
        async with ENGINES[recipe.engine](recipe, folder or Path(temporary)) as federation:
            edge_ids, patience_s = federation.topology.edge_ids, recipe.serving.patience_s
            gateway = Gateway(federation.transport, edge_ids, served, patience_s, federation.is_given_up)
            if folder is not None:
                remember(folder, federation.cloud_address)
            try:
                yield gateway
            except (ServingError, NodeLostError):
                federation.check()  # why a node failed says more than that nobody answers
                raise
            finally:
                await hand_in_books(federation.transport, edge_ids)
                await gateway.close()


@dataclass(frozen=True)
class Door:
    """Where the API server listens, and for whom.

    Attributes:
        on_ready: called once the model answers, with where.
    """

    host: str
    port: int
    on_ready: Callable[[Address, Gateway], None]
    keys: Keys = field(default_factory=Keys)
    allow_open: bool = False


async def serve(served: Served, recipe: recipes.Recipe, door: Door, *, folder: Path | None = None) -> None:
    """Serve until cancelled, on nodes of its own.

    Args:
        folder: where the nodes keep their disks, and the cloud the books; None for a temporary one.

    Raises:
        RunError: if the folder holds something else, or another process has it.
        CheckpointError: if a folder is no model's, or an adapter does not fit it.
        PlacementError, ConfigError: as `launch_serving`.
        ServingError: if the address cannot be had, or others could ask without a key.
    """
    text, adapters = await _opened(served)
    recipe = serving_recipe(served.folder, recipe)
    with ended_in_order(), ExitStack() as stack:
        if folder is not None:
            stack.enter_context(locked(folder))
            begin_books(folder, recipe)
        async with launch_serving(recipe, name=served.name, folder=folder) as gateway:
            await first_answer(gateway)
            await _answer(gateway, text, adapters, door)


async def serve_joined(
    parent: tuple[str, str], certificates: Path, found: Served | None, named: Mapping[str, Path], door: Door
) -> None:
    """Serve until cancelled, on nodes that somebody else started; waits for those that are not here yet.

    Args:
        parent: the cloud's node id and its address.
        found: the model as this machine has it; None for what the cloud tells.
        named: more adapters.

    Raises:
        RunError, AuthenticationError, NodeLostError: as `join_serving`.
        CheckpointError: if a folder is another model's, or an adapter does not fit it.
        ServingError: as `serve`.
    """
    with ended_in_order():
        async with join_serving(*parent, certificates, found) as (gateway, served):
            text, adapters = await _opened(served.beside(named))
            await _answers_at_last(gateway)
            await _answer(gateway, text, adapters, door)


async def first_answer(gateway: Gateway) -> None:
    """Wait until the model answers."""
    probe = GenerationRequest(gateway.models()[0].name, (0,), Sampling(temperature=0), 1, is_probe=True)
    async for _ in gateway.generate(probe):
        pass


async def _answers_at_last(gateway: Gateway) -> None:
    """Wait until the model answers, however long its nodes take to come; people are told why."""
    told, loop = "", asyncio.get_running_loop()
    soon = loop.call_later(_SOON_S, logger.warning, "waiting for nodes; `ecogen status` shows which are here")
    while True:
        try:
            return await first_answer(gateway)
        except (NodeLostError, ServingError) as problem:
            if str(problem) != told:
                told = str(problem)
                logger.warning("waiting: %s", told)
            await asyncio.sleep(_PAUSE_S)
        finally:
            soon.cancel()


async def _opened(served: Served) -> tuple[TextModel, dict[str, Adapter]]:
    """What turns text into tokens, and the adapters."""
    text = await asyncio.to_thread(load_text, served.folder)
    return text, {name: open_adapter(folder) for name, folder in served.adapters.items()}


async def _answer(gateway: Gateway, text: TextModel, adapters: Mapping[str, Adapter], door: Door) -> None:
    for name, adapter in adapters.items():
        await gateway.versions.put_adapter(name, adapter)
    app = build_app(gateway, text, keys=door.keys, limits=Limits(), store=gateway.versions)
    ready = lambda address: door.on_ready(address, gateway)  # noqa: E731
    await serve_http(app, door.host, door.port, on_ready=ready, allow_open=door.allow_open)
