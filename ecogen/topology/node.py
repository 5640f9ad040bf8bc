"""Sites, devices and links: the places and things a federation is made of, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ecogen.records import LinkClass


class Tier(StrEnum):
    """Where a node stands. Ranges of blocks say `stop`, since `END` is a tier."""

    CLOUD = "cloud"
    EDGE = "edge"
    END = "end"


@dataclass(frozen=True, slots=True)
class Site:
    """A place with one grid zone and one power usage effectiveness."""

    site_id: str
    zone: str
    pue: float


@dataclass(frozen=True, slots=True)
class Device:
    """Hardware: memory, peak FLOP/s, and watts of one core's share, idle and busy.

    `busy_w` is the power while one thread computes, `idle_w` while it waits.
    """

    memory_bytes: int
    flops_per_s: float
    idle_w: float
    busy_w: float


@dataclass(frozen=True, slots=True)
class Link:
    """A directed path between two classes of nodes.

    Attributes:
        rtt_s: round-trip time.
        bytes_per_s: bandwidth of one direction.
    """

    link_class: LinkClass
    rtt_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        """One way: RTT/2 + bits / R (`reference` formula "link time")."""
        return self.rtt_s / 2 + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Node:
    """One process on a device at a site.

    Attributes:
        access: what connects this device with all others; None for what is usual of its links' class.
    """

    node_id: str
    tier: Tier
    site_id: str
    device: Device
    access: Link | None = None


def link_between(one: Node, other: Node, usual: Link) -> Link:
    """The link between two nodes: half of each one's round trip, and the bandwidth of the slower.

    Args:
        usual: of their class; a node without an access link of its own is connected by one like that.
    """
    here, there = one.access or usual, other.access or usual
    rtt_s, bytes_per_s = (here.rtt_s + there.rtt_s) / 2, min(here.bytes_per_s, there.bytes_per_s)
    return Link(usual.link_class, rtt_s, bytes_per_s)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes that together hold one copy of the model, in order; the first one starts."""

    cluster_id: str
    edge_id: str
    node_ids: tuple[str, ...]
