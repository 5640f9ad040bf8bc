"""Runs in one process that protect each pair: what leaves an edge is noised, and its records tell epsilon."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from ecogen.config import Recipe
from ecogen.tuning.edge_state import EdgeState
from ecogen.tuning.messages import Sampled
from ecogen.tuning.privacy import epsilon
from tests.engines.test_inproc_loss import is_tuning, slow
from tests.pictures import pair_recipe, save_pair_foundation
from tests.runs import finish, in_background, run, running, until
from tests.tiny import RecordingNetwork


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair_foundation(tmp_path_factory.mktemp("model"))


def private(foundation: Path, noise_multiplier: float, clip_norm: float = 1.0, **tuning: Any) -> Recipe:
    """24 pairs an edge, drawn four at a time, each pair in two passages."""
    return pair_recipe(
        foundation,
        privacy={"unit": "example", "noise_multiplier": noise_multiplier, "clip_norm": clip_norm, "delta": 0.01},
        tuning={"rounds": 2, "clip_norm": 0.0, "optimizer": "sgd", "learning_rate": 1.0, "weight_decay": 0.0} | tuning,
    )


async def test_records_tell_epsilon_and_no_loss(foundation: Path, tmp_path: Path) -> None:
    finished = await run(private(foundation, 1.0), tmp_path)
    for edge in ("edge-0", "edge-1"):
        rounds = finished.rounds(edge)
        assert [record.loss for record in rounds] == [None, None]
        assert [record.num_examples for record in rounds] == [48, 48]
        spent = [epsilon(1.0, 4 / 24, 6 * number, 0.01) for number in (1, 2)]
        assert [record.epsilon for record in rounds] == pytest.approx(spent)
        state = EdgeState.load(tmp_path / "nodes" / edge / "state.safetensors")
        assert state.sampled == {Sampled(4 / 24, 6)}


async def test_what_leaves_an_edge_is_noised_anew_in_every_run(foundation: Path, tmp_path: Path) -> None:
    """Noise a thousand times the clip norm hides every gradient: runs with the same seed share nothing.

    Six steps with four pairs on average, of rate 1, where a cluster of two devices holds one copy of each tunable.
    """
    recipe = private(foundation, 1000.0, clip_norm=1e-3, rounds=1)
    begun = (await run(private(foundation, 1000.0, local_epochs=0, rounds=1), tmp_path / "none")).tunables
    moved = []
    for name in ("one", "other"):
        await run(recipe, tmp_path / name)
        state = EdgeState.load(tmp_path / name / "nodes" / "edge-0" / "state.safetensors").tunables
        moved.append(torch.cat([(state[key] - begun[key]).flatten() for key in begun]).double())
    for change in moved:
        assert float(change.std()) == pytest.approx(6**0.5 * 1000.0 * 1e-3 / 4, rel=0.1)
    one, other = moved
    assert abs(float(torch.dot(one, other) / one.norm() / other.norm())) < 0.1


async def test_a_round_that_lost_its_device_is_done_again_and_costs_once(foundation: Path, tmp_path: Path) -> None:
    """What the edge was sent of it before it forgot: nobody else has it."""
    recipe, network, lost = private(foundation, 1.0), RecordingNetwork(delay=slow), "edge-0.cluster-0.device-1"
    async with running(recipe, tmp_path, network) as (federation, engine):
        work = in_background(finish(federation))
        await until(lambda: is_tuning(network, lost, 1))
        await engine.kill(lost)
        await asyncio.sleep(0.05)
        await engine.start_node(lost)
        finished = await asyncio.wait_for(work, 40)
    assert finished.events("cluster_failed")
    spent = [record.epsilon for record in finished.rounds("edge-0")]
    assert spent == pytest.approx([epsilon(1.0, 4 / 24, 6 * number, 0.01) for number in (1, 2)])
