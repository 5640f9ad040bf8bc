"""Going back to a version: what is served then, what a resumed run goes on from, and what cannot be gone back to."""

from __future__ import annotations

import asyncio
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from ecogen.config import Recipe
from ecogen.engines import session
from ecogen.engines.run_folder import load_recipe, locked
from ecogen.models.adapters import load_tuned
from ecogen.models.checkpoint import load_tensors
from ecogen.records import EventRecord, RelayRecord, RoundRecord, read_records
from ecogen.relay import assessment
from ecogen.relay.judge import train_judge
from ecogen.relay.versions import load, path_of
from ecogen.tuning.edge_state import EdgeState
from tests.command import Ran, call, save_recipe
from tests.pictures import make_sure, pair_recipe, rehearse_little, save_pair_foundation


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_sure(monkeypatch)
    rehearse_little(monkeypatch)
    monkeypatch.setattr(assessment, "train_judge", partial(train_judge, steps=5))


@pytest.fixture
def ecogen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *arguments: call(arguments, capsys, monkeypatch)


def relayed(foundation: Path, rounds: int) -> Recipe:
    spec = {"every": 1, "samples": 20, "steps": 12, "learning_rate": 2e-2, "tolerance": 100.0}
    return pair_recipe(foundation, relay=spec, tuning={"rounds": rounds})


