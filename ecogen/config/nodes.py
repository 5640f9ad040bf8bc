"""The nodes that a recipe asks for: their ids, places, hardware and links."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ecogen.config.schema import DeviceProfile, LinkProfile, NodeCompute, PoolRow, Recipe, SiteProfile, TopologyRecipe
from ecogen.records import LinkClass
from ecogen.topology import Cluster, Device, Link, Node, Site, Tier, Topology
from ecogen.units import GB, GIB, MBIT_PER_S_IN_BYTES_PER_S


def build_topology(recipe: TopologyRecipe) -> Topology:
    """Nodes `cloud`, `edge-0`, `edge-0.cluster-1.device-2` and so on, with their sites, devices and links.

    Of a pool, the devices in clusters; all of them, and no cluster, where none has been formed yet.
    """
    sites: dict[str, Site] = {}
    nodes: dict[str, Node] = {}
    clusters = {} if is_unformed(recipe) else dict(_clusters(recipe))
    rows = pool_rows(recipe)

    def add(node_id: str, tier: Tier, site_id: str) -> None:
        profile = recipe.sites.get(site_id, SiteProfile())
        sites.setdefault(site_id, Site(site_id, profile.zone, profile.pue))
        row = rows.get(node_id)
        default: DeviceProfile = row or getattr(recipe, tier.value)
        access = _link("d2d", row.link) if row and row.link else None
        nodes[node_id] = Node(node_id, tier, site_id, _device(recipe.devices.get(node_id, default)), access)

    add("cloud", Tier.CLOUD, "cloud")
    for edge in edge_ids(recipe):
        add(edge, Tier.EDGE, edge)
        for node_id in _devices_of(edge, clusters, rows):
            add(node_id, Tier.END, f"{edge}.field")
    return Topology(sites, nodes, _links(recipe), clusters)


def edge_ids(recipe: TopologyRecipe) -> list[str]:
    """Of all edges, in order."""
    return [f"edge-{index}" for index in range(recipe.edges)]


def pool_rows(recipe: TopologyRecipe) -> dict[str, PoolRow]:
    """What the pool says of each of its devices, which are numbered edge by edge in the order of the rows."""
    rows: dict[str, PoolRow] = {}
    for edge in edge_ids(recipe):
        own = [row for row in recipe.pool if row.edge == edge for _ in range(row.count)]
        rows |= {f"{edge}.device-{index}": row for index, row in enumerate(own)}
    return rows


def cluster_counts(recipe: TopologyRecipe) -> list[int]:
    """How many clusters each edge has; nothing where forming is to say so."""
    if recipe.clusters:
        names = [cluster_id.partition(".cluster-")[0] for cluster_id in recipe.clusters]
        return [names.count(edge) for edge in edge_ids(recipe)]
    return [] if recipe.clusters_per_edge == "auto" else [recipe.clusters_per_edge] * recipe.edges


def is_unformed(recipe: TopologyRecipe) -> bool:
    """Whether clusters have yet to be formed of a pool."""
    return bool(recipe.pool) and not recipe.clusters


def compute_of(recipe: Recipe, node_id: str) -> NodeCompute:
    """What a node computes on."""
    return recipe.compute.nodes.get(
        node_id, NodeCompute(recipe.compute.device, recipe.compute.dtype, recipe.compute.threads)
    )


def _clusters(recipe: TopologyRecipe) -> Iterator[tuple[str, Cluster]]:
    """By id; of a formed pool as the recipe says, else as many as it says."""
    for cluster_id, node_ids in recipe.clusters.items():
        yield cluster_id, Cluster(cluster_id, cluster_id.partition(".")[0], node_ids)
    if recipe.pool or recipe.clusters_per_edge == "auto":
        return
    for edge in edge_ids(recipe):
        for cluster_id in (f"{edge}.cluster-{index}" for index in range(recipe.clusters_per_edge)):
            ids = (f"{cluster_id}.device-{index}" for index in range(recipe.devices_per_cluster))
            yield cluster_id, Cluster(cluster_id, edge, tuple(ids))


def _devices_of(edge: str, clusters: Mapping[str, Cluster], pool: Mapping[str, PoolRow]) -> Sequence[str]:
    if pool and not clusters:
        return [node_id for node_id in pool if node_id.startswith(f"{edge}.")]
    return [node_id for cluster in clusters.values() if cluster.edge_id == edge for node_id in cluster.node_ids]


def _device(profile: DeviceProfile) -> Device:
    return Device(int(profile.memory_gib * GIB), profile.gflops * GB, profile.idle_w, profile.busy_w)


def _links(recipe: TopologyRecipe) -> dict[LinkClass, Link]:
    profiles: dict[LinkClass, LinkProfile] = {
        "cloud_edge": recipe.cloud_edge,
        "edge_end": recipe.edge_end,
        "d2d": recipe.d2d,
    }
    return {name: _link(name, profile) for name, profile in profiles.items()}


def _link(name: LinkClass, profile: LinkProfile) -> Link:
    return Link(name, profile.rtt_ms / 1e3, profile.mbit_per_s * MBIT_PER_S_IN_BYTES_PER_S)
