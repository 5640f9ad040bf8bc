"""The placement of every cluster of a recipe, checked before anything starts."""

from __future__ import annotations

from ecogen.config import Recipe, build_topology
from ecogen.placement import Placement
from ecogen.planning.cost import ModelShape
from ecogen.planning.search import plan


def place_clusters(recipe: Recipe, shape: ModelShape) -> dict[str, Placement]:
    """Where each cluster holds the model, by cluster id.

    Raises:
        PlacementError: if a cluster cannot hold it; says which segment, by how much, and what would fit.
    """
    topology = build_topology(recipe.topology)
    cuts = None if recipe.placement.cuts == "auto" else recipe.placement.cuts
    tuning = recipe.tuning
    return {
        cluster_id: plan(
            shape,
            [topology.nodes[node_id] for node_id in cluster.node_ids],
            topology.links["d2d"],
            recipe.placement.labels,
            cuts=cuts,
            microbatch_size=-(-tuning.batch_size // tuning.microbatches),
            microbatches=len(cluster.node_ids),
        ).placement
        for cluster_id, cluster in topology.clusters.items()
    }
