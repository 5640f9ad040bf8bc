"""Clusters that do not wait for each other, in whole federations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ecogen.config import Recipe
from ecogen.records import EventRecord, RoundRecord
from ecogen.runtime import membership
from tests.runs import duplicates, finish, in_background, rounds_of, run, running, until
from tests.tiny import RecordingNetwork

RecipeOf = Callable[..., Recipe]
SLOW = "edge-0.cluster-0.device-1"


@pytest.fixture(autouse=True)
def quick_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(membership, "SILENCE_S", 20.0)


@pytest.mark.parametrize("cloud_every", [0, 1])
async def test_one_cluster_and_a_buffer_of_one_are_fedavg(
    recipe_of: RecipeOf, tmp_path: Path, cloud_every: int
) -> None:
    alone = {"topology": {"clusters_per_edge": 1}, "tuning": {"rounds": 3, "cloud_every": cloud_every}}
    truth = await run(recipe_of(**alone), tmp_path / "synchronous")
    buffered = await run(recipe_of(**alone, aggregation={"buffer": 1}), tmp_path / "buffered")
    assert all(torch.equal(buffered.tunables[name], truth.tunables[name]) for name in truth.tunables)
    assert [r.accuracy for r in buffered.rounds("edge-0")] == [r.accuracy for r in truth.rounds("edge-0")]


async def test_a_slow_device_holds_only_its_own_cluster_back(recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of(aggregation={"buffer": 1}, tuning={"rounds": 8}, faults={"slow": {SLOW: 30.0}})
    finished = await run(recipe, tmp_path)
    members = [record.members for record in finished.rounds("edge-0")]
    assert len(members) == 8
    assert members.count(("edge-0.cluster-1",)) >= 6
    assert not finished.events("cluster_failed", "lost")
    assert len([r for r in finished.records if type(r).__name__ == "RequestRecord"]) == 2  # the slow one serves too


async def test_a_killed_edge_goes_on_with_attempts_that_fence_the_old_ones(recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of(aggregation={"buffer": 2}, tuning={"rounds": 6})
    network = RecordingNetwork(delay=lambda *_: 0.004)
    async with running(recipe, tmp_path, network) as (federation, engine):
        work = in_background(finish(federation))
        await until(lambda: len(rounds_of(federation.records, "edge-0")) > 2)
        await engine.kill("edge-0")
        await asyncio.sleep(0.02)
        await engine.start_node("edge-0")
        finished = await asyncio.wait_for(work, 40)
    assert [record.round_index for record in finished.rounds("edge-0")] == list(range(6))
    assert not list(duplicates(finished.records))
    assert [event.node_id for event in finished.events("resumed")] == ["edge-0"]


async def test_a_device_lost_while_others_tune_takes_part_again(recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of(aggregation={"buffer": 1}, tuning={"rounds": 30}, faults={"slow": {SLOW: 20.0}})
    network = RecordingNetwork(delay=lambda *_: 0.004)
    async with running(recipe, tmp_path, network) as (federation, engine):

        def is_back() -> bool:
            return any(isinstance(r, EventRecord) and r.event == "cluster_formed" for r in federation.records)

        work = in_background(finish(federation))
        await until(lambda: [s for s in network.sent if (s.method, s.sender_id) == ("forward", SLOW)])
        await engine.kill(SLOW)
        # The others leave it time to come back, on a busy machine too; but first there is a round without it.
        network.delay = lambda sender, *_: 0.04 if "cluster-1" in sender and not is_back() else 0.0
        await until(lambda: any(isinstance(r, RoundRecord) and r.missing for r in federation.records))
        await engine.start_node(SLOW)
        finished = await asyncio.wait_for(work, 40)
    assert [event.node_id for event in finished.events("cluster_failed")] == ["edge-0.cluster-0"]
    assert [event.node_id for event in finished.events("cluster_formed")] == ["edge-0.cluster-0"]
    rounds = finished.rounds("edge-0")
    assert len(rounds) == 30
    assert ("edge-0.cluster-0",) in [record.missing for record in rounds]
    assert rounds[-1].missing == ()
