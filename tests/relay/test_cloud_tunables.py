"""The cloud with edges' tunables: which it takes, keeps and drops, and what it learns, beginning with them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ecogen.config import Relay
from ecogen.errors import ProtocolError
from ecogen.metering.meter import null_meter
from ecogen.models.adapters import load_whole
from ecogen.models.checkpoint import open_foundation
from ecogen.models.profile import shape_of
from ecogen.models.tunables import Tunables, get_tunables
from ecogen.records import Cause, Record, RelayRecord, from_line, to_line
from ecogen.relay.acceptance import Taken
from ecogen.relay.cloud import CloudRelay
from ecogen.relay.cloud_learner import Exchange, Known, Learner
from ecogen.relay.generator import Generator
from ecogen.relay.messages import CONFIDENCE, RELAY, TUNED, VERDICT, Answer, Offer, Review, Tuned, Verdict
from ecogen.relay.samples import Samples
from ecogen.runtime.membership import Members
from ecogen.runtime.stage import Stage
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message, Peer, TrafficCounter
from ecogen.tuning.captions import digit_caption
from tests.pictures import LENGTH, SIZES, pair_recipe, save_pair_foundation

EDGES = ["edge-0", "edge-1"]
SPEC = Relay(every=1, drift=0.01, samples=20, steps=4, tunables=True, tolerance=100.0)
FIRST = Exchange("schedule", 0, 0)


class Cloud:
    """A cloud's relay with its two edges here and ready."""

    def __init__(self, foundation: Path, folder: Path) -> None:
        opened = open_foundation(foundation)
        self.recipe = pair_recipe(foundation)
        stage = Stage(load_whole(opened, opened.config, self.recipe.tunables, 0))
        self.worker, self.first = Worker(null_meter("cloud"), TrafficCounter()), get_tunables(stage.model)
        shape = shape_of(opened.config, self.recipe)
        self.generator = Generator(stage, foundation, shape, self.worker, SPEC, LENGTH)
        self.records: list[Record] = []
        self.members = Members(EDGES, self.records.append)
        self.folder, self.known = folder, some(range(10), 50)
        self.restart()

    def restart(self, spec: Relay = SPEC) -> None:
        """As a cloud that was killed begins: with what is on its disk."""
        known = Known(tuple(map(digit_caption, range(10))), self.generator.passages(self.known))
        learner = Learner("cloud", self.generator, self.first, self.folder, spec, known, seed=3)
        told = self.records.append
        self.relay = CloudRelay(learner, self.members, self.worker, told, rounds=10, patience_s=0.05)

    async def tell(
        self, edge_id: str, tunables: Mapping[str, Tensor], cycle: int = 0, cause: Cause = "schedule"
    ) -> None:
        """An edge's tunables."""
        told = Message.of(TUNED, Tuned(cycle, cause), kind="tunables", tensors=tunables)
        answer = await self.relay.take_tunables(Peer(edge_id, "edge"), told)
        assert not answer.tensors

    async def offer(self, edge_id: str, samples: Samples, cycle: int = 0, cause: Cause = "drift") -> Review:
        body, tensors = samples.packed()
        told = Message.of(RELAY, Offer(cycle, body, len(samples), cause), kind="samples", tensors=tensors)
        return (await self.relay.exchange(Peer(edge_id, "edge"), told)).read(Review)

    async def judge(self, edge_id: str, cycle: int = 0, cause: Cause = "drift") -> Answer:
        told = Message.of(VERDICT, Verdict(cycle, cause), kind="scores", tensors={CONFIDENCE: torch.ones(0)})
        return (await self.relay.judged(Peer(edge_id, "edge"), told)).read(Answer)

    def perturbed(self, by: float, seed: int, of: Mapping[str, Tensor] | None = None) -> Tunables:
        generator = torch.Generator().manual_seed(seed)
        start = self.first if of is None else of
        return {name: value + by * torch.randn(value.shape, generator=generator) for name, value in start.items()}

    def learnt(self, own: Tunables, given: Mapping[str, Tunables], lessons: Mapping[str, Samples]) -> Taken:
        """What a cloud with these tunables learns."""
        self.relay.state = replace(self.relay.state, tunables=own)
        return self.relay.learner.taken(self.relay.state, FIRST, lessons, {}, given)


def some(digits: Sequence[int], number: int) -> Samples:
    """Pictures of digits that have a code of their own each, so that there is something to be learnt."""
    shown = [digits[place % len(digits)] for place in range(number)]
    codes = torch.tensor(shown)[:, None].expand(-1, SIZES.num_codes).clone()
    captions = [digit_caption(digit) for digit in shown]
    return Samples(codes, captions, dict.fromkeys(captions, 3))


