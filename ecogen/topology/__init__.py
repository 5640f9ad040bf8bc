from ecogen.topology.graph import Topology
from ecogen.topology.node import Cluster, Device, Link, Node, Site, Tier

__all__ = ["Cluster", "Device", "Link", "Node", "Site", "Tier", "Topology"]
