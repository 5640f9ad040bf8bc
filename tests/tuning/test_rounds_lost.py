"""An edge's rounds that lose somebody: clusters, for a while or for good, and the edge itself in its second life."""

from __future__ import annotations

import asyncio
import math
import time
from pathlib import Path

import pytest
import torch

from ecogen.config import Aggregation
from ecogen.errors import CheckpointError, NodeLostError, ProtocolError, RunError
from ecogen.tuning.edge_state import EdgeState
from ecogen.tuning.messages import SyncOrder
from tests.runs import until
from tests.tuning.edges import FIRST_ATTEMPT, RECORD, Edge, tunables, values

# Clusters that fail.


async def test_a_cluster_that_lost_a_device_is_left_out(edge: Edge) -> None:
    edge.network.kill("far-1")
    state = await edge.run()
    assert values(state.tunables) == {1.0}
    (record,) = edge.round_records
    assert (record.members, record.missing, record.num_examples) == (("near",), ("far",), 30)
    assert edge.cluster_events == [("cluster_failed", "far", 0)]
    assert "'far-1' is lost" in edge.details("cluster_failed")[0]
    assert edge.members.ready_ids == ["near-0", "near-1", "far-0"]


async def test_a_cluster_that_is_back_takes_part_again_and_that_is_announced(edge: Edge) -> None:
    edge.network.kill("far-1")

    async def wait_for_the_others() -> None:
        """While the near cluster tunes, the far one fails and comes back."""
        edge.devices["near-0"].before_answer = None
        await until(lambda: edge.cluster_events, 2)
        await edge.arrive("far-1")

    edge.devices["near-0"].before_answer = wait_for_the_others
    state = await edge.run(rounds=3)
    assert values(state.tunables) == {5.0}  # 1 + 2 + 2
    assert [record.missing for record in edge.round_records] == [("far",), (), ()]
    assert edge.cluster_events == [("cluster_failed", "far", 0), ("cluster_formed", "far", 1)]


async def test_a_cluster_that_stays_away_is_missing_in_every_round_and_failed_once(edge: Edge) -> None:
    edge.network.kill("far-0")
    await edge.run(rounds=3)
    assert [record.missing for record in edge.round_records] == [("far",)] * 3
    assert edge.cluster_events == [("cluster_failed", "far", 0)]


async def test_a_device_that_misses_its_neighbour_is_not_lost_itself(edge: Edge) -> None:
    edge.devices["far-0"].problems = [NodeLostError("far-1", "it opened no stream")]
    edge.devices["far-1"].before_answer = asyncio.Event().wait
    await edge.run()
    assert edge.members.ready_ids == ["near-0", "near-1", "far-0"]
    assert [record.missing for record in edge.round_records] == [("far",)]


async def test_a_cluster_that_takes_too_long_is_left_out_and_may_try_the_next_round(edge: Edge) -> None:
    slow = edge.devices["far-1"]

    async def hang_once() -> None:
        slow.before_answer = None
        await asyncio.Event().wait()

    slow.before_answer = hang_once
    await edge.run(rounds=2, round_timeout_s=0.05)
    assert edge.details("cluster_failed") == ["not done in 0.05 s"]
    assert [record.missing for record in edge.round_records] == [("far",), ()]
    assert len(edge.members.ready_ids) == 4


@pytest.mark.parametrize("step", [math.nan, math.inf, torch.ones(3, 1)], ids=["nan", "inf", "another shape"])
@pytest.mark.parametrize("strategy", ["fedavg", "median"])
async def test_a_cluster_that_sends_what_cannot_be_averaged_is_left_out(
    edge: Edge, step: float | torch.Tensor, strategy: str
) -> None:
    edge.devices["far-1"].step = step
    state = await edge.run(rounds=2, aggregation=Aggregation(strategy=strategy))
    assert values(state.tunables) == {2.0}
    assert [record.missing for record in edge.round_records] == [("far",)] * 2
    assert "update of 'far' has" in edge.details("cluster_failed")[0]


async def test_a_round_that_all_clusters_failed_is_tried_again_from_the_same_tunables(edge: Edge) -> None:
    for node_id in ("near-1", "far-1"):
        edge.devices[node_id].problems = [ProtocolError("not now")] * 2
    state = await edge.run(rounds=2)
    assert values(state.tunables) == {4.0}
    assert [record.round_index for record in edge.round_records] == [0, 1]
    assert edge.devices["near-0"].rounds == [0, 0, 0, 1]


async def test_a_round_waits_for_a_cluster_to_come_back(edge: Edge) -> None:
    for node_id in ("near-0", "far-0"):
        edge.network.kill(node_id)
    running = asyncio.create_task(edge.run(rejoin_timeout_s=2))
    await until(lambda: len(edge.cluster_events) == 2, 2)
    assert not running.done()
    await edge.arrive("far-0")
    assert values((await running).tunables) == {5.0}
    assert edge.cluster_events[2:] == [("cluster_formed", "far", 0)]
    assert edge.round_records[0].missing == ("near",)