LESSONS = {"edge-0": some(range(5), 20), "edge-1": some(range(5, 10), 20)}


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair_foundation(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def cloud(foundation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cloud]:
    monkeypatch.setattr("ecogen.relay.cloud_learner._REHEARSED", 10)
    made = Cloud(foundation, tmp_path)
    for edge in EDGES:
        await made.members.join(edge, edge)
        await made.members.ready(edge)
    yield made
    made.worker.close()


async def test_tunables_are_taken_only_where_the_recipe_asks_for_them(cloud: Cloud) -> None:
    for spec, cause, said in (
        (replace(SPEC, tunables=False), "schedule", r"edge-0 sent its tunables, and relay\.tunables is off; set"),
        (replace(SPEC, every=0), "schedule", r"edge-0 sent a lesson by schedule"),
        (replace(SPEC, drift=0.0), "drift", r"edge-0 sent a lesson by drift, and relay\.drift is off"),
    ):
        cloud.restart(spec)
        with pytest.raises(ProtocolError, match=said):
            await cloud.tell("edge-0", cloud.first, cause=cause)
        assert not cloud.relay._given
    cloud.restart()
    for wrong in ({}, {name: value[..., :1] for name, value in cloud.first.items()}, cloud.perturbed(torch.nan, 0)):
        with pytest.raises(ProtocolError, match="edge-0"):
            await cloud.tell("edge-0", wrong)
        assert not cloud.relay._given


async def test_of_each_edge_the_last_tunables_are_kept_until_the_exchange_is_closed(cloud: Cloud) -> None:
    await cloud.tell("edge-0", cloud.first, 3, "drift")
    await cloud.tell("edge-0", cloud.perturbed(0.1, 0), 0)
    await cloud.tell("edge-1", cloud.first, 4, "drift")
    assert {edge: given.told for edge, given in cloud.relay._given.items()} == {
        "edge-0": Tuned(0),
        "edge-1": Tuned(4, "drift"),
    }
    await cloud.offer("edge-1", LESSONS["edge-1"], 4)
    assert (await cloud.judge("edge-1", 4)).is_closed
    assert cloud.relay._given.keys() == {"edge-0"}
    await cloud.tell("edge-1", cloud.first, 4, "drift")
    assert cloud.relay._given.keys() == {"edge-0"}, "that one is closed"


async def test_a_cloud_that_was_lost_before_the_offer_is_given_both_again(cloud: Cloud) -> None:
    own = cloud.perturbed(0.1, 0)
    await cloud.tell("edge-0", own, 2, "drift")
    cloud.restart()
    for _ in range(2):
        review = await cloud.offer("edge-0", LESSONS["edge-0"], 2)
        assert not review.captions.captions
        assert not (await cloud.judge("edge-0", 2)).is_closed
        assert not cloud.records[2:], "of the joining of two edges only"
        await cloud.tell("edge-0", own, 1, "drift")
    await cloud.tell("edge-0", own, 2, "drift")
    await cloud.offer("edge-0", LESSONS["edge-0"], 2)
    assert (await cloud.judge("edge-0", 2)).is_closed
    record = cloud.relay.state.record
    assert record is not None
    assert record.tunable_bytes == sum(tensor.nbytes for tensor in own.values())


async def test_garbage_is_not_learnt_from_and_the_lesson_is_as_without_it(cloud: Cloud) -> None:
    own = cloud.perturbed(0.02, 0)
    without = cloud.learnt(own, {}, LESSONS)
    for by in (5.0, 1e30):
        given = {edge: cloud.perturbed(by, seed) for seed, edge in enumerate(EDGES, 1)}
        found = cloud.learnt(own, given, LESSONS)
        assert (found.tunables_share, found.scores, found.reason) == (0, without.scores, without.reason)
        assert all(torch.equal(found.tunables[name], without.tunables[name]) for name in own)


async def test_edges_that_have_what_the_cloud_has_change_nothing(cloud: Cloud) -> None:
    own = cloud.perturbed(0.02, 0)
    without = cloud.learnt(own, {}, LESSONS)
    given = {edge: {name: value.clone() for name, value in own.items()} for edge in EDGES}
    found = cloud.learnt(own, given, LESSONS)
    assert found.tunables_share == 0
    assert all(torch.equal(found.tunables[name], without.tunables[name]) for name in own)


async def test_a_mean_that_is_better_is_what_learning_begins_with(cloud: Cloud) -> None:
    """The cloud lags behind its edges, of which one is a little too far one way, and the other as far the other way."""
    learn = partial(cloud.generator.learn, known=None, key=[0])
    good = cloud.first
    for _ in range(8):
        good = learn(good, cloud.generator.passages(cloud.known))
    given = dict(zip(EDGES, (cloud.perturbed(by, 1, good) for by in (0.01, -0.01)), strict=True))
    own = cloud.perturbed(0.3, 0, good)
    with patch.object(cloud.generator, "learn", wraps=cloud.generator.learn) as learning:
        found, without = (cloud.learnt(own, some_of, LESSONS) for some_of in (given, {}))
    begun = learning.call_args_list[0].args[0]
    assert found.tunables_share == 1
    assert [score.before for score in found.scores] == [score.before for score in without.scores], "of its own model"
    assert all(one.after < other.after for one, other in zip(found.scores, without.scores, strict=True))
    mean = {name: (given["edge-0"][name].double() + given["edge-1"][name]).div(2).float() for name in own}
    assert all(torch.equal(begun[name], mean[name]) for name in own)


def test_records_that_were_written_before_are_read() -> None:
    record = RelayRecord("cloud", 0, "up", (), True, 1, 9, 8, 7, (), 0.5, (), tunable_bytes=5, tunables_share=0.25)
    line = to_line(record).decode()
    assert from_line(line) == record
    older = from_line(line.replace(',"tunable_bytes":5,"tunables_share":0.25', ""))
    assert older != record
    assert isinstance(older, RelayRecord)
    assert (older.tunable_bytes, older.tunables_share) == (0, 0.0)
