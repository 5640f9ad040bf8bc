"""An edge's rounds: the average of the clusters that finished, on disk before anybody hears of it, whoever is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ecogen.config import Tuning
from ecogen.errors import (
    AuthenticationError,
    CheckpointError,
    EcoGenError,
    NodeLostError,
    ProtocolError,
    RunError,
    StorageError,
)
from ecogen.metering.meter import null_meter
from ecogen.placement import place
from ecogen.records import EventRecord, Record, RoundRecord, Usage
from ecogen.runtime.membership import Members
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message, Peer, Stream
from ecogen.transport.memory import MemoryNetwork
from ecogen.tuning.messages import SYNC, TUNE, SyncOrder, SyncResult, TuneOrder, TuneResult
from ecogen.tuning.rounds import EdgeRounds, EdgeState
from tests.runs import until

CLUSTERS = {name: place([f"{name}-0", f"{name}-1"], [1], 2) for name in ("near", "far")}
NAMES = ("vit.layers.0.prompts", "vit.layers.1.prompts", "classifier.bias")
FIRST_ATTEMPT = 1000


def tunables(value: float) -> dict[str, Tensor]:
    return {name: torch.full((2,), value) for name in NAMES}


def values(tensors: Mapping[str, Tensor]) -> set[float]:
    """The values in all tunables, each of which should be there."""
    assert set(tensors) == set(NAMES)
    return {value for tensor in tensors.values() for value in tensor.tolist()}


class Device:
    """Adds a number to what it is sent; the first of a cluster owns its examples."""

    def __init__(self, node_id: str, step: float, num_examples: int) -> None:
        self.node_id, self.step, self.num_examples = node_id, step, num_examples
        self.orders: list[TuneOrder] = []
        self.names: set[str] = set()
        self.problems: list[EcoGenError] = []
        self.before_answer: Callable[[], Awaitable[object]] | None = None

    async def handle(self, _: Peer, message: Message) -> Message:
        assert message.method == TUNE
        self.orders.append(message.read(TuneOrder))
        self.names |= set(message.tensors)
        if self.problems:
            raise self.problems.pop(0)
        if self.before_answer is not None:
            await self.before_answer()
        loss = 0.5 if self.node_id == "near-0" else 1.5 if self.node_id == "far-0" else None
        result = TuneResult(self.num_examples, loss, Usage(self.node_id, "tuning", 1.0, 1.0))
        tensors = {name: tensor + self.step for name, tensor in message.tensors.items()}
        return Message.of(TUNE, result, kind="tunables", tensors=tensors)

    async def accept(self, peer: Peer, stream: Stream) -> None:
        raise AuthenticationError("these devices talk to nobody")

    @property
    def rounds(self) -> list[int]:
        return [order.key.round_index for order in self.orders]


class Cloud:
    """Answers every edge with the same tunables."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.orders: list[SyncOrder] = []
        self.sent: list[set[float]] = []

    async def handle(self, _: Peer, message: Message) -> Message:
        assert message.method == SYNC
        self.orders.append(message.read(SyncOrder))
        self.sent.append(values(message.tensors))
        return Message.of(SYNC, SyncResult(self.orders[-1].round_index, True), tensors=tunables(self.value))

    async def accept(self, peer: Peer, stream: Stream) -> None:
        raise AuthenticationError("nobody streams to the cloud")


