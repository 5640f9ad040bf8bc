"""What a topology contradicts: its pool, the clusters of it, their cuts, and what a machine can hold."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from itertools import pairwise

from ecogen.config.contradictions.contradiction import Contradiction, unknown
from ecogen.config.nodes import edge_ids, is_unformed, pool_rows
from ecogen.config.schema import Recipe, TopologyRecipe
from ecogen.topology import Topology

MAX_NODES = 1_000_000
"""Of a topology, and so what a recipe can ask a machine to hold."""


def of_nodes(topology: TopologyRecipe) -> Iterator[Contradiction]:
    """More nodes than a topology may have."""
    per_edge = topology.clusters_per_edge
    devices = topology.edges * topology.devices_per_cluster * (1 if per_edge == "auto" else per_edge)
    names = ["topology.edges", "topology.clusters_per_edge", "topology.devices_per_cluster"]
    if topology.pool:
        names, devices = ["topology.pool"], sum(row.count for row in topology.pool)
    total = max(devices, topology.edges)
    if total > MAX_NODES:
        yield Contradiction(
            tuple(names), f"{', '.join(names)}: {total} nodes are more than the {MAX_NODES} there may be; set less"
        )


def of_pool(topology: TopologyRecipe) -> Iterator[Contradiction]:
    """Rows of unknown edges, edges without enough devices, and clusters of other devices than the pool's."""
    if not topology.pool:
        if topology.clusters_per_edge == "auto":
            text = "topology.clusters_per_edge: 'auto' forms clusters of a pool; give topology.pool, or a number"
            yield Contradiction(("topology.clusters_per_edge", "topology.pool"), text)
        if topology.clusters:
            text = "topology.clusters: names devices of a pool; give topology.pool, or leave it out"
            yield Contradiction(("topology.clusters", "topology.pool"), text)
        return
    edges, places = edge_ids(topology), ("topology.edges", "topology.pool", "topology.clusters")
    for index, row in enumerate(topology.pool):
        if row.edge not in edges:
            text = f"topology.pool.{index}.edge: no edge {row.edge!r} in this topology; valid: {', '.join(edges)}"
            yield Contradiction(places, text)
    yield from _of_clusters(topology) if topology.clusters else _too_few(topology)


def _too_few(topology: TopologyRecipe) -> Iterator[Contradiction]:
    """Edges with fewer devices than clusters."""
    wanted = 1 if topology.clusters_per_edge == "auto" else topology.clusters_per_edge
    for edge in edge_ids(topology):
        count = sum(row.count for row in topology.pool if row.edge == edge)
        if count < wanted:
            text = f"topology.pool: {edge} has {count} devices for {wanted} clusters; add devices, or ask for fewer"
            yield Contradiction(("topology.edges", "topology.pool", "topology.clusters_per_edge"), text)


def _of_clusters(topology: TopologyRecipe) -> Iterator[Contradiction]:
    """Clusters that are no edge's, or hold devices that are not there or in another one too."""
    places, pool = ("topology.clusters", "topology.pool", "topology.edges"), pool_rows(topology)
    named: list[str] = []
    for cluster_id, node_ids in topology.clusters.items():
        at, (edge, _, number) = f"topology.clusters.{cluster_id}", cluster_id.partition(".cluster-")
        if edge not in edge_ids(topology) or not number.isdigit():
            yield Contradiction(places, f"{at}: a cluster is named after its edge, such as 'edge-0.cluster-0'")
            continue
        if not node_ids:
            yield Contradiction(places, f"{at}: has no device; name one or more of the pool")
        own = [node_id for node_id in pool if node_id.startswith(f"{edge}.")]
        for node_id in node_ids:
            if node_id not in own:
                close = difflib.get_close_matches(node_id, own, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                yield Contradiction(places, f"{at}: no device {node_id!r} in the pool of {edge!r}{hint}")
            if node_id in named:
                yield Contradiction(places, f"{at}: {node_id!r} is named twice; a device is in one cluster")
            named.append(node_id)
    for edge in edge_ids(topology):
        if not any(name.startswith(f"{edge}.") for name in topology.clusters):
            yield Contradiction(places, f"topology.clusters: {edge} has none; each edge has at least one")


def possible_clusters(topology: TopologyRecipe) -> dict[str, None]:
    """The ids that clusters formed of the pool may have."""
    sizes = {edge: sum(row.count for row in topology.pool if row.edge == edge) for edge in edge_ids(topology)}
    count = topology.clusters_per_edge
    return {
        f"{edge}.cluster-{index}": None
        for edge, size in sizes.items()
        for index in range(size if count == "auto" else count)
    }


def of_cuts(recipe: Recipe, built: Topology) -> Iterator[Contradiction]:
    """Cuts where clusters have yet to be formed, of no cluster, or as many as do not divide it."""
    placement, places = recipe.placement, ("placement.cuts_of", "placement.cuts", "topology.pool")
    if is_unformed(recipe.topology):
        if placement.cuts != "auto" or placement.cuts_of:
            name = "cuts" if placement.cuts != "auto" else "cuts_of"
            text = f"placement.{name}: forming clusters chooses their cuts; leave it out, or say topology.clusters too"
            yield Contradiction(places, text)
        return
    yield from unknown("placement.cuts_of", placement.cuts_of, built.clusters)
    for cluster_id, cuts in placement.cuts_of.items():
        devices = len(built.clusters[cluster_id].node_ids) if cluster_id in built.clusters else len(cuts) + 1
        if len(cuts) != devices - 1 or any(a >= b for a, b in pairwise(cuts)):
            text = f"placement.cuts_of.{cluster_id}: {list(cuts)} does not divide the model over {devices} devices; "
            text += f"give {devices - 1} rising cut{'s' * (devices != 2)}"
            yield Contradiction((*places, "topology.devices_per_cluster"), text)
