"""An edge whose domain drifts: it asks for lessons out of turn, alone, once, and whoever is killed meanwhile."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ecogen.config import Recipe, build_topology, load
from ecogen.errors import ConfigError
from ecogen.records import Record, RelayRecord
from ecogen.reports.relay import relay_of
from ecogen.reports.relay_tables import lessons_table
from tests.pictures import make_sure, pair_recipe, rehearse_little, save_pair_foundation
from tests.runs import Finished, finish, run, running, until

FIRST, OTHERS = [0, 1, 2], [7, 8]


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair_foundation(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def sure(monkeypatch: pytest.MonkeyPatch) -> None:
    make_sure(monkeypatch)
    rehearse_little(monkeypatch)


def drifting(foundation: Path, rounds: int, later: Mapping[str, Any], **relay: Any) -> Recipe:
    """edge-0 has other digits from a round on; what is learnt at all is accepted."""
    sources = {
        "edge-0": {"name": "digits", "labels": FIRST, "later": dict(later)},
        "edge-1": {"name": "digits", "labels": [4, 5, 6]},
    }
    spec = {"every": 0, "drift": 0.01, "samples": 20, "steps": 12, "learning_rate": 2e-2, "tolerance": 100.0} | relay
    data = {"train": 24, "validation": 16, "test": 8, "sources": sources}
    tuning = {"rounds": rounds, "local_epochs": 2, "learning_rate": 2e-2}
    return pair_recipe(foundation, relay=spec, data=data, tuning=tuning)


def both_causes(foundation: Path) -> Recipe:
    """Lessons after the second and fourth round, and a drift in the third."""
    return drifting(foundation, 4, {"round": 3, "labels": OTHERS}, every=2)


@pytest.fixture(scope="module")
def whole(foundation: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    with pytest.MonkeyPatch.context() as patch:
        make_sure(patch)
        rehearse_little(patch)
        return asyncio.run(run(both_causes(foundation), tmp_path_factory.mktemp("whole"), timeout_s=90))


def lessons(records: Sequence[Record]) -> list[RelayRecord]:
    told = [record for record in records if isinstance(record, RelayRecord)]
    return sorted(told, key=lambda one: (one.cycle, one.direction != "up", one.node_id))


def test_lessons_by_schedule_and_one_by_drift(whole: Finished) -> None:
    told = [(one.cycle, one.node_id, one.cause, one.round_index) for one in lessons(whole.records)]
    scheduled = [
        [(cycle, "cloud", "schedule", last), (cycle, "edge-0", "schedule", last), (cycle, "edge-1", "schedule", last)]
        for cycle, last in ((0, 1), (2, 3))
    ]
    assert told == [*scheduled[0], (1, "cloud", "drift", 2), (1, "edge-0", "drift", 2), *scheduled[1]]


def test_one_edge_teaches_alone_and_what_others_taught_is_learnt_along(whole: Finished) -> None:
    first, *_, alone, _ = [one for one in lessons(whole.records) if one.direction == "up"]
    assert first.accepted
    assert first.teachers == ("edge-0", "edge-1")
    assert alone.teachers == ("edge-0",)
    names = {score.name: score.is_new for score in alone.scores}
    assert names == {
        "edge-0": True,
        "edge-0, earlier": False,
        "edge-1, earlier": False,
        "before the relay": False,
    }
    assert all(score.before > 1 and score.after > 1 for score in alone.scores)
    told = {one.node_id: one.p_value for one in lessons(whole.records) if one.cause == "drift"}
    assert told["cloud"] is None, "what an edge's pairs are like stays there"
    assert told["edge-0"] is not None
    assert told["edge-0"] < 0.01


@pytest.mark.parametrize("victim", ["cloud", pytest.param("edge-0", marks=pytest.mark.slow)])
async def test_who_is_killed_gives_and_takes_the_same_lessons_once(
    victim: str, whole: Finished, foundation: Path, tmp_path: Path
) -> None:
    async with running(both_causes(foundation), tmp_path) as (federation, engine):
        finishing = asyncio.create_task(finish(federation))
        await until(lambda: any(one.cause == "drift" for one in lessons(federation.records)), 60)
        await engine.kill(victim)
        await engine.start_node(victim)
        killed = await asyncio.wait_for(finishing, 60)
    ours, theirs = (
        [(one.cycle, one.node_id, one.cause, one.scores, one.version, one.p_value) for one in lessons(done.records)]
        for done in (killed, whole)
    )
    assert ours == theirs
    assert all(torch.equal(tensor, killed.tunables[name]) for name, tensor in whole.tunables.items())


@pytest.mark.parametrize("level", [0.01, 0.0])
async def test_new_pictures_of_the_same_digits_are_no_drift(level: float, foundation: Path, tmp_path: Path) -> None:
    later = {"round": 2, "labels": FIRST if level else OTHERS}
    done = await run(drifting(foundation, 2, later, drift=level, every=0 if level else 9), tmp_path, timeout_s=60)
    assert not lessons(done.records)
    assert len(done.rounds("edge-0")) == 2
    assert level == 0 or (tmp_path / "nodes" / "edge-0" / "relay" / "known.safetensors").exists()


def test_what_a_drift_is_asked_of(foundation: Path) -> None:
    with pytest.raises(ConfigError, match=r"relay\.drift: input should be less than 1"):
        drifting(foundation, 3, {"round": 2, "labels": OTHERS}, drift=1.0)
    with pytest.raises(ConfigError, match=r"tuning\.cloud_every: edges that teach each other"):
        pair_recipe(foundation, relay={"drift": 0.01}, tuning={"cloud_every": 1})
    with pytest.raises(ConfigError, match=r"relay\.drift: models teach each other by drawing"):
        load("digits", ["relay.drift=0.01"])


def test_the_report_says_why(whole: Finished, foundation: Path) -> None:
    relay = relay_of(whole.records, build_topology(both_causes(foundation).topology), 0)
    assert relay is not None
    assert [(one["cycle"], one["cause"], one["round_index"]) for one in relay["up"]] == [
        (0, "schedule", 1),
        (1, "drift", 2),
        (2, "schedule", 3),
    ]
    rows = {(row[0], row[1]): row[-1] for row in lessons_table(relay).rows}
    assert rows["1", "down, cloud to edge-1"] == "schedule after round 2"
    assert re.fullmatch(r"drift after round 3, p = \d\.?\d*(e-\d+)?", rows["2", "down, cloud to edge-0"])
    assert [one["cycle"] for one in relay["cycles"]] == [0, 1, 2]
    assert all(one["energy_j"] > 0 for one in relay["cycles"])
