"""What a recipe says of tuning is in the memory that a cluster's plan needs."""

from __future__ import annotations

from typing import Any

import pytest

from ecogen.config import from_table
from ecogen.engines.forming import announced_shape
from ecogen.planning.clusters import plan_clusters, tunable_states
from ecogen.planning.cost import tunable_bytes

SGD = {"optimizer": "sgd"}


@pytest.mark.parametrize(
    ("recipe", "states"),
    [
        ({}, 3),
        ({"tuning": SGD}, 1),
        ({"tuning": {"proximal": 0.1}}, 4),
        ({"tuning": SGD, "aggregation": {"strategy": "scaffold"}}, 3),
        ({"tuning": {"unlabelled": {"method": "fixmatch"}}}, 3),
        ({"tuning": {"unlabelled": {"method": "fixmatch", "teacher": "edge"}}}, 4),
        ({"wire": {"updates": "int8"}}, 4),
        ({"tuning": {"proximal": 0.1}, "aggregation": {"strategy": "scaffold"}}, 6),
    ],
    ids=str,
)
def test_each_state_of_a_tunable_needs_as_much_memory_as_the_tunable(recipe: dict[str, Any], states: int) -> None:
    own, base = from_table(recipe), from_table({})
    assert tunable_states(own) == states
    shape = announced_shape(own)
    for cluster_id, plan in plan_clusters(own, shape).items():
        plain = plan_clusters(base, shape)[cluster_id]
        assert plan.placement == plain.placement
        more = sum(plan.memory_bytes) - sum(plain.memory_bytes)
        assert more == (states - 3) * sum(tunable_bytes(shape, visit.segment) for visit in plan.placement)