class Edge:
    """An edge with two clusters of two devices: near adds 1 with 30 examples, far adds 5 with 10, 2 on average."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "state.safetensors"
        self.network = MemoryNetwork()
        self.transport = self.network.join(Peer("edge", "edge"))
        self.records: list[Record] = []
        self.saved: list[EdgeState | None] = []
        self.members = Members([n for placement in CLUSTERS.values() for n in placement.node_ids], self.publish)
        self.worker = Worker(null_meter("edge"), self.transport.counter)
        numbers = {"near-0": (1, 30), "near-1": (1, 0), "far-0": (5, 10), "far-1": (5, 0)}
        self.devices = {node_id: Device(node_id, *number) for node_id, number in numbers.items()}

    async def arrive(self, *node_ids: str) -> None:
        for node_id in node_ids:
            await self.network.join(Peer(node_id, "end")).serve(self.devices[node_id])
            await self.members.join(node_id, f"at {node_id}")
            await self.members.ready(node_id)

    async def have_cloud(self, value: float) -> Cloud:
        cloud = Cloud(value)
        await self.network.join(Peer("cloud", "cloud")).serve(cloud)
        return cloud

    def rounds(self, state: EdgeState | None = None, **tuning: Any) -> EdgeRounds:
        return EdgeRounds(
            state or EdgeState(tunables(0.0)),
            self.path,
            Tuning(**{"rounds": 1, "cloud_every": 0, "rejoin_timeout_s": 0.03} | tuning),
            CLUSTERS,
            self.members,
            self.transport,
            self.worker,
            "cloud",
            lambda tensors: float(tensors["classifier.bias"][0]) / 100,
            self.publish,
            attempt=FIRST_ATTEMPT,
        )

    async def run(self, state: EdgeState | None = None, **tuning: Any) -> EdgeState:
        """Run all rounds; gives the state in the end, which should be the one on disk."""
        rounds = self.rounds(state, **tuning)
        async with asyncio.timeout(5):
            await rounds.run()
        return rounds.state

    def publish(self, record: Record) -> None:
        """Keep a record and what is on disk at that time; as an outbox does, skip what is there already."""
        if record not in self.records:
            self.records.append(record)
            self.saved.append(EdgeState.load(self.path) if self.path.exists() else None)

    @property
    def round_records(self) -> list[RoundRecord]:
        return [record for record in self.records if isinstance(record, RoundRecord)]

    @property
    def cluster_events(self) -> list[tuple[str, str, int | None]]:
        events = [record for record in self.records if isinstance(record, EventRecord)]
        return [(e.event, e.node_id, e.round_index) for e in events if e.event.startswith("cluster_")]

    def details(self, event: str) -> list[str]:
        return [r.detail for r in self.records if isinstance(r, EventRecord) and r.event == event]


@pytest.fixture
async def alone(tmp_path: Path) -> AsyncIterator[Edge]:
    """An edge before its devices come."""
    edge = Edge(tmp_path)
    yield edge
    edge.worker.close()


@pytest.fixture
async def edge(alone: Edge) -> Edge:
    """An edge whose devices are all here."""
    await alone.arrive(*alone.devices)
    return alone


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause takes longer than a few milliseconds."""
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda delay_s: sleep(min(delay_s, 0.003)))


RECORD = RoundRecord("edge", 2, 0.5, 0.25, 40, ("near",), ("far",), 1.5, (Usage("near-0", "tuning", 1.0, 0.5),), 7.0)


@pytest.mark.parametrize("record", [None, RECORD])
@pytest.mark.parametrize("unsynced", [None, 40])
def test_a_state_comes_back_from_disk_as_it_was(tmp_path: Path, record: RoundRecord | None, unsynced: int) -> None:
    state = EdgeState(tunables(3.0), 3, unsynced, record)
    state.save(tmp_path / "state")
    loaded = EdgeState.load(tmp_path / "state")
    assert (loaded.next_round, loaded.unsynced, loaded.record) == (3, unsynced, record)
    assert values(loaded.tunables) == {3.0}


async def test_a_round_averages_the_clusters_by_their_examples(edge: Edge) -> None:
    state = await edge.run()
    assert values(state.tunables) == {2.0}
    assert (state.next_round, state.unsynced) == (1, None)
    (record,) = edge.round_records
    assert (record.node_id, record.round_index, record.num_examples) == ("edge", 0, 40)
    assert (record.members, record.missing) == (("near", "far"), ())
    assert (record.accuracy, record.loss) == (0.02, 1.0)
    assert [usage.node_id for usage in record.usages] == ["near-0", "near-1", "far-0", "far-1", "edge"]


async def test_each_round_begins_with_the_last_ones_tunables(edge: Edge) -> None:
    state = await edge.run(rounds=3)
    assert values(state.tunables) == {6.0}
    assert [(r.round_index, r.accuracy) for r in edge.round_records] == [(0, 0.02), (1, 0.04), (2, 0.06)]
    assert edge.devices["far-1"].rounds == [0, 1, 2]