def tune(recipe: Recipe, folder: Path, *, resume: bool = False) -> None:
    asyncio.run(session.run(recipe, folder, resume=resume, screen=Console(quiet=True)))


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair_foundation(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(foundation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds, each followed by lessons; for tests that do not write there."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        make_sure(patch)
        rehearse_little(patch)
        patch.setattr(assessment, "train_judge", partial(train_judge, steps=5))
        tune(relayed(foundation, 2), folder)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def versions_of(folder: Path, node: str) -> Path:
    return folder / "nodes" / node / "relay"


def are_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def refused(ran: Ran, *said: str) -> None:
    assert ran.code == 2
    assert ran.out == ""
    for part in said:
        assert part in ran.err, ran.err


def served(folder: Path, edge: str | None = None) -> dict[str, Tensor]:
    """What an adapter folder holds, by the names of tunables."""
    own = folder if edge is None else folder / "edges" / edge
    tensors = load_tensors(own / "adapter" / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def test_a_run_that_was_cut_off_while_it_was_saved_is_saved_when_it_is_resumed(
    foundation: Path, finished: Path, copied: Path
) -> None:
    """Its edges are asked for what they hold at once; before, that was an error for ever."""
    for name in ("facts.json", "summary.json", "report.html", "tunables.safetensors"):
        (copied / name).unlink()
    shutil.rmtree(copied / "edges")
    tune(relayed(foundation, 2), copied, resume=True)
    for edge in (None, "edge-0", "edge-1"):
        assert are_equal(served(copied, edge), served(finished, edge))
    before, after = (json.loads((folder / "summary.json").read_text()) for folder in (finished, copied))
    assert [after[name] for name in ("recognised", "rounds", "relay")] == [
        before[name] for name in ("recognised", "rounds", "relay")
    ]


def test_versions_are_listed(finished: Path, ecogen: Any) -> None:
    listed = ecogen("versions", finished, "--json").figures
    records = json.loads((finished / "summary.json").read_text())["relay"]
    accepted = {(one["node_id"], one["version"]): one for one in [*records["up"], *records["down"]] if one["accepted"]}
    cloud = [one for one in listed if one["node_id"] == "cloud"]
    assert [one["what"] for one in cloud] == ["delivered"] + ["after"] * (len(cloud) - 1)
    assert [one["version"] for one in cloud] == [*range(len(cloud))]
    assert len(cloud) > 1
    for edge in ("edge-0", "edge-1"):
        own = [one for one in listed if one["node_id"] == edge]
        assert [one["what"] for one in own] == ["before", "after"] * (len(own) // 2)
    assert {(one["node_id"], one["version"]) for one in listed if one["what"] == "after"} == accepted.keys()
    for one in listed:
        told = accepted.get((one["node_id"], one["version"]))
        assert (one["accepted_s"] is None) == (told is None)
        assert set(one["scores"]) == ({*told["new"], *told["known"]} if told else set())
        if told:
            assert (one["round_index"], one["cycle"]) == (told["round_index"], told["cycle"])
    used = [one["node_id"] for one in listed if one["in_use"]]
    assert sorted(used) == sorted({one["node_id"] for one in listed})
    shown = ecogen("versions", finished).out
    assert shown.count(" after ") == len(accepted)


def test_the_cloud_goes_back_for_whoever_uses_it(copied: Path, ecogen: Any) -> None:
    delivered = load(versions_of(copied, "cloud"), 0)
    assert not are_equal(served(copied), delivered)
    before, figures = load_tuned(copied).state_dict(), json.loads((copied / "summary.json").read_text())
    done = ecogen("rollback", copied, "--node", "cloud", "--to", 0, "--json").figures
    assert (done["version"], done["set_aside"], done["saved"]) == (0, None, True)
    assert are_equal(served(copied), delivered)
    assert are_equal(load_tensors(copied / "tunables.safetensors"), delivered)
    assert not are_equal(before, load_tuned(copied).state_dict())
    new = json.loads((copied / "summary.json").read_text())
    (event,) = [one for one in new["events"] if one["event"] == "rolled_back"]
    assert (event["node_id"], event["detail"]) == ("cloud", f"from version {done['before']} to version 0")
    assert "rolled back" in (copied / "report.html").read_text()
    assert new["perplexity"] == figures["perplexity"], "the edges' models are what they were"
    again = ecogen("rollback", copied, "--node", "cloud", "--to", done["before"], "--json").figures
    assert again["before"] == 0
    assert are_equal(before, load_tuned(copied).state_dict()), "nothing was lost"


def test_an_edge_goes_back_and_is_judged_anew(copied: Path, ecogen: Any) -> None:
    """What it had is a version; where rounds had tuned it since, it becomes one."""
    state = EdgeState.load(copied / "nodes" / "edge-0" / "state.safetensors")
    tuned = {name: tensor + 0.01 for name, tensor in state.tunables.items()}
    EdgeState(tuned, 2, version=state.version, latest=state.latest).save(copied / "nodes/edge-0/state.safetensors")
    shutil.copy(path_of(versions_of(copied, "edge-0"), 0), path_of(versions_of(copied, "edge-0"), state.latest + 1))
    listed = ecogen("versions", copied, "--json").figures
    assert max(one["version"] for one in listed if one["node_id"] == "edge-0") == state.latest, "cut off, not accepted"
    own = [one for one in listed if one["node_id"] == "edge-0"]
    assert [one["version"] for one in own if one["tuned_on"]] == [state.version]
    before = json.loads((copied / "summary.json").read_text())["perplexity"]
    ran = ecogen("rollback", copied, "--node", "edge-0", "--to", 0)
    assert ran.code == 0, ran.err
    assert ran.out.startswith(f"edge-0: from version {state.version} to version 0; what it had is version")
    assert are_equal(served(copied, "edge-0"), load(versions_of(copied, "edge-0"), 0))
    assert are_equal(load(versions_of(copied, "edge-0"), state.latest + 1), tuned)
    after = json.loads((copied / "summary.json").read_text())["perplexity"]
    assert after["edge-0"]["saved"] != before["edge-0"]["saved"]
    assert after["edge-1"] == before["edge-1"]
    assert ecogen("rollback", copied, "--node", "edge-0", "--to", 0).out == "edge-0 has version 0 already\n"
    told = json.loads((copied / "summary.json").read_text())["events"]
    assert len([one for one in told if one["event"] == "rolled_back"]) == 1, "once"


@pytest.mark.parametrize("place", ["replace_text", "RelayState.save", "judge_again"])
def test_a_rollback_that_was_cut_off_is_finished(
    place: str, copied: Path, ecogen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(f"ecogen.engines.rollback.{place}", partial(_fail, OSError(28, "No space left on device")))
        refused(ecogen("rollback", copied, "--node", "cloud", "--to", 0), "No space left")
    delivered = load(versions_of(copied, "cloud"), 0)
    assert are_equal(served(copied), delivered) == (place == "judge_again")
    assert ecogen("rollback", copied, "--node", "cloud", "--to", 0).code == 0
    assert are_equal(served(copied), delivered)
    for log in (copied / "records.jsonl", copied / "nodes" / "cloud" / "records.jsonl"):
        told = read_records(log.read_bytes().splitlines(keepends=True), str(log))
        assert len([one for one in told if isinstance(one, EventRecord) and one.event == "rolled_back"]) == 1


def _fail(problem: Exception, *_: object) -> None:
    raise problem


def test_a_resumed_run_goes_on_from_it(copied: Path, ecogen: Any) -> None:
    """Two more rounds: what was gone back to is what they begin with, and no version is written over."""
    latest = {
        node: max(one["version"] for one in ecogen("versions", copied, "--json").figures if one["node_id"] == node)
        for node in ("cloud", "edge-0")
    }
    kept = {path: path.read_bytes() for path in copied.rglob("version-*.safetensors")}
    for node in ("cloud", "edge-0"):
        assert ecogen("rollback", copied, "--node", node, "--to", 0).code == 0
    lose_record(copied / "nodes" / "cloud" / "records.jsonl", cycle=1)
    recipe = save_recipe(load_recipe(copied), copied.parent / "recipe.toml")
    refused(
        ecogen("run", recipe, "--out", copied, "--resume", "--set", "tuning.rounds=1"),
        "tuning.rounds is 2 there and 1 here",
    )
    ran = ecogen("run", recipe, "--out", copied, "--resume", "--set", "tuning.rounds=4", "--json")
    assert ran.code == 0, ran.err
    assert (ran.figures["rounds"], ran.figures["rounds_planned"]) == (4, 4)
    assert [one["event"] for one in ran.figures["events"]].count("rolled_back") == 2
    assert {path: path.read_bytes() for path in kept} == kept
    log = copied / "records.jsonl"
    records = read_records(log.read_bytes().splitlines(keepends=True), str(log))
    ups = sorted((r for r in records if isinstance(r, RelayRecord) and r.direction == "up"), key=lambda r: r.cycle)
    assert [r.cycle for r in ups] == [0, 1, 2, 3], "what nobody had heard of is told again"
    first, third = ups[0], ups[2]
    assert third.scores[-1].name == "before the relay" == first.scores[-1].name
    assert third.version == (latest["cloud"] + 1 if third.accepted else 0)
    assert third.accepted
    known = {one.name: one.before for one in first.scores}["before the relay"]
    assert third.scores[-1].before == pytest.approx(known), "both are of the delivered model"
    rounds = [r.round_index for r in records if isinstance(r, RoundRecord) and r.node_id == "edge-0"]
    assert sorted(rounds) == [0, 1, 2, 3]
    assert are_equal(served(copied, "edge-0"), dict(EdgeState.load(copied / "nodes/edge-0/state.safetensors").tunables))


def lose_record(log: Path, cycle: int) -> None:
    """As where the cloud dies between committing a lesson and telling of it."""
    lines = log.read_bytes().splitlines(keepends=True)
    told = zip(lines, read_records(lines, str(log)), strict=True)
    kept = [line for line, r in told if not (isinstance(r, RelayRecord) and r.direction == "up" and r.cycle == cycle)]
    assert len(kept) == len(lines) - 1
    log.write_bytes(b"".join(kept))


def test_what_cannot_be_gone_back_to(
    finished: Path, copied: Path, foundation: Path, tmp_path: Path, ecogen: Any
) -> None:
    back = partial(ecogen, "rollback")
    refused(back(finished, "--node", "cloud", "--to", 99), "cloud of", "has no version 99; it has 0, 1")
    refused(back(finished, "--node", "edge-7", "--to", 0), "no versions of 'edge-7'; name one of cloud, edge-0, edge-1")
    refused(back(finished, "--node", "edge-0.cluster-0.device-0", "--to", 0), "name one of cloud")
    assert back(finished, "--node", "cloud", "--to", -1).code == 2
    assert back(finished, "--to", 0).code == 2
    refused(back(tmp_path, "--node", "cloud", "--to", 0), "is no run folder")
    refused(ecogen("versions", tmp_path), "is no run folder")
    with locked(copied):
        (copied / "running.json").write_text('{"pid": 4711, "cloud": "x"}')
        assert ecogen("versions", copied).code == 0
        refused(back(copied, "--node", "cloud", "--to", 0), "`kill 4711` ends it in order", "--resume")
    path_of(versions_of(copied, "cloud"), 1).write_bytes(b"nonsense")
    refused(back(copied, "--node", "cloud", "--to", 1), "version-1.safetensors is missing or corrupt")
    shutil.rmtree(copied / "nodes")
    refused(ecogen("versions", copied), "has no nodes folder", "their disks")


def test_a_run_without_a_relay_has_no_versions(foundation: Path, tmp_path: Path, ecogen: Any) -> None:
    from ecogen.engines.run_folder import write_recipe

    write_recipe(tmp_path / "run", pair_recipe(foundation))
    refused(ecogen("versions", tmp_path / "run"), "has no versions: its recipe has no relay")
    refused(ecogen("rollback", tmp_path / "run", "--node", "cloud", "--to", 0), "set relay.every or relay.drift")
