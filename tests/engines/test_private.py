"""Private runs in one process: what leaves an edge is noised, and its records do not tell who took part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ecogen.config import Recipe
from ecogen.records import PhaseRecord
from tests.engines.test_inproc import start_values
from tests.runs import run

RecipeOf = Callable[..., Recipe]

CLUSTERS = {"clusters_per_edge": 4, "devices_per_cluster": 1}


async def test_records_tell_epsilon_and_nothing_of_who_took_part(recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of(
        topology=CLUSTERS | {"edges": 2},
        tuning={"participation": 0.5, "rounds": 3},
        privacy={"noise_multiplier": 1.0, "delta": 0.01},
        evaluation={"requests": 0},
    )
    finished = await run(recipe, tmp_path, timeout_s=90)
    for edge in ("edge-0", "edge-1"):
        rounds = finished.rounds(edge)
        spent = [record.epsilon for record in rounds]
        assert len(spent) == 3
        assert all(epsilon is not None and epsilon > 0 for epsilon in spent)
        assert spent == sorted(spent)
        for record in rounds:
            assert (record.loss, record.num_examples, record.members, record.missing) == (None, 0, (), ())
        closing = [r for r in finished.records if isinstance(r, PhaseRecord) and r.node_id == edge]
        for usages in [*(record.usages for record in rounds), closing[-1].usages]:
            devices = [usage for usage in usages if "device" in usage.node_id]
            assert len({(usage.cpu_s, usage.wall_s, usage.flops) for usage in devices}) <= 1
            assert len(devices) in (0, 4)
    # The weight in the cloud's average is the number of clusters, which everybody knows.
    assert [record.num_examples for record in finished.rounds("cloud")] == [8, 8, 8]


async def test_one_round_moves_by_the_clipped_updates_and_noise_alone(recipe_of: RecipeOf, tmp_path: Path) -> None:
    """With next to no noise and everybody there, a round moves by at most the clip norm, in their common direction."""
    recipe = recipe_of(
        topology=CLUSTERS,
        tuning={"rounds": 1, "cloud_every": 0},
        privacy={"noise_multiplier": 1e-9, "clip_norm": 0.01, "delta": 0.01},
        evaluation={"requests": 0},
    )
    finished = await run(recipe, tmp_path, timeout_s=90)
    start = start_values(recipe)
    moved = torch.cat([(finished.tunables[name] - start[name]).flatten() for name in start]).double()
    assert 0.001 < float(moved.norm()) <= 0.01 + 1e-6


async def test_what_is_sent_to_anybody_is_noised(recipe_of: RecipeOf, tmp_path: Path) -> None:
    """Noise a thousand times the clip norm hides every update: two runs with the same seed share nothing."""
    recipe = recipe_of(
        topology=CLUSTERS,
        tuning={"rounds": 1},
        privacy={"noise_multiplier": 1000.0, "delta": 0.01},
        evaluation={"requests": 0},
    )
    one, other = await run(recipe, tmp_path / "one", timeout_s=90), await run(recipe, tmp_path / "other", timeout_s=90)
    start = start_values(recipe)
    left, right = (
        torch.cat([(run.tunables[name] - start[name]).flatten() for name in start]).double() for run in (one, other)
    )
    expected = 1000.0 / 4
    assert float(left.std()) == pytest.approx(expected, rel=0.1)
    assert abs(float(torch.dot(left, right) / left.norm() / right.norm())) < 0.2


async def test_without_noise_a_sampled_round_is_the_mean_of_who_took_part(recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of(
        topology=CLUSTERS,
        tuning={"participation": 0.4, "rounds": 4, "cloud_every": 0},
        evaluation={"requests": 0},
    )
    one, other = await run(recipe, tmp_path / "one", timeout_s=90), await run(recipe, tmp_path / "other", timeout_s=90)
    members = [record.members for record in one.rounds("edge-0")]
    assert members == [record.members for record in other.rounds("edge-0")]
    assert {len(names) for names in members} - {4}
    assert all(torch.equal(one.tunables[name], other.tunables[name]) for name in one.tunables)
    for record in one.rounds("edge-0"):
        assert record.missing == ()
        assert record.num_examples == 12 * len(record.members)
        assert record.epsilon is None
