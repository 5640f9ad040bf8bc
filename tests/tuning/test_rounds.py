"""An edge's rounds: the average of its clusters, on disk before anybody hears of it, and the cloud's answer to it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ecogen.errors import ProtocolError, StorageError
from ecogen.records import RoundRecord
from ecogen.transport.base import Message, Peer
from ecogen.tuning.edge_state import EdgeState
from ecogen.tuning.messages import SyncOrder
from tests.runs import until
from tests.tuning.edges import RECORD, Cloud, Edge, tunables, values


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause takes longer than a few milliseconds."""
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda delay_s: sleep(min(delay_s, 0.003)))


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
