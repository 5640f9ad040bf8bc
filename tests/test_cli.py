"""What a person sees of the command line: help, and what it says of bad input. Nothing here starts a process."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import typer.main
from PIL import Image

from ecogen.cli import app
from ecogen.config import Recipe
from ecogen.engines.run_folder import locked
from ecogen.models.checkpoint import load_tensors
from ecogen.storage import write_atomically
from tests.command import Ran, save_recipe

RecipeOf = Callable[..., Recipe]
EcoGen = Callable[..., Ran]


def commands(group: Any, path: str = "ecogen") -> Iterator[tuple[str, Any]]:
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{path} {name}")


COMMANDS = dict(commands(typer.main.get_command(app)))


def test_there_are_all_verbs() -> None:
    verbs = {path.removeprefix("ecogen ") for path in COMMANDS} - {"ecogen"}
    own = {
        "run",
        "plan",
        "report",
        "predict",
        "generate",
        "teach",
        "versions",
        "rollback",
        "serve",
        "status",
        "watch",
        "node",
        "certs",
    }
    assert verbs == own | {f"certs {verb}" for verb in ("init", "issue", "revoke", "show")}


@pytest.mark.parametrize("path", COMMANDS)
def test_every_verb_and_option_has_help_that_fits(path: str, ecogen: EcoGen, monkeypatch: pytest.MonkeyPatch) -> None:
    command = COMMANDS[path]
    assert command.help
    for parameter in command.params:
        assert parameter.help, f"{path}: {parameter.name} has no help"
    summary = command.get_short_help_str(limit=200)
    assert len(summary) <= 64 or path == "ecogen", "cut off in the list of verbs at 80 columns"
    shown = ecogen(*path.split()[1:], "--help")
    assert shown.code == 0
    assert shown.out.startswith(f"Usage: {path} ")


def test_a_process_that_python_m_ecogen_starts_may_import_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As multiprocessing does with the main module of whoever starts it."""
    monkeypatch.setattr("sys.argv", ["ecogen", "--help"])
    runpy.run_module("ecogen", run_name="__mp_main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("ecogen", run_name="__main__")
    assert ended.value.code == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, foundation: Path) -> Path:
    """The folder of a finished run, for tests that do not write there."""
    import asyncio

    from rich.console import Console

    from ecogen.engines import session
    from tests.tiny import tiny_recipe

    folder = tmp_path_factory.mktemp("runs") / "finished"
    recipe = tiny_recipe(foundation, tuning={"rounds": 1})
    asyncio.run(session.run(recipe, folder, resume=False, screen=Console(quiet=True)))
    return folder


