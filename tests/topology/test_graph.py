"""Who stands where, who reports to whom, and over which link they talk."""

from __future__ import annotations

import pytest

from ecogen.config import TopologyRecipe, build_topology
from ecogen.topology import Link, Tier

TOPOLOGY = build_topology(TopologyRecipe(edges=2, clusters_per_edge=2, devices_per_cluster=3))
DEVICE = "edge-1.cluster-0.device-2"


def test_every_device_is_in_one_cluster_of_one_edge() -> None:
    in_clusters = [node for edge in TOPOLOGY.edge_ids for c in TOPOLOGY.clusters_of(edge) for node in c.node_ids]
    assert sorted(in_clusters) == sorted(TOPOLOGY.end_ids)
    assert TOPOLOGY.cluster_of(DEVICE).cluster_id == "edge-1.cluster-0"


def test_everyone_but_the_cloud_has_a_parent() -> None:
    assert TOPOLOGY.parent_of("cloud") is None
    assert TOPOLOGY.parent_of("edge-1") == "cloud"
    assert TOPOLOGY.parent_of(DEVICE) == "edge-1"


@pytest.mark.parametrize(
    ("one", "other", "link_class"),
    [
        ("cloud", "edge-0", "cloud_edge"),
        ("edge-1", DEVICE, "edge_end"),
        (DEVICE, "edge-1.cluster-0.device-0", "d2d"),
        (DEVICE, DEVICE, None),
        ("cloud", DEVICE, None),
        ("cloud", "operator", None),
    ],
)
def test_the_link_between_two_nodes_is_the_same_both_ways(one: str, other: str, link_class: str | None) -> None:
    links = [TOPOLOGY.link(one, other), TOPOLOGY.link(other, one)]
    assert [link and link.link_class for link in links] == [link_class] * 2


def test_a_message_takes_half_a_round_trip_and_its_bytes() -> None:
    assert Link("d2d", 0.004, 1e6).seconds(500_000) == pytest.approx(0.502)


def test_each_node_has_a_site_and_each_site_a_node() -> None:
    assert {node.site_id for node in TOPOLOGY.nodes.values()} == TOPOLOGY.sites.keys()
    assert {TOPOLOGY.nodes[i].tier for i in ("cloud", "edge-0", DEVICE)} == {Tier.CLOUD, Tier.EDGE, Tier.END}