async def test_a_device_gets_its_own_tunables_and_learns_where_its_neighbours_are(edge: Edge) -> None:
    await edge.run()
    first, second = edge.devices["near-0"], edge.devices["near-1"]
    assert first.names == {"vit.layers.0.prompts", "classifier.bias"}
    assert second.names == {"vit.layers.1.prompts"}
    assert [order.addresses for order in first.orders] == [{"near-1": "at near-1"}]
    assert [order.addresses for order in second.orders] == [{"near-0": "at near-0"}]


async def test_a_record_is_on_disk_before_it_is_published(edge: Edge) -> None:
    await edge.run(rounds=2)
    told = [(r, s) for r, s in zip(edge.records, edge.saved, strict=True) if isinstance(r, RoundRecord)]
    assert len(told) == 2
    for record, state in told:
        assert state is not None
        assert state.record == record
        assert state.next_round == record.round_index + 1
        assert values(state.tunables) == {2.0 * state.next_round}


async def test_a_round_that_cannot_be_written_ends_the_run_unpublished(edge: Edge) -> None:
    edge.path.write_bytes(b"a file where a folder is needed")
    edge.path /= "state.safetensors"
    with pytest.raises(StorageError, match="cannot write"):
        await edge.run(rounds=3)
    assert not edge.round_records


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


# The cloud.


async def test_what_the_cloud_answers_is_what_the_next_round_begins_with(edge: Edge) -> None:
    cloud = await edge.have_cloud(10.0)
    state = await edge.run(rounds=2, cloud_every=1)
    assert cloud.orders == [SyncOrder(0, 40), SyncOrder(1, 40)]
    assert cloud.sent == [{2.0}, {12.0}]
    assert values(state.tunables) == {10.0}
    saved = EdgeState.load(edge.path)
    assert (saved.next_round, saved.unsynced, values(saved.tunables)) == (2, None, {10.0})
    assert saved.record == edge.round_records[-1]


@pytest.mark.parametrize(("cloud_every", "rounds"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2])])
async def test_the_cloud_is_asked_as_often_as_the_recipe_says(edge: Edge, cloud_every: int, rounds: list[int]) -> None:
    cloud = await edge.have_cloud(10.0)
    await edge.run(rounds=5, cloud_every=cloud_every)
    assert [order.round_index for order in cloud.orders] == rounds


@pytest.mark.usefixtures("hasty")
async def test_an_edge_goes_on_alone_where_the_cloud_stays_away(edge: Edge) -> None:
    state = await edge.run(rounds=2, cloud_every=1)
    assert values(state.tunables) == {4.0}
    assert (state.next_round, state.unsynced) == (2, None)
    assert [detail.split(":")[0] for detail in edge.details("lost")] == ["going on alone"] * 2
    assert EdgeState.load(edge.path).unsynced is None


@pytest.mark.usefixtures("hasty")
async def test_a_cloud_that_comes_back_in_time_is_asked_again(edge: Edge) -> None:
    running = asyncio.create_task(edge.run(cloud_every=1, rejoin_timeout_s=2))
    await until(lambda: edge.round_records, 2)
    await asyncio.sleep(0.003)
    cloud = await edge.have_cloud(10.0)
    assert values((await running).tunables) == {10.0}
    assert cloud.orders == [SyncOrder(0, 40)]
    assert not edge.details("lost")


async def test_an_update_that_the_cloud_still_owes_an_answer_for_is_on_disk(edge: Edge) -> None:
    """An edge killed while it waits for the cloud asks it again for the same round."""
    running = asyncio.create_task(edge.run(cloud_every=1, rejoin_timeout_s=2))
    await until(lambda: edge.round_records, 2)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    saved = EdgeState.load(edge.path)
    assert (saved.next_round, saved.unsynced, values(saved.tunables)) == (1, 40, {2.0})
    cloud = await edge.have_cloud(10.0)
    assert values((await edge.run(saved)).tunables) == {10.0}
    assert cloud.orders == [SyncOrder(0, 40)]


async def test_a_cloud_that_refuses_ends_the_run(edge: Edge) -> None:
    class Refusing(Cloud):
        async def handle(self, _: Peer, __: Message) -> Message:
            raise ProtocolError("another version")

    await edge.network.join(Peer("cloud", "cloud")).serve(Refusing(0.0))
    with pytest.raises(ProtocolError, match="another version"):
        await edge.run(cloud_every=1)
