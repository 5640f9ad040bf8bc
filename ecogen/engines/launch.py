"""Launch a federation on the engine that its recipe names."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from ecogen import config as recipes
from ecogen.engines.check import check_recipe
from ecogen.engines.federation import Federation
from ecogen.engines.inproc import launch_inproc
from ecogen.engines.local import launch_local
from ecogen.engines.run_folder import check_ended, load_recipe
from ecogen.errors import RunError
from ecogen.models.adapters import BACKBONE, TUNABLES, tunables_file
from ecogen.models.checkpoint import load_metadata

ENGINES = {"inproc": launch_inproc, "local": launch_local}


@asynccontextmanager
async def launch(
    recipe: recipes.Recipe, *, folder: str | Path | None = None, tuned: Path | None = None
) -> AsyncIterator[Federation]:
    """A running federation; its nodes are stopped on leaving.

    Args:
        folder: where the nodes keep their disks, so that a later launch there goes on; None for a temporary one.
        tuned: tunables to serve with, instead of tuning.

    Raises:
        ConfigError, CheckpointError, PlacementError: if the recipe cannot be carried out.
    """
    recipe = check_recipe(recipe)
    with tempfile.TemporaryDirectory(prefix="ecogen-") as temporary:
        async with ENGINES[recipe.engine](recipe, Path(folder or temporary), tuned=tuned) as federation:
            yield federation


@asynccontextmanager
async def serve(run: Path, engine: str = "inproc", *, edge: str | None = None) -> AsyncIterator[Federation]:
    """One cluster of a finished run, ready to answer with its tuned model.

    Args:
        edge: whose model, where the edges know different labels.

    Raises:
        RunError, CheckpointError: if the folder holds no finished run; or `edge` is missing or unknown.
    """
    recipe = load_recipe(run)
    if not (run / TUNABLES).exists():
        check_ended(run)
    tuned = tunables_file(run, edge)
    load_metadata(tuned)
    known_edges = recipes.build_topology(recipe.topology).edge_ids
    if edge not in (None, *known_edges):
        raise RunError(f"{run} has no edge {edge!r}; name one of {', '.join(known_edges)}")
    labels = recipe.data.labels_of_edges.get(edge or known_edges[0])
    topology = _first_cluster(recipe.topology)
    known = recipes.build_topology(topology)
    one = replace(
        recipe,
        engine=engine,  # type: ignore[arg-type]
        model=replace(recipe.model, source=str(run / BACKBONE)),
        data=replace(recipe.data, labels_of_edges={"edge-0": labels} if labels else {}),
        topology=replace(
            topology,
            sites={name: site for name, site in topology.sites.items() if name in known.sites},
            devices={name: device for name, device in topology.devices.items() if name in known.nodes},
        ),
        placement=replace(
            recipe.placement, cuts_of={c: cuts for c, cuts in recipe.placement.cuts_of.items() if c in known.clusters}
        ),
        # What concerns tuning alone, and names clusters that are not here.
        tunables=replace(recipe.tunables, cluster_ranks={}),
        aggregation=recipes.Aggregation(),
        privacy=recipes.Privacy(),
        faults=recipes.Faults(),
        compute=replace(recipe.compute, nodes={n: c for n, c in recipe.compute.nodes.items() if n in known.nodes}),
        evaluation=recipes.Evaluation(split="none", requests=0),
    )
    async with launch(one, tuned=tuned) as federation:
        async for _ in federation.watch():
            pass
        yield federation


def _first_cluster(topology: recipes.TopologyRecipe) -> recipes.TopologyRecipe:
    """The cloud, the first edge and its first cluster."""
    own = [
        (cluster_id, node_ids) for cluster_id, node_ids in topology.clusters.items() if cluster_id.startswith("edge-0.")
    ]
    rows = tuple(row for row in topology.pool if row.edge == "edge-0")
    return replace(topology, edges=1, clusters_per_edge=1, pool=rows, clusters=dict(own[:1]))
