"""Federations whose devices have few labels: what counts, what is reported, and that a resumed one ends the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ecogen.config import Recipe
from tests.runs import Finished, logged, rounds_of, run, running
from tests.tiny import RecordingNetwork

RecipeOf = Callable[..., Recipe]
FIXMATCH = {"method": "fixmatch", "threshold": 0.15, "ratio": 1}


def few_labels(recipe_of: RecipeOf, *, labelled: float = 0.25, **unlabelled: Any) -> Recipe:
    return recipe_of(data={"labelled": labelled}, tuning={"rounds": 3, "unlabelled": unlabelled})


def assert_same_bits(one: Finished, other: Finished) -> None:
    assert all(torch.equal(one.tunables[name], other.tunables[name]) for name in one.tunables)


async def test_what_is_tuned_on_counts_and_the_share_of_pseudo_labels_is_recorded(
    recipe_of: RecipeOf, tmp_path: Path
) -> None:
    matching = await run(few_labels(recipe_of, **FIXMATCH), tmp_path / "fixmatch")
    rounds = matching.rounds("edge-0")
    assert [record.num_examples for record in rounds] == [48, 48, 48]
    # It begins with a head of zeros, to which all of ten classes are alike, and becomes surer.
    first, middle, last = (record.confident for record in rounds)
    assert first == 0 < middle < last <= 1
    ignoring = await run(few_labels(recipe_of), tmp_path / "ignore")
    assert [(r.num_examples, r.confident) for r in ignoring.rounds("edge-0")] == [(12, None)] * 3
    assert any(not torch.equal(ignoring.tunables[name], matching.tunables[name]) for name in matching.tunables)


async def test_where_all_have_labels_fixmatch_changes_no_bit(recipe_of: RecipeOf, tmp_path: Path) -> None:
    plain = await run(recipe_of(tuning={"rounds": 3}), tmp_path / "plain")
    matching = await run(few_labels(recipe_of, labelled=1.0, **FIXMATCH), tmp_path / "fixmatch")
    assert_same_bits(plain, matching)
    assert matching.rounds("edge-0")[-1].confident is None


@pytest.mark.parametrize("labels", ["start", "end"])
async def test_a_federation_stopped_and_started_again_ends_as_an_undisturbed_one(
    recipe_of: RecipeOf, tmp_path: Path, labels: str
) -> None:
    tuning = {"rounds": 3, "unlabelled": FIXMATCH}
    recipe = recipe_of(data={"labelled": 0.25, "owners": 2}, placement={"labels": labels}, tuning=tuning)
    undisturbed = await run(recipe, tmp_path / "undisturbed")
    async with running(recipe, tmp_path / "disturbed", RecordingNetwork(delay=lambda *_: 0.002)) as (federation, _):
        async for _ in federation.watch():
            if rounds_of(federation.records, "edge-0"):
                break
    assert len(rounds_of(logged(tmp_path / "disturbed"), "edge-0")) < 3
    finished = await run(recipe, tmp_path / "disturbed")
    assert_same_bits(finished, undisturbed)
    before, after = undisturbed.rounds("edge-0"), finished.rounds("edge-0")
    assert [(r.accuracy, r.confident) for r in after] == [(r.accuracy, r.confident) for r in before]
