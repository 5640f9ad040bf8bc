"""The search equals trying everything, and its errors say what would fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecogen.config import TunedBlock
from ecogen.errors import PlacementError
from ecogen.placement import Labels, Segment, place, segments_held
from ecogen.planning import cost
from ecogen.planning.cost import ModelShape
from ecogen.planning.search import Plan, plan
from ecogen.topology import Device, Link, Node, Tier

SHAPE = ModelShape(6, 64, 128, 17, 49, 10, tuned=(TunedBlock(8, 4, ("q_proj", "v_proj")),) * 6)
LINK = Link("d2d", rtt_s=0.004, bytes_per_s=1e7)
BLOCK = cost.memory_bytes(SHAPE, [Segment(1, 2)], 1)


def nodes(memories: Sequence[int], speeds: Sequence[float] | None = None) -> list[Node]:
    speeds = speeds or [1e9] * len(memories)
    return [
        Node(f"edge-0.cluster-0.device-{i}", Tier.END, "field", Device(memory, speed, 0.7, 2.3))
        for i, (memory, speed) in enumerate(zip(memories, speeds, strict=True))
    ]


def all_plans(shape: ModelShape, devices: Sequence[Node], labels: Labels) -> list[Plan]:
    """Every cut list that fits."""
    plans = []
    for cuts in combinations(range(1, shape.num_blocks), len(devices) - 1):
        try:
            plans.append(plan(shape, devices, LINK, labels, cuts=cuts))
        except PlacementError:
            continue
    return plans


@given(
    st.lists(st.tuples(st.integers(BLOCK // 2, 6 * BLOCK), st.sampled_from([1e8, 3e8, 1e9])), min_size=1, max_size=4),
    st.sampled_from(["start", "end"]),
    st.integers(0, 6),
)
def test_the_search_equals_brute_force(hardware: list[tuple[int, float]], labels: Labels, first_tunable: int) -> None:
    shape = replace(SHAPE, tuned=(TunedBlock(),) * first_tunable + SHAPE.tuned[first_tunable:])
    devices = nodes([memory for memory, _ in hardware], [speed for _, speed in hardware])
    every = all_plans(shape, devices, labels)
    if not every:
        with pytest.raises(PlacementError, match=r"over\); it can"):
            plan(shape, devices, LINK, labels)
        return
    found = plan(shape, devices, LINK, labels)
    assert found.bottleneck_s == min(other.bottleneck_s for other in every)
    assert all(n.device.memory_bytes >= m for n, m in zip(devices, found.memory_bytes, strict=True))


def test_the_placement_is_the_one_of_its_cuts() -> None:
    devices = nodes([10**9] * 3)
    found = plan(SHAPE, devices, LINK)
    assert found.placement == place([node.node_id for node in devices], found.cuts, 6, "start")
    assert found.placement.start_id == found.placement.visits[-1].node_id == devices[0].node_id


def test_a_slow_device_gets_fewer_blocks() -> None:
    found = plan(SHAPE, nodes([10**9] * 2, [1e8, 5e8]), replace(LINK, rtt_s=0.0, bytes_per_s=1e12))
    assert found.cuts == (1,)


def test_one_device_costs_what_the_formula_says() -> None:
    whole = Segment(0, 6, True, True)
    found = plan(SHAPE, nodes([10**9]), LINK, microbatch_size=5)
    flops = cost.forward_flops(SHAPE, whole) + cost.backward_flops(SHAPE, whole)
    assert found.stage_s == (5 * flops / 1e9,)
    assert found.traverse_s == found.bottleneck_s


def test_a_stage_pays_for_what_it_sends() -> None:
    devices = nodes([10**9] * 2, [1e18] * 2)
    hop_s, head_s = LINK.seconds(cost.activation_bytes(SHAPE, 3)), LINK.seconds(cost.activation_bytes(SHAPE, 6))
    u_shaped_s = hop_s + head_s
    assert plan(SHAPE, devices, LINK, "start", cuts=[3]).stage_s == pytest.approx((u_shaped_s, u_shaped_s), rel=1e-5)
    assert plan(SHAPE, devices, LINK, "end", cuts=[3]).stage_s == pytest.approx((hop_s, hop_s), rel=1e-5)
    serving = plan(SHAPE, devices, LINK, "end", cuts=[3], tunes=False)
    assert serving.stage_s == pytest.approx((hop_s, 0), rel=1e-5, abs=1e-9)


def test_given_cuts_that_do_not_fit_say_which_cut_does() -> None:
    devices = nodes([10 * BLOCK, int(2.5 * BLOCK), 10 * BLOCK])
    with pytest.raises(PlacementError) as problem:
        plan(SHAPE, devices, LINK, cuts=[1, 5])
    assert str(problem.value) == (
        "blocks 1..5: needs 954 kB but node 'edge-0.cluster-0.device-1' has 716 kB (238 kB over); "
        "it can hold at most 2 blocks; move the cut from 5 to 3 or add a device"
    )
    assert plan(SHAPE, devices, LINK, cuts=[1, 3])


def test_the_lower_cut_moves_where_the_last_device_is_full() -> None:
    with pytest.raises(PlacementError, match=r"at most 2 blocks; move the cut from 1 to 4 or add a device"):
        plan(SHAPE, nodes([20 * BLOCK, int(2.2 * BLOCK)]), LINK, cuts=[1])


def test_where_one_cut_is_not_enough_it_names_all() -> None:
    devices = nodes([20 * BLOCK, int(1.5 * BLOCK), int(1.5 * BLOCK)])
    with pytest.raises(PlacementError, match=r"at most 1 block; cuts \[4, 5\] fit, or add a device"):
        plan(SHAPE, devices, LINK, cuts=[1, 3])


def test_without_room_anywhere_it_says_so() -> None:
    with pytest.raises(PlacementError, match=r"device-1' has .* no cuts fit these devices: add a device or memory"):
        plan(SHAPE, nodes([3 * BLOCK, int(1.5 * BLOCK)]), LINK)
    with pytest.raises(PlacementError, match=r"embedding \+ blocks 0\.\.1 and head: .* cannot hold even one"):
        plan(SHAPE, nodes([BLOCK // 2, 9 * BLOCK]), LINK)


def test_more_devices_than_blocks_or_none() -> None:
    with pytest.raises(PlacementError, match=r"^7 devices cannot share 6 blocks, .* use at most 6 devices a cluster"):
        plan(SHAPE, nodes([10**9] * 7), LINK)
    with pytest.raises(PlacementError, match="no device"):
        plan(SHAPE, [], LINK)


def test_cuts_that_do_not_divide_the_blocks() -> None:
    with pytest.raises(PlacementError, match="do not divide 6 blocks"):
        plan(SHAPE, nodes([10**9] * 2), LINK, cuts=[6])


def test_a_stage_pays_for_the_slower_end_of_each_link() -> None:
    """Half of each one's round trip and the lesser bandwidth, to the neighbour that each message goes to."""
    access = [Link("d2d", 0.010, 1e6), None, Link("d2d", 0.0, 1e9)]
    devices = [replace(node, access=own) for node, own in zip(nodes([10**9] * 3, [1e18] * 3), access, strict=True)]
    between, of_head = cost.activation_bytes(SHAPE, 2), cost.activation_bytes(SHAPE, 6)
    first_second = (0.010 + 0.004) / 4 + between / 1e6  # half of the round trip, which is the sum of both halves
    second_third = (0.004 + 0.0) / 4 + between / 1e7
    third_first = (0.0 + 0.010) / 4 + of_head / 1e6
    found = plan(SHAPE, devices, LINK, "start", cuts=[2, 4])
    expected = (first_second + third_first, second_third + first_second, third_first + second_third)
    assert found.stage_s == pytest.approx(expected, rel=1e-5)
    assert found.sending_s == pytest.approx(expected)


