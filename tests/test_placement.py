"""Placements: every block once and in order, whoever starts."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ecogen.errors import PlacementError
from ecogen.placement import Placement, Segment, Visit, neighbours_of, place, rotations, segments_held


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    num_blocks = draw(st.integers(1, 8))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, num_blocks - 1)), max_size=4))) if num_blocks > 1 else []
    labels = draw(st.sampled_from(["start", "end"]))
    return place([f"d{index}" for index in range(len(cuts) + 1)], cuts, num_blocks, labels)


@given(placements(), st.data())
def test_every_rotation_holds_the_whole_model_once_and_in_order(placement: Placement, data: st.DataObject) -> None:
    num_owners = data.draw(st.integers(1, len(placement.node_ids)))
    for owner_id, route in zip(placement.node_ids, rotations(placement, num_owners), strict=False):
        assert route.start_id == owner_id
        assert [block for visit in route for block in visit.segment.blocks] == list(range(placement.num_blocks))
        assert [visit.segment.has_embedding for visit in route].count(True) == 1
        assert [visit.segment.has_head for visit in route].count(True) == 1


@given(placements(), st.data())
def test_a_node_holds_all_that_any_turn_asks_of_it_and_knows_all_whom_it_talks_to(
    placement: Placement, data: st.DataObject
) -> None:
    num_owners = data.draw(st.integers(1, len(placement.node_ids)))
    for route in rotations(placement, num_owners):
        for visit in route:
            assert visit.segment in segments_held(placement, num_owners, visit.node_id)
        for here, there in pairwise(visit.node_id for visit in route):
            if here != there:
                assert there in neighbours_of(placement, num_owners, here)
                assert here in neighbours_of(placement, num_owners, there)
        for node_id in route.node_ids:
            if node_id != route.start_id:
                assert route.start_id in neighbours_of(placement, num_owners, node_id)


def test_labels_decide_where_the_head_is() -> None:
    assert place(["a", "b"], [1], 2, "start").visits[-1].node_id == "a"
    assert place(["a", "b"], [1], 2, "end").visits[-1].node_id == "b"
    assert len(place(["a"], [], 2, "start")) == 1


@given(st.integers(1, 5), st.lists(st.integers(-1, 6), max_size=4), st.integers(1, 5))
def test_cuts_that_do_not_divide_the_blocks_are_refused(num_nodes: int, cuts: list[int], num_blocks: int) -> None:
    bounds = [0, *cuts, num_blocks]
    assume(len(cuts) != num_nodes - 1 or any(a >= b for a, b in pairwise(bounds)))
    with pytest.raises(PlacementError, match=f"{num_nodes - 1} rising cuts between 1 and {num_blocks - 1}"):
        place([f"d{index}" for index in range(num_nodes)], cuts, num_blocks)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "starts with the embedding"),
        ([Segment(0, 2, has_head=True)], "starts with the embedding"),
        ([Segment(0, 1, True), Segment(1, 2)], "ends with the head"),
        ([Segment(0, 1, True), Segment(2, 3, has_head=True)], "1..2 are missing"),
        ([Segment(0, 1, True), Segment(1, 2, True), Segment(2, 2, has_head=True)], "one embedding"),
    ],
)
def test_a_placement_with_something_missing_or_double_is_refused(segments: list[Segment], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        Placement(tuple(Visit("a", segment) for segment in segments))


def test_a_segment_says_what_it_is() -> None:
    assert str(Segment(0, 2, has_embedding=True)) == "embedding + blocks 0..2"
    assert str(Segment(2, 2, has_head=True)) == "head"
    assert str(Segment(1, 1)) == "nothing"
    assert len(Segment(1, 4)) == 3
