"""Pre-training teaches something that labelled digits show."""

from __future__ import annotations

from pathlib import Path

import pytest

from ecogen import config as recipes
from ecogen.measurements import Probe
from ecogen.models.checkpoint import Foundation
from ecogen.tuning.foundation import obtain_foundation
from ecogen.tuning.making import vit_config
from ecogen.tuning.probe import probe_foundation


def probe_of(overrides: list[str]) -> Probe:
    recipe = recipes.load("digits", overrides)
    foundation, _ = obtain_foundation(recipe, lambda *_: None)
    probe = probe_foundation(foundation, recipe)
    assert probe is not None
    return probe


@pytest.mark.slow  # pre-trains the demo's model, where no run has done so
def test_a_linear_probe_on_the_demos_model_is_ten_points_above_the_untrained_one() -> None:
    probe = probe_of([])
    assert probe.trained >= probe.untrained + 0.10


def test_a_short_pretraining_of_a_small_model_is_above_the_untrained_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = ["model.hidden_size=48", "model.num_blocks=2", "model.intermediate_size=96"]
    probe = probe_of([*small, "pretraining.steps=80"])
    assert probe.trained > probe.untrained + 0.02


def test_without_validation_examples_there_is_nothing_to_probe_with() -> None:
    nowhere = Foundation(Path("nowhere"), vit_config(recipes.Model()), {})
    assert probe_foundation(nowhere, recipes.load("digits", ["data.validation=0"])) is None
