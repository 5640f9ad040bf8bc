"""How a federation is, as its cloud tells."""

from __future__ import annotations

import time

from ecogen.config import Recipe, TopologyRecipe
from ecogen.node.context import ProgressReport
from ecogen.node.status import status_of
from ecogen.records import EventRecord

PROGRESS = ProgressReport("tuning", 0, 1)
DEVICE = "edge-0.cluster-0.device-0"


def test_when_nodes_were_heard_of_is_what_those_say_whom_they_tell() -> None:
    """Records may be old; and the cloud, of which there are none yet, is ready: it answers."""
    recipe = Recipe(topology=TopologyRecipe(edges=1, clusters_per_edge=1, devices_per_cluster=2))
    joined_s = time.time() - 1000
    records = [EventRecord("joined", node_id, time_s=joined_s) for node_id in ("edge-0", DEVICE)]
    status = status_of(recipe, PROGRESS, records, {}, {"edge-0": 1.0, DEVICE: 2.0}, finished=False)
    nodes = {node.node_id: node for node in status.presences}
    assert (nodes["cloud"].state, nodes["cloud"].time_s) == ("ready", status.time_s)
    assert [round(status.time_s - nodes[node_id].time_s) for node_id in ("edge-0", DEVICE)] == [1, 2]
    assert nodes["edge-0.cluster-0.device-1"].time_s == 0
    silent = status_of(recipe, PROGRESS, records, {}, {}, finished=False)
    assert {node.time_s for node in silent.presences} == {silent.time_s, joined_s, 0}