@pytest.fixture
def damaged(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, for tests that damage it."""
    import shutil

    return Path(shutil.copytree(finished, tmp_path / "damaged"))


def refused(ran: Ran, *said: str) -> None:
    """It ended with code 2, printed nothing, and said all of this."""
    assert ran.code == 2
    assert ran.out == ""
    for part in said:
        assert part in ran.err, ran.err


def test_json_is_all_that_is_printed(recipe_of: RecipeOf, tmp_path: Path, ecogen: EcoGen) -> None:
    path, folder = save_recipe(recipe_of(tuning={"rounds": 1}), tmp_path / "r.toml"), tmp_path / "run"
    ran = ecogen("run", path, "--out", folder, "--json", "--set", "tuning.local_epochs=0")
    assert ran.code == 0, ran.err
    assert ran.out.count("\n") == 1
    assert ran.figures["rounds"] == 1
    assert (
        ran.figures == json.loads((folder / "summary.json").read_text()) == ecogen("report", folder, "--json").figures
    )
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    answer = ecogen("predict", folder, tmp_path / "black.png", "--json").figures
    assert answer["predictions"][0]["image"] == str(tmp_path / "black.png")
    assert answer["latency_s"] > 0


def test_unknown_key(ecogen: EcoGen, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    refused(
        ecogen("run", "digits", "--set", "tuning.round=3", "--out", folder), "tuning.round: unknown key", "'rounds'"
    )
    refused(ecogen("run", "digits", "--set", "engine=ray", "--out", folder), "engine", "'inproc'", "'ray'")
    refused(ecogen("run", "digits", "--set", "tuning.rounds=0", "--set", "seed=-1"), "2 problems", "rounds", "seed")
    assert not folder.exists()


def test_missing_recipe(ecogen: EcoGen, tmp_path: Path) -> None:
    refused(ecogen("run", tmp_path / "none.toml"), "none.toml", "No such file", "built-in recipes: digits")
    (tmp_path / "bad.toml").write_text("rounds = = 3")
    refused(ecogen("run", tmp_path / "bad.toml"), "bad.toml", "not TOML")


def test_unknown_zone(ecogen: EcoGen, recipe_of: RecipeOf, tmp_path: Path) -> None:
    path = save_recipe(recipe_of(topology={"sites": {"edge-0": {"zone": "FX"}}}), tmp_path / "r.toml")
    refused(ecogen("run", path, "--out", tmp_path / "run"), "zone 'FX' has no carbon intensity", "'FR'")
    assert not (tmp_path / "run").exists()


def test_an_unknown_strategy(ecogen: EcoGen, tmp_path: Path) -> None:
    ran = ecogen("run", "digits", "--set", "aggregation.strategy=fedavgg", "--out", tmp_path / "run")
    refused(ran, "aggregation.strategy: 'fedavgg' is no strategy; did you mean 'fedavg'?")
    assert not (tmp_path / "run").exists()


def test_too_few_examples_are_found_before_anything_is_begun(
    ecogen: EcoGen, recipe_of: RecipeOf, tmp_path: Path
) -> None:
    recipe = save_recipe(recipe_of(data={"train": 1700, "validation": 97}), tmp_path / "r.toml")
    refused(ecogen("run", recipe, "--out", tmp_path / "run"), "leave no test examples of 1797; lower one of them")
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_fit(ecogen: EcoGen, recipe_of: RecipeOf, tmp_path: Path) -> None:
    """It says which segment, by how much, and what would fit; and leaves nothing that blocks the next try."""
    name, folder = "edge-0.cluster-0.device-1", tmp_path / "run"
    small = recipe_of(
        topology={"devices": {name: {"memory_gib": 7e-5}}, "devices_per_cluster": 2}, placement={"cuts": [1]}
    )
    ran = ecogen("run", save_recipe(small, tmp_path / "small.toml"), "--out", folder)
    refused(ran, "blocks 1..3", f"'{name}' has", "over)", "it can hold at most 1 block", "move the cut from 1 to 2")
    many = recipe_of(topology={"devices_per_cluster": 7})
    ran = ecogen("run", save_recipe(many, tmp_path / "many.toml"), "--out", folder)
    refused(ran, "7 devices cannot share 3 blocks", "at most 3 devices a cluster")
    assert not folder.exists()
    fits = save_recipe(recipe_of(tuning={"rounds": 1, "local_epochs": 0}), tmp_path / "fits.toml")
    assert ecogen("run", fits, "--out", folder).code == 0


def test_a_corrupt_foundation(ecogen: EcoGen, recipe_of: RecipeOf, tmp_path: Path, foundation: Path) -> None:
    import shutil

    broken = Path(shutil.copytree(foundation, tmp_path / "broken"))
    os.truncate(broken / "model.safetensors", 2000)
    path = save_recipe(recipe_of(model={"source": str(broken)}), tmp_path / "r.toml")
    refused(ecogen("run", path, "--out", tmp_path / "run"), str(broken / "model.safetensors"), "corrupt", "restore it")
    none = save_recipe(recipe_of(model={"source": str(tmp_path / "none")}), tmp_path / "n.toml")
    refused(ecogen("run", none, "--out", tmp_path / "run"), "none is no model folder", "save_pretrained")
    other = save_recipe(recipe_of(model={"image_size": 12}), tmp_path / "o.toml")
    refused(ecogen("run", other, "--out", tmp_path / "run"), "image_size 8", "says 12", "set model.image_size=8")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_given_more_rounds(ecogen: EcoGen, recipe_of: RecipeOf, tmp_path: Path) -> None:
    """It ends as one that was to have as many from its start; to have fewer it cannot go on."""
    path = save_recipe(recipe_of(tuning={"rounds": 1}), tmp_path / "r.toml")
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    assert ecogen("run", path, "--out", parts).code == 0
    ran = ecogen("run", path, "--out", parts, "--resume", "--set", "tuning.rounds=2", "--json")
    assert ran.code == 0, ran.err
    assert ecogen("run", path, "--out", whole, "--set", "tuning.rounds=2").code == 0
    ours, theirs = (load_tensors(folder / "tunables.safetensors") for folder in (parts, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (ran.figures["rounds"], ran.figures["rounds_planned"]) == (2, 2)
    refused(ecogen("run", path, "--out", parts, "--resume"), "of another recipe: tuning.rounds is 2 there and 1 here")


def test_a_folder_that_holds_a_run(ecogen: EcoGen, finished: Path, tmp_path: Path) -> None:
    recipe = finished / "recipe.toml"
    refused(ecogen("run", recipe, "--out", finished), "holds a run already", "--resume", "--out")
    other = ecogen("run", recipe, "--out", finished, "--resume", "--set", "seed=4", "--set", "tuning.clip_norm=9")
    refused(
        other,
        "of another recipe: seed is 3 there and 4 here, tuning.clip_norm is 1.0 there and 9.0",
        f"ecogen run {recipe} --out {finished} --resume",
    )
    refused(ecogen("run", recipe, "--out", tmp_path / "new", "--resume"), "holds no run to resume", "leave --resume")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_running(ecogen: EcoGen, damaged: Path) -> None:
    with locked(damaged):
        for more in ([], ["--resume"], ["--resume", "--detach", "--engine", "local"]):
            ran = ecogen("run", damaged / "recipe.toml", "--out", damaged, *more)
            refused(ran, f"{damaged} belongs to a run that is going on", f"ecogen status {damaged}")
        assert "running, and its cloud does not answer" in ecogen("status", damaged).out


def test_resuming_a_finished_run_changes_nothing(ecogen: EcoGen, damaged: Path, finished: Path) -> None:
    before = json.loads((finished / "summary.json").read_text())
    after = ecogen("run", damaged / "recipe.toml", "--out", damaged, "--resume", "--json").figures
    assert after["accuracy"] == before["accuracy"]
    new, old = (load_tensors(folder / "tunables.safetensors") for folder in (damaged, finished))
    assert all(torch.equal(new[name], old[name]) for name in old)


@pytest.mark.parametrize("verb", ["status", "report", "predict"])
def test_no_run_folder(ecogen: EcoGen, tmp_path: Path, verb: str) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    images = [tmp_path / "black.png"] if verb == "predict" else []
    refused(ecogen(verb, tmp_path, *images), f"{tmp_path} is no run folder", "recipe.json")


@pytest.mark.parametrize(
    ("verb", "more"),
    {
        "report": [],
        "predict": ["a.png"],
        "generate": ["a seven"],
        "teach": [],
        "versions": [],
        "rollback": ["--node", "cloud", "--to", "0"],
        "serve": [],
    }.items(),
)
def test_a_folder_that_is_not_there_is_told_at_once_with_those_that_are(
    ecogen: EcoGen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, more: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    slow = mock.patch.dict(sys.modules, {name: None for name in sys.modules if name.startswith("ecogen.engines")})
    with slow:  # imports of what takes seconds fail
        refused(ecogen(verb, "none", *more), "there is no folder none; `ecogen run RECIPE` makes one")
        for name in ("one", "two"):
            write_atomically(tmp_path / "runs" / name / "recipe.json", "{}")
        refused(ecogen(verb, "none", *more), "there is no folder none; the runs here are runs/one, runs/two")


def test_damaged_run_folders(ecogen: EcoGen, damaged: Path, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(picture := tmp_path / "black.png")
    tunables, records = damaged / "tunables.safetensors", damaged / "records.jsonl"
    with restored(tunables):
        os.truncate(tunables, 1000)
        refused(ecogen("predict", damaged, picture), str(tunables), "corrupt", "restore it")
        tunables.unlink()
        refused(ecogen("predict", damaged, picture), str(tunables), "missing")
    with restored(records):
        records.write_bytes(records.read_bytes().replace(b'"type"', b'"tope"', 1))
        refused(ecogen("report", damaged), f"{records}:1: not a record", "restore")
    with restored(damaged / "recipe.json"):
        (damaged / "recipe.json").write_text('{"name": "tiny", ')
        refused(ecogen("report", damaged), "recipe.json cannot be read", "recipe.toml")
        (damaged / "recipe.json").write_text('{"name": "tiny", "elsewhen": 1}')
        refused(ecogen("report", damaged), "a version of EcoGen with other settings", "elsewhen")
        refused(ecogen("run", damaged / "recipe.toml", "--out", damaged, "--resume"), "a version of EcoGen with other")
    assert ecogen("report", damaged).code == 0


@pytest.mark.parametrize("name", ["cloud/state.safetensors", "edge-0/state.safetensors", "cloud/records.jsonl"])
def test_a_damaged_disk_of_a_node(ecogen: EcoGen, damaged: Path, name: str) -> None:
    for log in (damaged / "nodes").glob("*/records.jsonl"):  # or nobody would look at the rest
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"".join(line for line in lines if b'"finished"' not in line))
    path = damaged / "nodes" / name
    content = path.read_bytes()
    path.write_bytes(b"nonsense\n" + content[20:])
    ran = ecogen("run", damaged / "recipe.toml", "--out", damaged, "--resume")
    refused(ran, str(path), "restore")
    path.write_bytes(content)
    assert ecogen("run", damaged / "recipe.toml", "--out", damaged, "--resume").code == 0


def test_pictures_that_are_none(ecogen: EcoGen, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    refused(ecogen("predict", finished, tmp_path / "text.png"), "text.png", "PNG")
    missing = (tmp_path / "none.png", tmp_path, tmp_path / "nothing.png")
    refused(ecogen("predict", finished, *missing), "no such file", *map(str, missing))
    refused(ecogen("predict", finished, tmp_path), "give PNG files")
    assert ecogen("predict", finished, tmp_path / "text.png", "--engine", "rays").code == 2


def test_a_full_disk(ecogen: EcoGen, recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = save_recipe(recipe_of(tuning={"rounds": 3}), tmp_path / "r.toml")
    with small_disk(tmp_path / "disk") as enlarge:
        folder = tmp_path / "disk" / "run"
        ran = ecogen("run", recipe, "--out", folder)
        refused(ran, "No space left on device", str(folder), "free some space")
        enlarge()
        resume = ["--resume"] if (folder / "recipe.json").exists() else []
        again = ecogen("run", recipe, "--out", folder, "--json", *resume)
        assert again.code == 0, again.err
        here = ecogen("run", recipe, "--out", tmp_path / "run", "--json")
        assert again.figures["accuracy"] == here.figures["accuracy"]


@contextmanager
def restored(path: Path) -> Iterator[None]:
    content = path.read_bytes()
    yield
    path.write_bytes(content)


@contextmanager
def small_disk(path: Path, size: str = "150k") -> Iterator[Callable[[], None]]:
    """A disk that holds little; the function makes it large."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a small disk here")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", path], check=True) and None
    finally:
        subprocess.run(["umount", "-l", path], check=True)
