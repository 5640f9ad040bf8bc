"""The topology: every node, link and cluster of a federation, and the questions one asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ecogen.records import LinkClass
from ecogen.topology.node import Cluster, Link, Node, Site, Tier, link_between

_CLASS_OF_TIERS: dict[frozenset[Tier], LinkClass] = {
    frozenset({Tier.CLOUD, Tier.EDGE}): "cloud_edge",
    frozenset({Tier.EDGE, Tier.END}): "edge_end",
    frozenset({Tier.END}): "d2d",
}


@dataclass(frozen=True)
class Topology:
    """One cloud, its edges, and the clusters of devices at each edge."""

    sites: Mapping[str, Site]
    nodes: Mapping[str, Node]
    links: Mapping[LinkClass, Link]
    clusters: Mapping[str, Cluster]

    @property
    def cloud_id(self) -> str:
        return next(node.node_id for node in self.nodes.values() if node.tier is Tier.CLOUD)

    @property
    def edge_ids(self) -> list[str]:
        return [node.node_id for node in self.nodes.values() if node.tier is Tier.EDGE]

    @property
    def end_ids(self) -> list[str]:
        return [node.node_id for node in self.nodes.values() if node.tier is Tier.END]

    def clusters_of(self, edge_id: str) -> list[Cluster]:
        """The clusters at one edge, in order."""
        return [cluster for cluster in self.clusters.values() if cluster.edge_id == edge_id]

    def cluster_of(self, node_id: str) -> Cluster:
        """The cluster of an end device."""
        return next(cluster for cluster in self.clusters.values() if node_id in cluster.node_ids)

    def parent_of(self, node_id: str) -> str | None:
        """Who a node reports to: the edge of a device, the cloud of an edge, nobody for the cloud."""
        match self.nodes[node_id].tier:
            case Tier.CLOUD:
                return None
            case Tier.EDGE:
                return self.cloud_id
            case Tier.END:
                return self.cluster_of(node_id).edge_id

    def link(self, sender_id: str, receiver_id: str) -> Link | None:
        """The link between two nodes, as slow as the slower one's access; None within a node, or to an operator."""
        if sender_id == receiver_id or not {sender_id, receiver_id} <= self.nodes.keys():
            return None
        sender, receiver = self.nodes[sender_id], self.nodes[receiver_id]
        link_class = _CLASS_OF_TIERS.get(frozenset({sender.tier, receiver.tier}))
        return None if link_class is None else link_between(sender, receiver, self.links[link_class])
