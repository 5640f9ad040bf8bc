"""Who stands where, who reports to whom, and over which link they talk."""

from __future__ import annotations

import pytest

from ecogen.config import LinkProfile, PoolRow, TopologyRecipe, build_topology
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


def test_a_link_is_as_slow_as_the_slower_end() -> None:
    """The round trip is half of each end's, the bandwidth the lesser; the class, and so its energy, stays."""
    rows = (PoolRow(count=2), PoolRow(link=LinkProfile(rtt_ms=20, mbit_per_s=8)), PoolRow(edge="edge-1"))
    topology = build_topology(TopologyRecipe(clusters_per_edge=1, pool=rows))
    usual = topology.links["d2d"]
    assert topology.link("edge-0.device-0", "edge-0.device-1") == usual
    slow = topology.link("edge-0.device-0", "edge-0.device-2")
    assert slow == topology.link("edge-0.device-2", "edge-0.device-0")
    assert slow == Link("d2d", pytest.approx((0.020 + usual.rtt_s) / 2), 1e6)  # type: ignore[arg-type]
    to_edge = topology.link("edge-0", "edge-0.device-2")
    assert to_edge == Link("edge_end", pytest.approx((0.020 + 0.008) / 2), 1e6)  # type: ignore[arg-type]


def test_a_formed_pool_has_the_devices_of_its_clusters_and_no_others() -> None:
    rows = (PoolRow(count=3, gflops=7), PoolRow(edge="edge-1"), PoolRow(gflops=9))
    pool = TopologyRecipe(pool=rows, clusters_per_edge=1)
    assert build_topology(pool).end_ids == [*(f"edge-0.device-{index}" for index in range(4)), "edge-1.device-0"]
    clusters = {"edge-0.cluster-0": ("edge-0.device-3", "edge-0.device-1"), "edge-1.cluster-0": ("edge-1.device-0",)}
    topology = build_topology(TopologyRecipe(pool=rows, clusters=clusters))
    assert topology.end_ids == ["edge-0.device-3", "edge-0.device-1", "edge-1.device-0"]
    assert [topology.nodes[node_id].device.flops_per_s for node_id in topology.end_ids] == [9e9, 7e9, 50e9]
    assert topology.parent_of("edge-1.device-0") == "edge-1"
