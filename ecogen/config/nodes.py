"""The nodes that a recipe asks for: their ids, places, hardware and links."""

from __future__ import annotations

from ecogen.config.schema import DeviceProfile, LinkProfile, NodeCompute, Recipe, SiteProfile, TopologyRecipe
from ecogen.records import LinkClass
from ecogen.topology import Cluster, Device, Link, Node, Site, Tier, Topology
from ecogen.units import GB, GIB, MBIT_PER_S_IN_BYTES_PER_S


def build_topology(recipe: TopologyRecipe) -> Topology:
    """Nodes `cloud`, `edge-0`, `edge-0.cluster-1.device-2` and so on, with their sites, devices and links."""
    sites: dict[str, Site] = {}
    nodes: dict[str, Node] = {}
    clusters: dict[str, Cluster] = {}

    def add(node_id: str, tier: Tier, site_id: str) -> None:
        profile = recipe.sites.get(site_id, SiteProfile())
        sites.setdefault(site_id, Site(site_id, profile.zone, profile.pue))
        default: DeviceProfile = getattr(recipe, tier.value)
        nodes[node_id] = Node(node_id, tier, site_id, _device(recipe.devices.get(node_id, default)))

    add("cloud", Tier.CLOUD, "cloud")
    for edge in (f"edge-{index}" for index in range(recipe.edges)):
        add(edge, Tier.EDGE, edge)
        for cluster in (f"{edge}.cluster-{index}" for index in range(recipe.clusters_per_edge)):
            ids = tuple(f"{cluster}.device-{index}" for index in range(recipe.devices_per_cluster))
            clusters[cluster] = Cluster(cluster, edge, ids)
            for node_id in ids:
                add(node_id, Tier.END, f"{edge}.field")
    return Topology(sites, nodes, _links(recipe), clusters)


def compute_of(recipe: Recipe, node_id: str) -> NodeCompute:
    """What a node computes on."""
    return recipe.compute.nodes.get(node_id, NodeCompute(recipe.compute.device, recipe.compute.dtype))


def _device(profile: DeviceProfile) -> Device:
    return Device(int(profile.memory_gib * GIB), profile.gflops * GB, profile.idle_w, profile.busy_w)


def _links(recipe: TopologyRecipe) -> dict[LinkClass, Link]:
    profiles: dict[LinkClass, LinkProfile] = {
        "cloud_edge": recipe.cloud_edge,
        "edge_end": recipe.edge_end,
        "d2d": recipe.d2d,
    }
    return {
        name: Link(name, profile.rtt_ms / 1e3, profile.mbit_per_s * MBIT_PER_S_IN_BYTES_PER_S)
        for name, profile in profiles.items()
    }