async def test_a_round_for_which_nobody_comes_back_says_so(edge: Edge) -> None:
    for node_id in ("near-0", "far-0"):
        edge.network.kill(node_id)
    with pytest.raises(RunError) as caught:
        await edge.run()
    assert str(caught.value) == (
        "edge: no cluster finished round 1: none came back within 0.03 s; "
        "see the devices' logs, bring them back, then --resume"
    )
    assert not edge.round_records
    assert not edge.path.exists()


async def test_a_round_that_always_fails_ends_with_its_reason(edge: Edge) -> None:
    for device in edge.devices.values():
        device.problems = [ProtocolError("an order of another version")] * 100
    with pytest.raises(RunError, match=r"round 1: \d+ tries failed, the last one since an order of another version"):
        await edge.run()
    assert len(edge.devices["near-0"].orders) > 1


async def test_what_is_not_the_transports_failure_ends_the_run_as_itself(edge: Edge) -> None:
    edge.devices["far-1"].problems = [CheckpointError("tunable 'x' should be (2,)")]
    with pytest.raises(CheckpointError, match="tunable 'x' should be"):
        await edge.run()


async def test_an_edge_begins_with_fewer_clusters_if_some_do_not_come_in_time(alone: Edge) -> None:
    await alone.arrive("near-0", "near-1", "far-0")
    assert values((await alone.run()).tunables) == {1.0}
    assert alone.round_records[0].missing == ("far",)


async def test_an_edge_waits_for_all_its_clusters_before_it_begins(alone: Edge) -> None:
    await alone.arrive("near-0", "near-1", "far-0")
    running = asyncio.create_task(alone.run(rejoin_timeout_s=2))
    await asyncio.sleep(0.01)
    assert not alone.devices["near-0"].orders
    await alone.arrive("far-1")
    assert values((await running).tunables) == {2.0}


async def test_every_attempt_has_a_larger_number_than_all_before_it(edge: Edge) -> None:
    for device in edge.devices.values():
        device.problems = [ProtocolError("not now")] * 2
    await edge.run(rounds=2)
    for device in edge.devices.values():
        attempts = [order.key.attempt for order in device.orders]
        assert len(attempts) == 4
        assert attempts == sorted(set(attempts))
        assert attempts[0] > FIRST_ATTEMPT
    assert len({tuple(o.key.attempt for o in device.orders) for device in edge.devices.values()}) == 1


# A second life.


async def test_a_resumed_edge_publishes_its_last_record_and_goes_on(edge: Edge) -> None:
    state = await edge.run(EdgeState(tunables(6.0), 3, None, RECORD), rounds=4)
    assert values(state.tunables) == {8.0}
    assert [record.round_index for record in edge.round_records] == [2, 3]
    assert edge.round_records[0] == RECORD
    assert edge.devices["near-0"].rounds == [3]


async def test_an_edge_that_died_after_a_round_ends_as_one_that_did_not(edge: Edge) -> None:
    whole = await edge.run(rounds=2)
    await edge.run(rounds=1)  # dies then
    resumed = await edge.run(EdgeState.load(edge.path), rounds=2)
    assert values(resumed.tunables) == values(whole.tunables)
    assert resumed.next_round == whole.next_round


async def test_an_edge_that_had_done_all_its_rounds_only_publishes_the_last(edge: Edge) -> None:
    await edge.run(EdgeState(tunables(6.0), 3, None, RECORD), rounds=3)
    assert edge.round_records == [RECORD]
    assert not edge.devices["near-0"].orders


async def test_a_resumed_edge_agrees_with_the_cloud_first_where_that_is_due(edge: Edge) -> None:
    cloud = await edge.have_cloud(10.0)
    state = await edge.run(EdgeState(tunables(6.0), 3, 40, RECORD), rounds=4)
    assert cloud.orders == [SyncOrder(2, 40)]
    assert cloud.sent == [{6.0}]
    assert values(state.tunables) == {12.0}


async def test_nothing_is_written_or_published_after_a_run_was_cancelled(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nodes share a process, the next life would read an old state and then find a newer one on disk."""
    save, near = EdgeState.save, edge.devices["near-0"]

    def save_slowly(state: EdgeState, path: Path) -> None:
        time.sleep(0.02)
        save(state, path)

    async def hang_in_the_second_round() -> None:
        if near.rounds == [0, 1]:
            await asyncio.Event().wait()

    monkeypatch.setattr(EdgeState, "save", save_slowly)
    near.before_answer = hang_in_the_second_round
    running = asyncio.create_task(edge.run(rounds=2))
    await until(lambda: near.rounds == [0, 1], 2)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    left = (edge.path.exists(), len(edge.round_records))
    await asyncio.sleep(0.05)
    assert (edge.path.exists(), len(edge.round_records)) == left
