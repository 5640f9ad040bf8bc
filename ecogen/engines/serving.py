"""Launch a federation that serves a language model, and its gateway."""

from __future__ import annotations

import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import torch

from ecogen import config as recipes
from ecogen.accounting.intensity import check_zones
from ecogen.engines.launch import ENGINES
from ecogen.models.folder import open_folder
from ecogen.planning.decoding import place_decoder
from ecogen.serving.gateway import Gateway
from ecogen.serving.generation import ServedModel
from ecogen.serving.language import LanguageModel


def serving_recipe(model: Path, recipe: recipes.Recipe | None = None, **sections: object) -> recipes.Recipe:
    """A recipe that serves the model in a folder: one edge with one cluster, unless it says otherwise.

    Args:
        recipe: what to change; None for the default.
        sections: of the recipe that are given instead.
    """
    one = recipes.TopologyRecipe(edges=1, clusters_per_edge=1, devices_per_cluster=2)
    base = recipe or recipes.Recipe(
        name="serve", topology=one, placement=recipes.PlacementRecipe(labels="end"), serving=recipes.Serving()
    )
    source = replace(base.model, source=str(model.resolve()))
    return replace(base, task="serve", model=source, **sections)  # type: ignore[arg-type]


@asynccontextmanager
async def launch_serving(recipe: recipes.Recipe, *, folder: Path | None = None) -> AsyncIterator[Gateway]:
    """A federation that serves, and a gateway to it; its nodes are stopped on leaving.

    Args:
        folder: where the nodes keep their disks; None for a temporary one.

    Raises:
        CheckpointError: if there is no model that can be cut.
        PlacementError: if a cluster cannot hold it.
        ConfigError: if a zone is unknown.
    """
    served = check_serving(recipe)
    with tempfile.TemporaryDirectory(prefix="ecogen-") as temporary:
        async with ENGINES[recipe.engine](recipe, folder or Path(temporary)) as federation:
            edge_ids = federation.topology.edge_ids
            patience_s = recipe.serving.patience_s
            gateway = Gateway(federation.transport, edge_ids, served, patience_s, federation.check)
            try:
                yield gateway
            finally:
                await gateway.close()


def check_serving(recipe: recipes.Recipe) -> ServedModel:
    """What would be served, if every cluster can hold it with all of its devices.

    Raises:
        CheckpointError, PlacementError, ConfigError: as `launch_serving`.
    """
    path = Path(recipe.model.source)
    topology = recipes.build_topology(recipe.topology)
    check_zones(site.zone for site in topology.sites.values())
    model = LanguageModel(open_folder(path))
    max_tokens = model.max_tokens(recipe.serving.max_tokens)
    for cluster in topology.clusters.values():
        nodes = [topology.nodes[node_id] for node_id in cluster.node_ids]
        dtypes = [getattr(torch, recipes.compute_of(recipe, node.node_id).dtype) for node in nodes]
        own = LanguageModel(model.folder, max(dtypes, key=lambda dtype: dtype.itemsize))
        place_decoder(own.weights(recipe.serving.slots * len(nodes), max_tokens), nodes, recipe.placement.labels)
    return ServedModel(path.name, time.time(), max_tokens)
