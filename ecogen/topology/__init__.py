from ecogen.topology.graph import Topology
from ecogen.topology.node import Cluster, Device, Link, Node, Site, Tier, link_between

__all__ = ["Cluster", "Device", "Link", "Node", "Site", "Tier", "Topology", "link_between"]
