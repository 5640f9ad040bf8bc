"""The knowledge relay of a running federation: lessons up and down, refused where they harm, resumed, and billed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from ecogen.accounting.ledger import settle
from ecogen.config import Recipe, build_topology, load
from ecogen.engines.generating import generate
from ecogen.engines.served import find_served
from ecogen.errors import ConfigError
from ecogen.models.checkpoint import load_tensors
from ecogen.node.context import OPERATOR
from ecogen.records import RelayRecord
from ecogen.relay import assessment
from ecogen.relay.cloud_state import RelayState
from ecogen.relay.generator import Generator
from ecogen.relay.judge import train_judge
from ecogen.serving.sampling import Sampling
from ecogen.transport.base import Message
from ecogen.transport.memory import MemoryTransport
from ecogen.tuning.captions import digit_caption
from tests.pictures import SIZES, make_sure, pair_recipe, rehearse_little, save_pair_foundation
from tests.runs import Finished, finish, run, running, until
from tests.tiny import RecordingNetwork


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair_foundation(tmp_path_factory.mktemp("model"))


def relayed(foundation: Path, relay: Mapping[str, Any] | None = None, **sections: Any) -> Recipe:
    """Two rounds, each followed by lessons, of which all that can be learnt is accepted."""
    spec = {"every": 1, "samples": 20, "steps": 12, "learning_rate": 2e-2, "tolerance": 100.0} | dict(relay or {})
    return pair_recipe(foundation, relay=spec, tuning={"rounds": 2}, **sections)


def lessons(finished: Finished) -> list[RelayRecord]:
    return [record for record in finished.records if isinstance(record, RelayRecord)]


@pytest.fixture(autouse=True)
def little_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearse_little(monkeypatch)


@pytest.fixture
def sure(monkeypatch: pytest.MonkeyPatch) -> None:
    make_sure(monkeypatch)


@pytest.fixture(scope="module")
def undisturbed() -> dict[bool, Finished]:
    """Of the runs in which somebody is killed, what they come to where nobody is: without tunables, and with."""
    return {}


@pytest.mark.usefixtures("sure")
async def test_lessons_go_up_and_down(foundation: Path, tmp_path: Path) -> None:
    done = await run(relayed(foundation), tmp_path)
    told = lessons(done)
    assert sorted((one.cycle, one.direction, one.node_id) for one in told) == [
        (cycle, direction, node)
        for cycle in (0, 1)
        for direction, node in (("down", "edge-0"), ("down", "edge-1"), ("up", "cloud"))
    ]
    ups = [one for one in told if one.direction == "up"]
    assert ups[0].accepted
    assert ups[0].teachers == ("edge-0", "edge-1")
    assert [score.name for score in ups[0].scores] == ["edge-0", "edge-1", "before the relay"]
    assert [one.version for one in ups] == [1, 1 + ups[1].accepted]
    for one in told:
        assert 0 < one.num_samples <= one.num_drawn
        gain = sum(math.log(score.before) - math.log(score.after) for score in one.scores if score.is_new)
        assert (gain > 0) == one.accepted == (not one.reason)
    assert is_version(tmp_path, ups[1].version, done)


def is_version(folder: Path, number: int, done: Finished) -> bool:
    """Whether the cloud's model is that version of it."""
    tensors = load_tensors(folder / "nodes" / "cloud" / "relay" / f"version-{number}.safetensors")
    return all(torch.equal(tensor, done.tunables[name]) for name, tensor in tensors.items())


