"""The placement of every cluster of a recipe, checked before anything starts."""

from __future__ import annotations

from ecogen.config import Recipe, build_topology
from ecogen.errors import PlacementError
from ecogen.placement import Placement, most_in_flight, segments_held
from ecogen.planning.cost import ModelShape, memory_bytes
from ecogen.planning.search import plan
from ecogen.topology import Cluster, Topology
from ecogen.units import format_bytes


def place_clusters(recipe: Recipe, shape: ModelShape) -> dict[str, Placement]:
    """Where each cluster holds the model, by cluster id.

    Raises:
        PlacementError: if a cluster cannot hold it; says which segment, by how much, and what would fit.
    """
    topology = build_topology(recipe.topology)
    return {cluster.cluster_id: _place(recipe, shape, topology, cluster) for cluster in topology.clusters.values()}


def _place(recipe: Recipe, shape: ModelShape, topology: Topology, cluster: Cluster) -> Placement:
    size = -(-_batch_rows(recipe) // recipe.tuning.microbatches)
    returns = recipe.placement.labels == "start" and len(cluster.node_ids) > 1
    in_flight = min(recipe.tuning.microbatches, most_in_flight(len(cluster.node_ids), returns=returns))
    placement = plan(
        shape,
        [topology.nodes[node_id] for node_id in cluster.node_ids],
        topology.links["d2d"],
        recipe.placement.labels,
        cuts=None if recipe.placement.cuts == "auto" else recipe.placement.cuts,
        microbatch_size=size,
        microbatches=in_flight,
    ).placement
    for node_id in placement.node_ids[: recipe.data.owners]:
        held = segments_held(placement, recipe.data.owners, node_id)
        needed = memory_bytes(shape, held, size * in_flight)
        _check_owner(node_id, needed, topology.nodes[node_id].device.memory_bytes)
    return placement


def _batch_rows(recipe: Recipe) -> int:
    """Images that go forward with a full batch: with FixMatch two views of each unlabelled one too."""
    unlabelled = recipe.tuning.unlabelled
    views = 2 * unlabelled.ratio if unlabelled.method == "fixmatch" and recipe.data.labelled < 1 else 0
    return recipe.tuning.batch_size * (1 + views)


def _check_owner(node_id: str, needed: int, memory: int) -> None:
    """An owner also holds what the start needs, which the search of cuts does not count."""
    if needed > memory:
        raise PlacementError(
            f"owner {node_id!r} needs {format_bytes(needed)} for its blocks and the start's, but has "
            f"{format_bytes(memory)} ({format_bytes(needed - memory)} over); lower data.owners or give it more memory"
        )
