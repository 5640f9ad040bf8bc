"""Serve a language model: launch a federation that does, its gateway, and the API server in front of it."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from ecogen import config as recipes
from ecogen.accounting.intensity import check_zones
from ecogen.engines.launch import ENGINES
from ecogen.engines.run_folder import load_recipe
from ecogen.engines.session import ended_in_order
from ecogen.errors import CheckpointError
from ecogen.models.adapters import ADAPTER, BACKBONE, EDGES
from ecogen.models.folder import CONFIG, open_folder
from ecogen.models.mixed_lora import open_adapter
from ecogen.planning.decoding import place_decoder
from ecogen.serving.gateway import Gateway
from ecogen.serving.generation import GenerationRequest, ServedModel
from ecogen.serving.language import LanguageModel
from ecogen.serving.openai.app import build_app
from ecogen.serving.openai.keys import Keys
from ecogen.serving.openai.limits import Limits
from ecogen.serving.openai.listening import Address, serve_http
from ecogen.serving.openai.text import load_text
from ecogen.serving.sampling import Sampling
from ecogen.serving.semantic import calibration_of


@dataclass(frozen=True)
class Served:
    """What is to be served.

    Attributes:
        folder: of the backbone.
        name: of the backbone.
        adapters: folders, by the name under which each is asked for.
    """

    folder: Path
    name: str
    adapters: Mapping[str, Path] = field(default_factory=dict)


def find_served(path: Path) -> Served:
    """What a folder holds: a model that `save_pretrained` wrote, or a run that tuned one.

    A run's backbone goes by the name of `RUN/backbone`, its tuned model by that of the run, and an edge's own by that
    of the run and the edge.

    Raises:
        CheckpointError: if it is neither.
    """
    if (path / CONFIG).exists():
        return Served(path, path.resolve().name)
    if not (path / BACKBONE / CONFIG).exists():
        raise CheckpointError(
            f"{path} holds no model: give a folder that save_pretrained wrote, or a finished run of a language model"
        )
    name = load_recipe(path).name
    found = {name: path / ADAPTER}
    found |= {f"{name}/{edge.name}": edge / ADAPTER for edge in sorted((path / EDGES).glob("*"))}
    return Served(path / BACKBONE, f"{name}/{BACKBONE}", {n: f for n, f in found.items() if f.exists()})


def with_adapters(served: Served, named: Sequence[str]) -> Served:
    """More adapters, `NAME=DIR` each.

    Raises:
        CheckpointError: if one is not written so.
    """
    pairs = [text.partition("=") for text in named]
    if wrong := [text for text, (name, _, folder) in zip(named, pairs, strict=True) if not (name and folder)]:
        raise CheckpointError(f"{wrong[0]!r} is not NAME=DIR, for example --adapter poems=adapters/poems")
    return replace(served, adapters={**served.adapters, **{name: Path(folder) for name, _, folder in pairs}})


def ready_line(address: Address, gateway: Gateway) -> str:
    """What is served, and where."""
    return f"ready: {address}/v1 serves {', '.join(model.name for model in gateway.models())}"


def serving_recipe(model: Path, recipe: recipes.Recipe | None = None, **sections: object) -> recipes.Recipe:
    """The recipe that serves the model in a folder.

    Args:
        recipe: what to change; None for the built-in one, with all nodes in this process.
        sections: of the recipe that are given instead.
    """
    base = recipe or recipes.load("serve", ["engine=inproc"])
    source = replace(base.model, source=str(model.resolve()))
    return replace(base, task="serve", model=source, **sections)  # type: ignore[arg-type]


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
            gateway = Gateway(federation.transport, edge_ids, served, patience_s, federation.check)
            try:
                yield gateway
            finally:
                await gateway.close()


def check_serving(recipe: recipes.Recipe, name: str | None = None) -> ServedModel:
    """What would be served, if every cluster can hold it with all of its devices.

    Raises:
        CheckpointError, PlacementError, ConfigError, ServingError: as `launch_serving`.
    """
    path = Path(recipe.model.source)
    topology = recipes.build_topology(recipe.topology)
    check_zones(site.zone for site in topology.sites.values())
    if recipe.serving.semantic.answers:
        calibration_of(recipe.serving.semantic)
    folder = open_folder(path)
    max_tokens = LanguageModel(folder).max_tokens(recipe.serving.max_tokens)
    for cluster in topology.clusters.values():
        nodes = [topology.nodes[node_id] for node_id in cluster.node_ids]
        model = LanguageModel(folder, [recipes.compute_of(recipe, node.node_id).dtype for node in nodes])
        place_decoder(
            model.weights((recipe.serving.slots + recipe.serving.shelf) * len(nodes), max_tokens),
            nodes,
            recipe.placement.labels,
        )
    return ServedModel(name or path.name, time.time(), max_tokens, nbytes=folder.nbytes)


async def serve(
    served: Served,
    recipe: recipes.Recipe,
    *,
    host: str,
    port: int,
    keys: Keys,
    allow_open: bool,
    on_ready: Callable[[Address, Gateway], None],
) -> None:
    """Serve until cancelled.

    Args:
        on_ready: called once the model answers, with where.

    Raises:
        CheckpointError: if a folder is no model's, or an adapter does not fit it.
        PlacementError, ConfigError: as `launch_serving`.
        ServingError: if the address cannot be had, or others could ask without a key.
    """
    text = await asyncio.to_thread(load_text, served.folder)
    adapters = {name: open_adapter(folder) for name, folder in served.adapters.items()}
    with ended_in_order():
        async with launch_serving(serving_recipe(served.folder, recipe), name=served.name) as gateway:
            for name, adapter in adapters.items():
                await gateway.put_adapter(name, adapter)
            await _first_answer(gateway)
            app = build_app(gateway, text, keys=keys, limits=Limits(), shelves=gateway)
            ready = lambda address: on_ready(address, gateway)  # noqa: E731
            await serve_http(app, host, port, on_ready=ready, allow_open=allow_open)


async def _first_answer(gateway: Gateway) -> None:
    """Wait until the model answers."""
    async for _ in gateway.generate(GenerationRequest(gateway.models()[0].name, (0,), Sampling(temperature=0), 1)):
        pass