@pytest.mark.usefixtures("sure")
async def test_a_lesson_that_harms_is_refused_and_changes_nothing(
    foundation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(
        _: Generator, tunables: Mapping[str, torch.Tensor], *__: object, **___: object
    ) -> dict[str, torch.Tensor]:
        return {name: tensor + 3 for name, tensor in tunables.items()}

    monkeypatch.setattr(Generator, "learn", spoil)
    done = await run(relayed(foundation, {"tolerance": 0.05}), tmp_path / "harmed")
    told = lessons(done)
    assert not any(one.accepted for one in told)
    assert all(one.reason for one in told)
    assert {one.version for one in told} == {0}
    assert {path.name for path in (tmp_path / "harmed").rglob("version-*")} == {"version-0.safetensors"}
    alone = await run(pair_recipe(foundation, tuning={"rounds": 2}), tmp_path / "alone")
    for edge in ("edge-0", "edge-1"):
        ours, theirs = (one.rounds(edge) for one in (done, alone))
        assert [record.perplexity for record in ours] == [record.perplexity for record in theirs]


async def test_who_is_sure_of_nothing_hands_on_nothing(foundation: Path, tmp_path: Path) -> None:
    done = await run(relayed(foundation), tmp_path)
    told = lessons(done)
    assert {one.num_samples for one in told} == {0}
    assert {one.reason for one in told} == {
        "no edge drew what it, and others who know of it, were sure of",
        "the cloud drew nothing of what others know that this edge, too, was sure of",
    }


@pytest.mark.usefixtures("sure")
@pytest.mark.parametrize(
    ("moment", "victim"),
    [
        ("offers", "cloud"),
        ("the first lesson", "edge-0"),
        ("tunables", "cloud"),
        pytest.param("offers", "edge-0", marks=pytest.mark.slow),
        pytest.param("verdicts", "cloud", marks=pytest.mark.slow),
        pytest.param("verdicts", "edge-0", marks=pytest.mark.slow),
        pytest.param("the first lesson", "cloud", marks=pytest.mark.slow),
        pytest.param("verdicts with tunables", "cloud", marks=pytest.mark.slow),
        pytest.param("tunables", "edge-0", marks=pytest.mark.slow),
    ],
)
async def test_a_node_that_is_killed_gives_and_takes_the_same_lessons(
    moment: str, victim: str, foundation: Path, tmp_path: Path, undisturbed: dict[bool, Finished]
) -> None:
    sources = {"edge-1": {"name": "digits", "labels": [4, 5, 6, 7, 8, 9]}}
    recipe = relayed(foundation, {"tunables": "tunables" in moment}, data={"sources": sources})
    if recipe.relay.tunables not in undisturbed:
        undisturbed[recipe.relay.tunables] = await run(recipe, tmp_path / "whole")
    whole = undisturbed[recipe.relay.tunables]
    network = RecordingNetwork()
    async with running(recipe, tmp_path / "killed", network) as (federation, engine):
        finishing = asyncio.create_task(finish(federation))
        is_here = {
            "tunables": lambda: network.links("relay_tunables"),
            "offers": lambda: network.links("relay"),
            "verdicts": lambda: network.links("relay_verdict"),
            "verdicts with tunables": lambda: network.links("relay_verdict"),
            "the first lesson": lambda: any(isinstance(record, RelayRecord) for record in federation.records),
        }
        await until(is_here[moment])
        await engine.kill(victim)
        await engine.start_node(victim)
        killed = await asyncio.wait_for(finishing, 30)
    assert all(torch.equal(tensor, killed.tunables[name]) for name, tensor in whole.tunables.items())
    ours, theirs = (
        {
            (one.cycle, one.node_id): (one.scores, one.version, one.tunables_share, one.tunable_bytes)
            for one in lessons(done)
        }
        for done in (killed, whole)
    )
    assert ours == theirs


@pytest.mark.usefixtures("sure")
@pytest.mark.parametrize("confidence", [1.0, 0.0])
async def test_edges_that_know_the_same_check_each_others_lessons(
    confidence: float, foundation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has fewer real examples of a caption than another that holds its pictures for wrong teaches none of it.

    The cloud draws nothing of what nobody is left to teach.
    """
    monkeypatch.setattr(Generator, "confidence", lambda _, __, samples: torch.full((len(samples),), confidence))
    digits = {"name": "digits", "labels": [0, 1, 2]}
    done = await run(relayed(foundation, data={"sources": {"edge-0": digits, "edge-1": digits}}), tmp_path)
    ups = [one for one in lessons(done) if one.direction == "up"]
    downs = [one for one in lessons(done) if one.direction == "down"]
    assert [one.num_samples for one in ups] == [40, 40]
    assert {bool(one.num_disputed) for one in ups} == {confidence == 0}
    assert any(one.num_disputed for one in downs) == (confidence == 0), "of what another has drawn of the same"
    state = RelayState.load(tmp_path / "nodes" / "cloud" / "relay" / "state.safetensors")
    assert state.lesson is not None
    taught = {caption for own in state.taught.values() for caption in own.samples.captions}
    assert set(state.lesson.samples.captions) == taught
    assert len(taught) == (3 if confidence else 2), "both have as many zeros"


@pytest.mark.usefixtures("sure")
@pytest.mark.parametrize("with_tunables", [False, True])
async def test_what_crosses_the_link(
    with_tunables: bool, foundation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between cloud and edges: the backbone and tunables on joining, samples and scores; nothing of anybody's data.

    And edges' tunables, only where the recipe asks for them.
    """
    sent: list[Message] = []
    pack = MemoryTransport.pack

    def pack_and_keep(self: MemoryTransport, message: Message, receiver_id: str) -> Any:
        if "cloud" in (self.peer.node_id, receiver_id) and OPERATOR not in (self.peer.tier, receiver_id):
            sent.append(message)
        return pack(self, message, receiver_id)

    monkeypatch.setattr(MemoryTransport, "pack", pack_and_keep)
    recipe = relayed(foundation, {"tunables": with_tunables})
    done = await run(recipe, tmp_path)
    held = {(message.kind, message.method) for message in sent if message.tensors}
    assert held == {
        ("backbone", "fetch"),
        ("tunables", "join"),
        ("samples", "relay"),  # an offer, what others offered of the same captions, and the cloud's answer
        ("scores", "relay_verdict"),  # on what others offered
        *([("tunables", "relay_tunables")] if with_tunables else []),
    }
    tuned = [message for message in sent if message.method == "relay_tunables" and message.tensors]
    assert len(tuned) == 2 * 2 * with_tunables
    for message in tuned:
        assert message.tensors.keys() == done.tunables.keys()
        assert msgspec.msgpack.decode(message.body).keys() == {"cycle", "cause"}
    samples = [message for message in sent if message.kind == "samples"]
    assert len(samples) == 2 * 2 * 3
    assert {name for message in samples for name in message.tensors} == {"codes", "shown"}
    for message in samples:
        told = msgspec.msgpack.decode(message.body)
        assert told.keys() <= {"cycle", "captions", "num_drawn", "version", "cause", "is_closed"}
        assert set(told["captions"]["captions"]) <= {digit_caption(digit) for digit in range(10)}
        assert message.tensors["codes"].shape == (len(message.tensors["shown"]), SIZES.num_codes)
    for scores in (message for message in sent if message.kind == "scores"):
        assert scores.tensors.keys() == {"confidence"}
        assert msgspec.msgpack.decode(scores.body).keys() == {"cycle", "cause"}
    assert len(lessons(done)) == 6


@pytest.mark.usefixtures("sure")
async def test_lessons_are_billed(foundation: Path, tmp_path: Path) -> None:
    recipe = relayed(foundation)
    done = await run(recipe, tmp_path)
    ledger = settle(done.records, build_topology(recipe.topology))
    assert ledger.by_phase()["relay"].energy_j.mid > 0
    lines = [line for line in ledger.traffic() if line.kind == "samples"]
    assert [line.link_class for line in lines] == ["cloud_edge"]
    codes = 20 * 4  # samples, codes of each, of a byte
    assert lines[0].messages == 2 * 2 * 3
    assert 8 * codes < lines[0].sent_bytes < 8 * (codes + 20 + 1000) + 4 * 1000
    assert [line.link_class for line in ledger.traffic() if line.kind == "scores"] == ["cloud_edge"]
    assert sum(usage.flops for one in lessons(done) for usage in one.usages) > 0


@pytest.mark.usefixtures("sure")
async def test_a_saved_run_tells_of_the_relay(
    foundation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assessment, "train_judge", partial(train_judge, steps=5))
    recipe = relayed(foundation, {"tunables": True})
    async with running(recipe, tmp_path) as (federation, _):
        done = await finish(federation)
        summary = await federation.save(tmp_path)
    relay = summary["relay"]
    assert relay is not None
    assert [(one["cycle"], one["node_id"]) for one in relay["up"]] == [(0, "cloud"), (1, "cloud")]
    assert [(one["cycle"], one["node_id"]) for one in relay["down"]] == [
        (cycle, edge) for cycle in (0, 1) for edge in ("edge-0", "edge-1")
    ]
    ledger = settle(done.records, build_topology(recipe.topology))
    assert sum(one["energy_j"] for one in relay["cycles"]) == pytest.approx(ledger.by_phase()["relay"].energy_j.mid)
    payload = sum(line.payload_bytes for line in ledger.traffic() if line.kind == "samples")
    assert sum(one["sample_bytes"] for one in relay["cycles"]) == payload
    usages = [usage for one in lessons(done) for usage in one.usages]
    tunables = [
        line for usage in usages for line in usage.traffic if (line.receiver_id, line.kind) == ("cloud", "tunables")
    ]
    assert sum(one["tunable_bytes"] for one in relay["cycles"]) == sum(line.payload_bytes for line in tunables)
    assert sum(line.messages for line in tunables) == 2 * 2
    size = sum(tensor.nbytes for tensor in done.tunables.values())
    assert {one["tunable_bytes"] for one in relay["cycles"]} == {2 * size}
    assert [one["tunables_share"] for one in relay["up"]] == [
        one.tunables_share for one in lessons(done) if one.direction == "up"
    ]
    assert {one["tunables_share"] for one in relay["down"]} == {None}
    assert relay["data_bytes"] == pytest.approx(2 * 24 * (64 + len("a handwritten three")), rel=0.05)
    ups, downs = ([one for one in relay[way] if one["accepted"]] for way in ("up", "down"))
    judged = {(one["node_id"], one["version"], one["domain"]) for one in relay["versions"]}
    made = {("cloud", version) for version in range(1 + len(ups))}
    made |= {(one["node_id"], one["version"] - before) for one in downs for before in (0, 1)}
    assert judged == {(*one, edge) for one in made for edge in ("edge-0", "edge-1")}
    assert all(0 <= one["caption_accuracy"] <= 1 for one in relay["versions"])
    page = (tmp_path / "report.html").read_text()
    assert "Lessons of the knowledge relay" in page
    assert "Versions of the models, cycle by cycle" in page
    assert "tunables sent" in page
    assert "Edges sent their tunables too" in page
    assert page.count('<img class="sheet"') == 6
    assert [*find_served(tmp_path).adapters] == ["tiny-pairs", "tiny-pairs/edge-0", "tiny-pairs/edge-1"]
    greedy = Sampling(temperature=0)
    drawn = await generate(tmp_path, "a handwritten two", 1, sampling=greedy, edge=None, engine="inproc")
    assert drawn.model == "tiny-pairs"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"validation": 0}}, "data.validation: lessons are refused by what an edge holds out"),
        ({"tuning": {"cloud_every": 1}}, "tuning.cloud_every: edges that teach each other"),
    ],
)
def test_what_a_relay_does_not_go_with(changes: dict[str, Any], said: str, foundation: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        pair_recipe(foundation, relay={"every": 1}, **changes)
    with pytest.raises(ConfigError, match=r"relay\.every: models teach each other by drawing"):
        load("digits", ["relay.every=1"])


def test_tunables_are_sent_along_with_lessons_only(foundation: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"relay\.tunables: they are sent along with lessons, and there are none; set"
    ):
        pair_recipe(foundation, relay={"tunables": True})
    assert pair_recipe(foundation, relay={"tunables": True, "drift": 0.01}).relay.tunables
