"""FedBuff: clusters that do not wait for each other, with arrivals in an order that the test decides.

Each device adds a number to what it is sent: near 1 with 30 examples, far 5 with 10.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecogen.config import Aggregation
from ecogen.errors import CheckpointError, NodeLostError, ProtocolError, RunError
from ecogen.tuning import buffer as buffers
from ecogen.tuning.buffer import move
from ecogen.tuning.edge_state import Counted, EdgeState
from tests.runs import until
from tests.tuning.edges import FIRST_ATTEMPT, Edge, tunables, values

STEPS, EXAMPLES = {"near": 1.0, "far": 5.0}, {"near": 30, "far": 10}


class Gates:
    """Holds back what clusters answer until the test lets it pass."""

    def __init__(self, edge: Edge, *clusters: str) -> None:
        self._devices = {cluster: edge.devices[f"{cluster}-0"] for cluster in clusters}
        self._open = {cluster: asyncio.Semaphore(0) for cluster in clusters}
        for cluster, device in self._devices.items():
            device.before_answer = self._open[cluster].acquire

    async def pass_one(self, cluster: str, *, is_last: bool = False) -> None:
        """One answer of a cluster; waits until the cluster has its next order, and so the edge its answer."""
        device = self._devices[cluster]
        await until(lambda: device.orders, 2)
        num_orders = len(device.orders)
        self._open[cluster].release()
        if not is_last:
            await until(lambda: len(device.orders) > num_orders, 2)


async def after_arrivals(edge: Edge, order: Sequence[str], spec: Aggregation, rounds: int) -> EdgeState:
    gates = Gates(edge, "near", "far")
    running = asyncio.create_task(edge.run(aggregation=spec, rounds=rounds))
    for index, cluster in enumerate(order):
        await gates.pass_one(cluster, is_last=index + 1 == len(order))
    return await running


def published(order: Sequence[str], size: int, rate: float) -> float:
    """Nguyen et al. 2022, Algorithm 1, of one number, on given arrivals; differences weigh as their examples."""
    w, version = 0.0, 0
    begun = dict.fromkeys(STEPS, version)
    buffer = []
    for cluster in order:
        buffer.append((STEPS[cluster] / math.sqrt(1 + version - begun[cluster]), EXAMPLES[cluster]))
        if len(buffer) == size:
            w += rate * sum(d * k for d, k in buffer) / sum(k for _, k in buffer)
            version, buffer = version + 1, []
        begun[cluster] = version
    return w


@given(st.lists(st.sampled_from(["near", "far"]), min_size=4, max_size=8), st.integers(1, 2), st.sampled_from([1, 0.5]))
@settings(max_examples=12)
def test_it_is_algorithm_1_on_given_arrivals(order: list[str], size: int, rate: float) -> None:
    order = order[: len(order) // size * size]

    async def run() -> EdgeState:
        with tempfile.TemporaryDirectory() as folder:
            edge = Edge(Path(folder))
            await edge.arrive(*edge.devices)
            spec = Aggregation(buffer=size, server_rate=rate)
            try:
                return await after_arrivals(edge, order, spec, len(order) // size)
            finally:
                edge.worker.close()

    state = asyncio.run(run())
    torch.testing.assert_close(dict(state.tunables), tunables(published(order, size, rate)), rtol=1e-5, atol=0)
    assert {cluster: counted.times for cluster, counted in state.counted.items()} == {
        cluster: order.count(cluster) for cluster in set(order)
    }


@given(st.integers(0, 9), st.integers(0, 100))
def test_a_fresh_update_stays_bit_by_bit_and_a_stale_one_counts_less(staleness: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    answered, begun, now = ({"a": torch.randn(5, generator=generator)} for _ in range(3))
    assert torch.equal(move(answered, begun, begun, 0)["a"], answered["a"])
    truth = now["a"] + (answered["a"] - begun["a"]) / (1 + staleness) ** 0.5
    torch.testing.assert_close(move(answered, begun, now, staleness)["a"], truth)


async def test_the_others_do_not_wait_for_a_slow_cluster_and_what_it_sends_late_still_counts(edge: Edge) -> None:
    spec = Aggregation(buffer=1)
    gates = Gates(edge, "far", "near")
    running = asyncio.create_task(edge.run(aggregation=spec, rounds=4))
    for _ in range(3):
        await gates.pass_one("near")
    assert [values(state.tunables) for state in edge.saved if state] == [{1.0}, {2.0}, {3.0}]
    await gates.pass_one("far", is_last=True)
    (value,) = values((await running).tunables)
    assert value == pytest.approx(3 + 5 / math.sqrt(1 + 3))
    assert [(r.members, r.missing, r.num_examples) for r in edge.round_records] == [
        *[(("near",), (), 30)] * 3,
        (("far",), (), 10),
    ]


async def test_each_attempt_of_a_cluster_has_the_next_draw_and_a_number_of_its_own(edge: Edge) -> None:
    await after_arrivals(edge, ["near", "near", "far", "near"], Aggregation(buffer=2), 2)
    near, far = (edge.devices[f"{cluster}-1"].orders for cluster in STEPS)
    assert [(o.key.round_index, o.draw, o.counted) for o in far] == [(0, 0, None), (1, 1, None)]
    # the second of near's fills the first buffer, and so waits for the round that it brings about
    assert [(o.key.round_index, o.draw) for o in near] == [(0, 0), (0, 1), (1, 2)]
    attempts = [order.key.attempt for order in (*near, *far)]
    assert len(set(attempts)) == len(attempts)
    assert min(attempts) > FIRST_ATTEMPT


async def test_examples_of_a_cluster_that_came_twice_are_recorded_once(edge: Edge) -> None:
    state = await after_arrivals(edge, ["near", "near"], Aggregation(buffer=2), 1)
    (record,) = edge.round_records
    assert (record.members, record.num_examples) == (("near",), 30)
    assert values(state.tunables) == {1.0}


async def test_a_lost_device_fails_its_own_cluster_only_until_it_is_back(edge: Edge) -> None:
    gates = Gates(edge, "near")
    edge.network.kill("far-1")
    running = asyncio.create_task(edge.run(aggregation=Aggregation(buffer=1), rounds=3))
    await gates.pass_one("near")
    assert edge.cluster_events == [("cluster_failed", "far", 0)]
    await edge.arrive("far-1")
    await until(lambda: len(edge.round_records) >= 2, 2)
    await gates.pass_one("near", is_last=True)
    state = await running
    assert edge.cluster_events == [("cluster_failed", "far", 0), ("cluster_formed", "far", 1)]
    assert [record.missing for record in edge.round_records] == [("far",), (), ()]
    assert state.counted.keys() == {"near", "far"}


async def test_an_edge_killed_with_a_half_full_buffer_has_those_attempts_done_again(edge: Edge) -> None:
    gates = Gates(edge, "near", "far")
    running = asyncio.create_task(edge.run(aggregation=Aggregation(buffer=2), rounds=2))
    for cluster in ("near", "far", "near"):
        await gates.pass_one(cluster)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    saved = EdgeState.load(edge.path)
    assert (saved.next_round, values(saved.tunables)) == (1, {2.0})
    assert saved.counted == {"near": Counted(FIRST_ATTEMPT + 1, 1), "far": Counted(FIRST_ATTEMPT + 2, 1)}
    draws = [order.draw for order in edge.devices["near-0"].orders]
    rounds = edge.rounds(saved, Aggregation(buffer=2), rounds=2)
    resumed = asyncio.create_task(rounds.run())
    await until(lambda: len(edge.devices["near-0"].orders) > len(draws), 2)
    order = edge.devices["near-0"].orders[-1]
    assert (draws, order.draw, order.counted) == ([0, 1, 2], 1, FIRST_ATTEMPT + 1)
    await gates.pass_one("near")
    await gates.pass_one("far", is_last=True)
    await resumed
    assert values(rounds.state.tunables) == {4.0}  # 2 + (30 * 1 + 10 * 5) / 40, both fresh


async def test_whoever_fills_the_buffer_goes_on_from_what_the_cloud_answered(edge: Edge) -> None:
    cloud = await edge.have_cloud(10.0)
    edge.network.kill("far-0")
    state = await edge.run(aggregation=Aggregation(buffer=1), rounds=2, cloud_every=1)
    assert cloud.sent == [{1.0}, {11.0}]
    assert values(state.tunables) == {10.0}


@pytest.mark.parametrize("size", [1, 2])
async def test_what_is_under_way_after_the_last_round_is_broken_off(edge: Edge, size: int) -> None:
    ended: list[str] = []

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("far-1")

    edge.devices["far-1"].before_answer = hang
    state = await edge.run(aggregation=Aggregation(buffer=size), rounds=2)
    assert values(state.tunables) == {2.0}
    assert edge.devices["far-1"].rounds == [0]
    assert ended == ["far-1"]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_PAUSE_S", 0.001)


@pytest.mark.usefixtures("hasty")
async def test_a_run_in_which_every_attempt_fails_ends_with_the_reason(edge: Edge) -> None:
    for device in edge.devices.values():
        device.problems = [ProtocolError("an order of another version")] * 100
    # Both clusters try at once: the other's try may be under way when the twentieth fails.
    with pytest.raises(RunError, match=r"round 1: 2[01] tries failed, the last one since an order of another version"):
        await edge.run(aggregation=Aggregation(buffer=1))


@pytest.mark.usefixtures("hasty")
async def test_a_cluster_that_always_fails_does_not_end_the_run_of_the_others(edge: Edge) -> None:
    edge.devices["far-0"].problems = [ProtocolError("not now")] * 1000
    gates = Gates(edge, "near")
    running = asyncio.create_task(edge.run(aggregation=Aggregation(buffer=1), rounds=1))
    await until(lambda: len(edge.devices["far-0"].orders) > 30, 3)
    await gates.pass_one("near", is_last=True)
    assert values((await running).tunables) == {1.0}


async def test_an_edge_to_which_nobody_comes_back_says_so(edge: Edge) -> None:
    for node_id in ("near-0", "far-0"):
        edge.network.kill(node_id)
    with pytest.raises(RunError, match=r"no cluster finished round 1: none came back within 0\.03 s"):
        await edge.run(aggregation=Aggregation(buffer=1))


async def test_what_is_not_the_transports_failure_ends_the_run_as_itself(edge: Edge) -> None:
    edge.devices["far-1"].problems = [CheckpointError("tunable 'x' should be (2,)")]
    with pytest.raises(CheckpointError, match="tunable 'x' should be"):
        await edge.run(aggregation=Aggregation(buffer=2))


async def test_a_device_that_misses_its_neighbour_is_not_lost_itself(edge: Edge) -> None:
    edge.devices["far-0"].problems = [NodeLostError("far-1", "it opened no stream")]
    await edge.run(aggregation=Aggregation(buffer=2))
    assert edge.members.ready_ids == ["near-0", "near-1", "far-0"]


async def test_a_run_that_is_cancelled_while_its_calls_fail_ends(edge: Edge) -> None:
    """A task group forgets its cancellation then, and the cluster waited for its devices for ever."""
    Gates(edge, "near", "far")
    running = asyncio.create_task(edge.run(aggregation=Aggregation(buffer=1)))
    await until(lambda: all(device.orders for device in edge.devices.values()), 2)
    for node_id in edge.devices:
        edge.network.kill(node_id)
    await asyncio.sleep(0)
    running.cancel()
    done, _ = await asyncio.wait([running], timeout=2)
    assert done
