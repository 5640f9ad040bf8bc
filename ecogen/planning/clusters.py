"""The placement of every cluster of a recipe, checked before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from ecogen.config import Recipe, build_topology
from ecogen.errors import PlacementError
from ecogen.placement import Placement
from ecogen.planning.cost import ModelShape
from ecogen.planning.pool import Pool, Work
from ecogen.planning.reasons import LeftOut, left_out
from ecogen.planning.search import Plan
from ecogen.topology import Cluster, Topology


def place_clusters(recipe: Recipe, shape: ModelShape) -> dict[str, Placement]:
    """Where each cluster holds the model, by cluster id.

    Raises:
        PlacementError: if a cluster cannot hold it; says which segment, by how much, and what would fit.
    """
    return {cluster_id: plan.placement for cluster_id, plan in plan_clusters(recipe, shape).items()}


def plan_clusters(recipe: Recipe, shape: ModelShape) -> dict[str, Plan]:
    """The placement of each cluster with what it is predicted to take, by cluster id.

    Raises:
        PlacementError: as `place_clusters`.
    """
    topology = build_topology(recipe.topology)
    return {cluster.cluster_id: _plan(recipe, shape, topology, cluster) for cluster in topology.clusters.values()}


def form_clusters(recipe: Recipe, shape: ModelShape) -> dict[str, tuple[str, ...]]:
    """The devices in order of each cluster that is formed of the recipe's pool, by cluster id.

    Raises:
        PlacementError: if no such clusters of an edge's devices are found that can hold the model.
    """
    clusters: dict[str, tuple[str, ...]] = {}
    for edge_id, pool in pools(recipe, shape).items():
        for index, formed in enumerate(_form(edge_id, pool, recipe.topology.clusters_per_edge)):
            clusters[f"{edge_id}.cluster-{index}"] = tuple(formed.placement.node_ids)
    return clusters


def explain_forming(recipe: Recipe, shape: ModelShape) -> tuple[float | None, list[LeftOut]]:
    """A bound of the slowest stage of a formed pool's clusters, so many an edge, and why devices are in none.

    None and nothing where there is no pool.
    """
    if not recipe.topology.pool:
        return None, []
    from ecogen.planning.cover import Capacities, least_time

    topology, bounds_s, unused = build_topology(recipe.topology), [], []
    for edge_id, pool in pools(recipe, shape).items():
        index_of = {node.node_id: index for index, node in enumerate(pool.nodes)}
        own = topology.clusters_of(edge_id)
        clusters = [frozenset(index_of[node_id] for node_id in cluster.node_ids) for cluster in own]
        bounds_s.append(least_time(Capacities.of(pool), len(own)) or 0.0)
        unused += left_out(pool, clusters, [cluster.cluster_id for cluster in own])
    return max(bounds_s), unused


def pools(recipe: Recipe, shape: ModelShape) -> dict[str, Pool]:
    """The devices of each edge's pool, with what a cluster is to do."""
    unformed = replace(recipe.topology, clusters={})
    topology = build_topology(unformed)
    work = work_of(recipe, shape, topology)
    return {
        edge_id: Pool(work, [node for node_id, node in topology.nodes.items() if node_id.startswith(f"{edge_id}.")])
        for edge_id in topology.edge_ids
    }


def _form(edge_id: str, pool: Pool, count: int | Literal["auto"]) -> tuple[Plan, ...]:
    from ecogen.planning.forming import form, form_most  # and with it the solver, which takes a while to import

    formed = form_most(pool) if count == "auto" else form(pool, count)
    if formed is None:
        wanted = "no cluster" if count == "auto" else f"no {count} cluster{'s' * (count != 1)}"
        of_them = f"of the {len(pool.nodes)} devices at {edge_id}"
        raise PlacementError(f"found {wanted} {of_them} that can hold the model; {_most(pool, count)}")
    return formed.plans


def _most(pool: Pool, count: int | Literal["auto"]) -> str:
    """How many clusters could be formed instead, tried out before it is said."""
    from ecogen.planning.forming import form

    tried = range(count - 1, 0, -1) if count != "auto" else ()
    most = next((fewer for fewer in tried if form(pool, fewer) is not None), None)
    if most is not None:
        return f"{most} can: set topology.clusters_per_edge={most}, or add devices or memory"
    return "add devices or memory, or have smaller microbatches (tuning.microbatches)"


def work_of(recipe: Recipe, shape: ModelShape, topology: Topology) -> Work:
    """What each cluster is to do."""
    tuning, size = recipe.tuning, microbatch_size(recipe)
    link, labels = topology.links["d2d"], recipe.placement.labels
    shape = replace(shape, tunable_states=tunable_states(recipe))
    return Work(shape, link, labels, size, tuning.microbatches, recipe.data.owners)


def tunable_states(recipe: Recipe) -> int:
    """What a device keeps of each tunable besides itself.

    A gradient, AdamW's two moments, SCAFFOLD's correction and sum of gradients, the value that the round began with
    where FedProx or the edge's predictions need it, and what rounding left of a change where updates are rounded.
    """
    tuning, unlabelled = recipe.tuning, recipe.tuning.unlabelled
    is_taught = unlabelled.method == "fixmatch" and unlabelled.teacher == "edge"
    needs_begun = tuning.proximal > 0 or is_taught
    of_methods = 2 * (recipe.aggregation.strategy == "scaffold") + needs_begun + (recipe.wire.updates != "float32")
    return 1 + 2 * (tuning.optimizer == "adamw") + of_methods


def cuts_of(recipe: Recipe, cluster_id: str) -> Sequence[int] | None:
    """A cluster's own cuts, or those of all; None to search."""
    cuts = recipe.placement.cuts_of.get(cluster_id, recipe.placement.cuts)
    return None if cuts == "auto" else cuts


def microbatch_size(recipe: Recipe) -> int:
    """Examples in the largest microbatch of a batch."""
    return -(-_batch_rows(recipe) // recipe.tuning.microbatches)


def _batch_rows(recipe: Recipe) -> int:
    """Images that go forward with a full batch: with FixMatch two views of each unlabelled one too."""
    unlabelled = recipe.tuning.unlabelled
    views = 2 * unlabelled.ratio if unlabelled.method == "fixmatch" and recipe.data.labelled < 1 else 0
    return recipe.tuning.batch_size * (1 + views)


def _plan(recipe: Recipe, shape: ModelShape, topology: Topology, cluster: Cluster) -> Plan:
    devices = [topology.nodes[node_id] for node_id in cluster.node_ids]
    shape = shape.with_rank_at_most(recipe.tunables.cluster_ranks.get(cluster.cluster_id))
    try:
        return work_of(recipe, shape, topology).plan(devices, cuts_of(recipe, cluster.cluster_id))
    except PlacementError as problem:
        own = cluster.cluster_id in recipe.placement.cuts_of
        place = f"placement.cuts_of.{cluster.cluster_id}" if own else cluster.cluster_id
        raise PlacementError(f"{place}: {problem}") from None
