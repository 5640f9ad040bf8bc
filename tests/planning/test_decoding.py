"""A language model is cut by its bytes, and by how fast devices were seen to read them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ecogen.config import TopologyRecipe, build_topology
from ecogen.placement import Placement
from ecogen.planning.decoding import Weights, place_decoder, predicted_s, rates_of

WEIGHTS = Weights((100,) * 12, embedding=500, head=200, slabs=10)
TOPOLOGY = build_topology(TopologyRecipe(edges=1, clusters_per_edge=1, devices_per_cluster=3))
NODES = [TOPOLOGY.nodes[node_id] for node_id in next(iter(TOPOLOGY.clusters.values())).node_ids]


def blocks(placement: Placement) -> list[int]:
    return [sum(len(segment) for segment in placement.segments_of(node.node_id)) for node in NODES]


def test_a_head_counts_as_the_blocks_that_are_as_large() -> None:
    assert blocks(place_decoder(WEIGHTS, NODES)) in ([5, 5, 2], [5, 4, 3], [4, 5, 3])


def test_slow_devices_get_less() -> None:
    rates = {node.node_id: rate for node, rate in zip(NODES, (100, 400, 200), strict=True)}
    assert blocks(place_decoder(WEIGHTS, NODES, rates=rates)) == [2, 8, 2]


def test_rates_of_some_devices_say_nothing() -> None:
    rates = {NODES[0].node_id: 1.0}
    assert place_decoder(WEIGHTS, NODES, rates=rates) == place_decoder(WEIGHTS, NODES)


@pytest.mark.parametrize("labels", ["end", "start"])
def test_what_is_predicted_of_the_same_cuts_is_what_was_measured(labels: str) -> None:
    placement = place_decoder(WEIGHTS, NODES, labels)  # type: ignore[arg-type]
    seconds = {node.node_id: second for node, second in zip(NODES, (0.3, 0.1, 0.2), strict=True)}
    rates = rates_of(WEIGHTS, placement, seconds)
    assert predicted_s(WEIGHTS, placement, rates) == pytest.approx(0.3)
    better = place_decoder(WEIGHTS, NODES, labels, rates)  # type: ignore[arg-type]
    assert predicted_s(WEIGHTS, better, rates) < 0.23


def test_memory_comes_before_speed() -> None:
    rates = {node.node_id: rate for node, rate in zip(NODES, (1000, 1, 1), strict=True)}
    small = [replace(node, device=replace(node.device, memory_bytes=1100)) for node in NODES]
    assert blocks(place_decoder(WEIGHTS, small, rates=rates))[0] == 5  # 500 of the embedding, 110 a block