@given(
    st.lists(st.integers(BLOCK, 14 * BLOCK), min_size=2, max_size=4),
    st.integers(2, 4),
    st.sampled_from(["start", "end"]),
)
def test_other_owners_hold_what_the_start_holds(memories: list[int], owners: int, labels: Labels) -> None:
    """The search equals trying every cut, each device counted with all that its turns need."""
    devices, ids = nodes(memories, [1e8, 4e8, 1e9, 2e8][: len(memories)]), range(len(memories))
    fitting = []
    for cuts in combinations(range(1, 6), len(devices) - 1):
        placement = place([node.node_id for node in devices], cuts, 6, labels)
        held = [segments_held(placement, owners, node.node_id) for node in devices]
        if all(cost.memory_bytes(SHAPE, held[i], 1) <= memories[i] for i in ids):
            fitting.append(plan(SHAPE, devices, LINK, labels, cuts=cuts).bottleneck_s)
    if fitting:
        found = plan(SHAPE, devices, LINK, labels, owners=owners)
        assert found.bottleneck_s == min(fitting)
        held = [segments_held(found.placement, owners, node.node_id) for node in devices]
        assert found.memory_bytes == tuple(cost.memory_bytes(SHAPE, segments, 1) for segments in held)
    else:
        with pytest.raises(PlacementError, match=r"over\); it can"):
            plan(SHAPE, devices, LINK, labels, owners=owners)


def test_an_owner_that_cannot_take_its_turn_is_told_so() -> None:
    with pytest.raises(PlacementError, match=r"device-1' has .*it takes turns as the start: lower data\.owners"):
        plan(SHAPE, nodes([30 * BLOCK, 2 * BLOCK]), LINK, owners=2)
