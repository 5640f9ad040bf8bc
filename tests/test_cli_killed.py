"""Whole runs that are killed, interrupted or left alone: they end in order or at once, and nothing is lost."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from ecogen.config import Recipe
from ecogen.engines.run_folder import is_running
from ecogen.models.checkpoint import load_tensors
from tests import runs
from tests.command import ECOGEN, Ran, relatives, save_recipe, started, wait_for_rounds, wait_until

RecipeOf = Callable[..., Recipe]
EcoGen = Callable[..., Ran]

ROUNDS = 4


@pytest.mark.parametrize("engine", [pytest.param("inproc", marks=pytest.mark.slow), "local"])
def test_a_killed_run_is_resumed_as_if_nothing_had_happened(
    recipe_of: RecipeOf, tmp_path: Path, ecogen: EcoGen, engine: str
) -> None:
    tuning = {"rounds": ROUNDS, "local_epochs": 10}
    recipe = recipe_of(tuning=tuning, topology={"edges": 2, "clusters_per_edge": 1})
    path, folder = save_recipe(recipe, tmp_path / "recipe.toml"), tmp_path / "run"
    with started("run", path, "--engine", engine, "--out", folder) as process:
        wait_for_rounds(folder, 1)
        family = relatives(process.pid)
        process.kill()
        assert_all_gone(family)
    assert len(family) >= (1 + 2 + 4 if engine == "local" else 0)
    assert "not finished, and nobody is running it" in ecogen("status", folder).out

    resumed = ecogen("run", folder / "recipe.toml", "--out", folder, "--resume", "--json")
    assert resumed.code == 0, resumed.err
    undisturbed = asyncio.run(runs.run(recipe, tmp_path / "undisturbed"))
    accuracy = resumed.figures["accuracy"]
    assert accuracy["per_round"] == [record.accuracy for record in undisturbed.rounds("cloud")]
    assert accuracy["per_edge"]["edge-1"] == [record.accuracy for record in undisturbed.rounds("edge-1")]
    tunables = load_tensors(folder / "tunables.safetensors")
    assert all(torch.equal(tunables[name], tensor) for name, tensor in undisturbed.tunables.items())
    assert {e["node_id"] for e in resumed.figures["events"] if e["event"] == "resumed"} == {"edge-0", "edge-1"}
    assert f"finished after {ROUNDS} rounds" in ecogen("status", folder).out


@pytest.mark.parametrize("name", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_its_nodes_and_says_how_to_go_on(
    recipe_of: RecipeOf, tmp_path: Path, name: signal.Signals
) -> None:
    path, folder = save_recipe(recipe_of(tuning={"rounds": 1000}), tmp_path / "recipe.toml"), tmp_path / "run"
    with started("run", path, "--engine", "local", "--out", folder) as process:
        wait_for_rounds(folder, 1)
        family = relatives(process.pid)
        process.send_signal(name)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130
        command = f"ecogen run {folder}/recipe.toml --out {folder} --resume"
        assert said.splitlines()[-1] == f"interrupted; go on with: {command}"
        assert "Traceback" not in said
        assert_all_gone(family)
    events = [record for record in runs.logged(folder) if type(record).__name__ == "EventRecord"]
    assert {event.event for event in events} == {"joined"}, "no node may take the end of another for a loss"


def test_a_detached_run_outlives_its_terminal(recipe_of: RecipeOf, tmp_path: Path, ecogen: EcoGen) -> None:
    recipe = recipe_of(tuning={"rounds": 10, "local_epochs": 10})
    path, folder = save_recipe(recipe, tmp_path / "recipe.toml"), tmp_path / "run"
    ours, terminal = os.openpty()
    command = f"{ECOGEN} run {path} --engine local --out {folder} --detach; sleep 1000"
    shell = subprocess.Popen(
        ["bash", "-c", command],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=_own_terminal,
    )
    os.close(terminal)
    said = os.read(ours, 10_000).decode()
    assert f"runs in the background; look at it with: ecogen status {folder}" in said
    os.close(ours)
    assert shell.wait(timeout=30) == -signal.SIGHUP

    wait_for_rounds(folder, 1)
    status = ecogen("status", folder)
    assert status.code == 0
    assert re.search(r"running; tuning \d+/10 edge-0; \d+ records", status.out), status.out
    nodes = {line.split()[0]: line for line in status.out.splitlines() if line.split()}
    for node_id in ("cloud", "edge-0", "edge-0.cluster-0.device-0"):
        assert re.search(r"ready +\d+ +(now|[\d.]+ (us|ms|s) ago)", nodes[node_id]), status.out
    busy = ecogen("run", path, "--out", folder, "--resume")
    assert (busy.code, "belongs to a run that is going on; see `ecogen status" in busy.err) == (2, True)
    assert ecogen("run", path, "--engine", "local", "--out", folder, "--detach").code == 2
    wait_until(lambda: (folder / "report.html").exists() and not is_running(folder))
    assert "finished after 10 rounds" in ecogen("status", folder).out
    assert f"{folder}: finished" in ecogen("status", tmp_path).out


@pytest.mark.slow
def test_a_detached_run_that_cannot_start_says_why(recipe_of: RecipeOf, tmp_path: Path, ecogen: EcoGen) -> None:
    recipe = recipe_of(topology={"devices_per_cluster": 9})
    ran = ecogen(
        "run", save_recipe(recipe, tmp_path / "r.toml"), "--engine", "local", "--out", tmp_path / "run", "--detach"
    )
    assert ran.code == 2
    assert "9 devices cannot share 3 blocks" in ran.err
    assert not (tmp_path / "run" / "recipe.json").exists()


def _own_terminal() -> None:
    """Take standard input as the controlling terminal, and mind its end even where the tests run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def assert_all_gone(family: list[psutil.Process]) -> None:
    """All end by themselves, within seconds."""
    began_s = time.monotonic()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    assert time.monotonic() - began_s < 15
