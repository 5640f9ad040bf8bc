"""Nodes are lost and come back: rounds go on, nothing counts twice, and the outcome is that of an undisturbed run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ecogen.config import Recipe
from ecogen.errors import AuthenticationError, ProtocolError
from ecogen.records import EventRecord
from ecogen.runtime import membership
from ecogen.transport.base import Message, Peer
from ecogen.tuning.messages import TUNE, AttemptKey, Flow, TuneOrder
from tests.runs import Finished, duplicates, finish, in_background, logged, rounds_of, run, running, until
from tests.tiny import RecordingNetwork

RecipeOf = Callable[..., Recipe]
MIDDLE = "edge-0.cluster-0.device-1"
SLOW_S = 0.004


@pytest.fixture(autouse=True)
def quick_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a node whose parent came back notices at once; silence stays long, since test machines are slow."""
    monkeypatch.setattr(membership, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(membership, "SILENCE_S", 20.0)


def slow(*_: object) -> float:
    return SLOW_S


def is_tuning(network: RecordingNetwork, sender_id: str, round_index: int) -> bool:
    """Whether a device sent activations of this round."""
    sent = (
        s.message.read(Flow).key for s in reversed(network.sent) if (s.method, s.sender_id) == ("forward", sender_id)
    )
    return any(key.round_index == round_index for key in sent)


def assert_same_bits(one: Finished, other: Finished) -> None:
    assert one.tunables.keys() == other.tunables.keys()
    assert all(torch.equal(one.tunables[name], other.tunables[name]) for name in one.tunables)


async def test_a_round_ends_with_the_other_clusters_and_the_lost_device_comes_back(
    recipe_of: RecipeOf, tmp_path: Path
) -> None:
    recipe = recipe_of(tuning={"rounds": 6})
    network = RecordingNetwork(delay=slow)
    async with running(recipe, tmp_path, network) as (federation, engine):
        work = in_background(finish(federation))
        await until(lambda: is_tuning(network, MIDDLE, 1))
        await engine.kill(MIDDLE)
        await until(lambda: len(rounds_of(federation.records, "edge-0")) > 1)
        network.delay = lambda sender, *_: 0.04 if "cluster-1" in sender else 0.0  # leave it time to come back
        await engine.start_node(MIDDLE)
        finished = await asyncio.wait_for(work, 40)
    rounds = finished.rounds("edge-0")
    assert [record.round_index for record in rounds] == list(range(6))
    assert rounds[1].members == ("edge-0.cluster-1",)
    assert rounds[1].missing == ("edge-0.cluster-0",)
    assert rounds[5].members == ("edge-0.cluster-0", "edge-0.cluster-1")
    for record in rounds:
        assert record.num_examples == 24 * len(record.members)
    assert {event.node_id for event in finished.events("lost")} == {MIDDLE}
    assert {event.node_id for event in finished.events("rejoined")} == {MIDDLE}
    assert [event.node_id for event in finished.events("cluster_failed")] == ["edge-0.cluster-0"]
    assert [event.node_id for event in finished.events("cluster_formed")] == ["edge-0.cluster-0"]
    assert not list(duplicates(finished.records))


@pytest.mark.parametrize(
    ("lost", "first_block"),
    [
        ("edge-0.cluster-0.device-0", 0),
        (MIDDLE, 0),
        ("edge-0.cluster-0.device-2", 0),
        ("edge-0.cluster-0.device-0", 1),  # which has the middle device keep what block 0 gives
        (MIDDLE, 1),
    ],
)
async def test_an_only_cluster_is_waited_for_and_its_round_done_again_as_if_nothing_had_been(
    recipe_of: RecipeOf, tmp_path: Path, lost: str, first_block: int
) -> None:
    recipe = recipe_of(
        topology={"clusters_per_edge": 1, "devices_per_cluster": 3},
        tuning={"rounds": 3},
        tunables={"first_block": first_block},
    )
    undisturbed = await run(recipe, tmp_path / "undisturbed")
    network = RecordingNetwork(delay=slow)
    async with running(recipe, tmp_path / "disturbed", network) as (federation, engine):
        work = in_background(finish(federation))
        await until(lambda: is_tuning(network, lost, 1))
        await engine.kill(lost)
        await asyncio.sleep(0.05)
        await engine.start_node(lost)
        finished = await asyncio.wait_for(work, 40)
    assert_same_bits(finished, undisturbed)
    assert [record.num_examples for record in finished.rounds("edge-0")] == [48, 48, 48]
    assert finished.events("cluster_failed")
    assert finished.events("cluster_formed")


async def test_a_device_that_comes_back_has_its_backbone_on_its_disk(recipe_of: RecipeOf, tmp_path: Path) -> None:
    network = RecordingNetwork(delay=slow)
    recipe = recipe_of(topology={"clusters_per_edge": 1}, tuning={"rounds": 3})
    async with running(recipe, tmp_path, network) as (federation, engine):
        work = in_background(finish(federation))
        await until(lambda: is_tuning(network, MIDDLE, 1))
        await engine.kill(MIDDLE)
        fetched = len([sent for sent in network.sent if sent.method == "fetch"])
        await engine.start_node(MIDDLE)
        await asyncio.wait_for(work, 40)
    assert len([sent for sent in network.sent if sent.method == "fetch"]) == fetched


@pytest.mark.parametrize("node_id", ["edge-0", "cloud"])
async def test_a_killed_edge_or_cloud_goes_on_from_its_disk(recipe_of: RecipeOf, tmp_path: Path, node_id: str) -> None:
    recipe = recipe_of(topology={"edges": 2, "clusters_per_edge": 1}, tuning={"rounds": 4})
    undisturbed = await run(recipe, tmp_path / "undisturbed")
    folder, network = tmp_path / "disturbed", RecordingNetwork(delay=slow)
    async with running(recipe, folder, network) as (_, engine):
        await until(
            lambda: (folder / "nodes/cloud/records.jsonl").exists() and len(rounds_of(logged(folder), "cloud")) > 1
        )
        await engine.kill(node_id)
        await asyncio.sleep(0.05)
        await engine.start_node(node_id)
        await until(lambda: is_finished(folder), 40)
        tunables = await ask_for_tunables(engine.transport)
    finished = Finished(logged(folder), tunables)
    assert_same_bits(finished, undisturbed)
    assert not list(duplicates(finished.records))
    for name in ("edge-0", "edge-1", "cloud"):
        assert [record.round_index for record in finished.rounds(name)] == [0, 1, 2, 3]
        assert [r.num_examples for r in finished.rounds(name)] == [r.num_examples for r in undisturbed.rounds(name)]
    if node_id == "edge-0":
        assert [event.node_id for event in finished.events("resumed")] == ["edge-0"]


async def test_a_cloud_that_comes_back_still_knows_which_edges_have_finished(
    recipe_of: RecipeOf, tmp_path: Path
) -> None:
    """It waited for ever for the one that had."""
    recipe = recipe_of(topology={"edges": 2, "clusters_per_edge": 1}, tuning={"cloud_every": 0})
    network = RecordingNetwork(delay=lambda sender, receiver, _: 0.03 if "edge-1" in sender + receiver else 0.0)
    async with running(recipe, tmp_path, network) as (_, engine):
        await until(lambda: "edge-0" in finished_nodes(tmp_path))
        assert "edge-1" not in finished_nodes(tmp_path)
        await engine.kill("cloud")
        network.delay = None
        await engine.start_node("cloud")
        await until(lambda: is_finished(tmp_path), 20)


async def test_a_federation_stopped_and_started_again_ends_as_an_undisturbed_one(
    recipe_of: RecipeOf, tmp_path: Path
) -> None:
    recipe = recipe_of(topology={"edges": 2}, tuning={"rounds": 4, "cloud_every": 2})
    undisturbed = await run(recipe, tmp_path / "undisturbed")
    folder = tmp_path / "disturbed"
    for stop_after in (1, 3):
        async with running(recipe, folder, RecordingNetwork(delay=slow)) as (federation, _):
            async for _ in federation.watch():
                if len(rounds_of(federation.records, "edge-0")) >= stop_after:
                    break
    finished = await run(recipe, folder)
    assert_same_bits(finished, undisturbed)
    assert not list(duplicates(logged(folder)))
    for name in ("edge-0", "edge-1", "cloud"):
        before, after = undisturbed.rounds(name), finished.rounds(name)
        assert [(r.round_index, r.num_examples, r.members) for r in after] == [
            (r.round_index, r.num_examples, r.members) for r in before
        ]
        assert [r.accuracy for r in after] == [r.accuracy for r in before]


async def test_a_log_that_a_crash_cut_off_is_mended(recipe_of: RecipeOf, tmp_path: Path) -> None:
    """The next record was appended to the half of a line, and the file could never be read again."""
    recipe = recipe_of(tuning={"rounds": 3})
    async with running(recipe, tmp_path, RecordingNetwork(delay=slow)) as (federation, _):
        async for _ in federation.watch():
            if rounds_of(federation.records, "edge-0"):
                break
    for node_id in ("cloud", "edge-0"):
        with (tmp_path / "nodes" / node_id / "records.jsonl").open("ab") as file:
            file.write(b'{"type":"round","node_id":"ed')
    finished = await run(recipe, tmp_path)
    assert [record.round_index for record in finished.rounds("edge-0")] == [0, 1, 2]
    assert logged(tmp_path)[: len(finished.records)] == finished.records


async def test_a_late_attempt_and_a_stranger_are_refused(recipe_of: RecipeOf, tmp_path: Path) -> None:
    network = RecordingNetwork()
    async with running(recipe_of(), tmp_path, network) as (federation, engine):
        await finish(federation)
        edge = network.join(Peer("edge-0", "edge"))
        late = Message.of(TUNE, TuneOrder(AttemptKey(0, 1), {}), kind="tunables")
        with pytest.raises(ProtocolError, match="fenced off"):
            await edge.call(MIDDLE, late)
        with pytest.raises(AuthenticationError, match="may not call 'tune'"):
            await engine.transport.call(MIDDLE, late)
        with pytest.raises(ProtocolError, match="no method 'dance'"):
            await edge.call(MIDDLE, Message.of("dance"))


def finished_nodes(folder: Path) -> set[str]:
    if not (folder / "nodes/cloud/records.jsonl").exists():
        return set()
    return {r.node_id for r in logged(folder) if isinstance(r, EventRecord) and r.event == "finished"}


def is_finished(folder: Path) -> bool:
    return "cloud" in finished_nodes(folder)


async def ask_for_tunables(operator: object) -> dict[str, torch.Tensor]:
    reply = await operator.call("cloud", Message.of("result", counted=False))
    return dict(reply.tensors)
