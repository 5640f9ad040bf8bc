"""A study carried out: a run folder a row and seed, one table, and nothing lost when it is killed."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ecogen.config import Recipe, to_table
from ecogen.reports.toml import to_toml
from tests.command import Ran, relatives, started, wait_until

RecipeOf = Callable[..., Recipe]
EcoGen = Callable[..., Ran]

SWEEP = """
[sweep]
seeds = [0, 1]
source = "somebody"
[[sweep.cases]]
name = "1 cluster"
reference = { first = 0.1, last = 0.2 }
beside = true
[[sweep.cases]]
name = "Full: all of it"
part = "ablations"
change = { tunables.backbone = "all" }
"""


@pytest.fixture
def path(recipe_of: RecipeOf, tmp_path: Path) -> Path:
    recipe = recipe_of(tuning={"rounds": 2}, topology={"clusters_per_edge": 1}, evaluation={"requests": 0})
    (tmp_path / "study.toml").write_text(to_toml(to_table(recipe)) + SWEEP)
    return tmp_path / "study.toml"


def accuracies(folder: Path) -> list[float]:
    accuracy = json.loads((folder / "summary.json").read_text())["accuracy"]
    return [accuracy["first"], accuracy["last"]]


def test_every_run_has_a_folder_and_the_table_is_of_them(ecogen: EcoGen, path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    ran = ecogen("run", path, "--out", folder, "--json")
    assert ran.code == 0, ran.err
    assert "1 cluster, seed 1: " in ran.err
    one, full = ran.figures["table"][0], ran.figures["parts"]["ablations"][0]
    assert ran.figures == json.loads((folder / "table.json").read_text())
    of_one = [accuracies(folder / "runs" / "1-cluster" / f"seed-{seed}") for seed in (0, 1)]
    assert [one["first"], one["last"]] == [list(values) for values in zip(*of_one, strict=True)]
    assert one["last_mean"] == pytest.approx(sum(one["last"]) / 2)
    assert set(one["beside"]) == {"1-NN", "SVM"}
    assert full["tunable_fraction"] == 1
    assert (folder / "runs" / "full-all-of-it" / "seed-1" / "report.html").exists()
    assert "somebody, last" in (folder / "report.html").read_text()

    assert "--resume to go on" in ecogen("run", path, "--out", folder).err
    written = (folder / "runs" / "1-cluster" / "seed-0" / "summary.json").stat().st_mtime_ns
    again = ecogen("run", path, "--out", folder, "--resume", "--json")
    assert again.figures == ran.figures
    assert (folder / "runs" / "1-cluster" / "seed-0" / "summary.json").stat().st_mtime_ns == written
    other = ecogen("run", path, "--out", folder, "--resume", "--set", "tuning.rounds=3")
    assert other.code == 2
    assert "holds a study of other recipes" in other.err
    shown = ecogen("report", folder)
    assert shown.code == 0, shown.err
    assert ecogen("status", folder).out.count("finished after 2 rounds") == 4


def test_a_run_that_fails_is_named_with_its_reason(ecogen: EcoGen, path: Path, tmp_path: Path) -> None:
    (tmp_path / "study" / "runs" / "1-cluster" / "seed-0").mkdir(parents=True)
    (tmp_path / "study" / "runs" / "1-cluster" / "seed-0" / "nodes").write_text("in the way")
    ran = ecogen("run", path, "--out", tmp_path / "study")
    assert ran.code == 2
    assert "1 cluster, seed 0: " in ran.err
    assert "then --resume" in ran.err


@pytest.mark.parametrize("text", ["{", "{}", '{"sweep": 5}'])
def test_a_damaged_study_is_no_loss(ecogen: EcoGen, path: Path, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "study.json").write_text(text)
    ran = ecogen("report", folder)
    assert ran.code == 2
    assert "does not say what the study is" in ran.err
    assert "remove that file, then run the recipe again" in ran.err


@pytest.mark.parametrize("more", [["--detach"], ["--set", "sweep.seeds=[]"], ["--resume"]])
def test_what_a_study_does_not_take(ecogen: EcoGen, path: Path, tmp_path: Path, more: list[str]) -> None:
    ran = ecogen("run", path, "--out", tmp_path / "study", *more)
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_study_is_resumed_as_if_nothing_had_happened(
    ecogen: EcoGen, path: Path, tmp_path: Path, name: signal.Signals
) -> None:
    folder = tmp_path / "study"
    with started("run", path, "--out", folder, "--at-once", "1") as process:
        wait_until(lambda: list(folder.glob("runs/*/*/summary.json")))
        family = relatives(process.pid)
        process.send_signal(name)
        process.wait(timeout=30)
        if name == signal.SIGTERM:
            wait_until(lambda: not any(child.is_running() for child in family), 20)
    assert len(list(folder.glob("runs/*/*/summary.json"))) < 4
    resumed = ecogen("run", path, "--out", folder, "--resume", "--json")
    assert resumed.code == 0, resumed.err
    whole = ecogen("run", path, "--out", tmp_path / "whole", "--json")
    for part in ("first", "last"):
        assert [row[part] for row in resumed.figures["table"]] == [row[part] for row in whole.figures["table"]]
