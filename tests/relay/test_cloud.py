"""The cloud's part of the relay with a generator of few words: what it refuses, forgets, and takes again."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import torch

from ecogen.config import Relay
from ecogen.errors import ProtocolError
from ecogen.records import RelayRecord, Usage
from ecogen.relay.cloud import CloudRelay
from ecogen.relay.cloud_learner import Known, Learner
from ecogen.relay.messages import CONFIDENCE, RELAY, VERDICT, Answer, Offer, Review, Verdict
from ecogen.relay.samples import MOST, Captions, Samples, joined, unpacked
from ecogen.relay.teacher import Lesson
from ecogen.runtime.membership import Members
from ecogen.transport.base import Message, Peer
from ecogen.tuning.passages import Passages

FIRST = {"weight": torch.zeros(2)}
PEER = Peer("edge-0", "edge")


@dataclass
class Words:
    """A generator that learns by adding 1, and whose perplexity on what is new falls with it."""

    failures: int = 0
    lessons: list[int] = field(default_factory=list)
    images: Any = field(default_factory=lambda: SimpleNamespace(num_codes=4))

    def read(self, body: Captions, tensors: Mapping[str, torch.Tensor], teachers: int = 1) -> Samples:
        return unpacked(body, tensors, 1 << 20, 4, 100)

    def passages(self, samples: Samples) -> Passages:
        return Passages(samples.codes, samples.codes)

    def learn(self, tunables: Mapping[str, torch.Tensor], new: Passages, *_: object) -> dict[str, torch.Tensor]:
        if self.failures:
            self.failures -= 1
            raise OSError("no space left")
        self.lessons.append(len(new))
        return {name: tensor + 1 for name, tensor in tunables.items()}

    def perplexity(self, passages: Passages) -> Any:
        is_known = not len(passages)
        return lambda tunables: 5.0 if is_known else 9.0 - float(tunables["weight"][0])

    def teach(self, _: object, evidence: Mapping[str, int], *__: object) -> Lesson:
        return Lesson(samples(sorted(evidence)), len(evidence))

    def rehearse(self, _: object, evidence: Mapping[str, int], *__: object) -> Samples:
        return samples(sorted(evidence))


@dataclass
class Worker:
    may_go_on: asyncio.Event | None = None

    def usage(self, _: str) -> Usage:
        return cast(Usage, f"usage {_}")

    async def compute(self, work: Any, *arguments: object) -> Any:
        if self.may_go_on is not None:
            await self.may_go_on.wait()
        return work(*arguments)


def samples(captions: Sequence[str], first: int = 0) -> Samples:
    codes = torch.arange(first, first + 4 * len(captions)).view(-1, 4)
    return Samples(codes, list(captions), dict.fromkeys(captions, 5))


@dataclass
class Cloud:
    relay: CloudRelay
    words: Words
    published: list[RelayRecord]
    worker: Worker

    async def offer(self, captions: Sequence[str], cycle: int = 0, peer: Peer = PEER, cause: Any = "drift") -> Message:
        body, tensors = samples(captions).packed()
        offer = Offer(cycle, body, len(captions), cause)
        return await self.relay.exchange(peer, Message.of(RELAY, offer, kind="samples", tensors=tensors))

    async def judge(self, number: int = 0, cycle: int = 0, cause: Any = "drift", peer: Peer = PEER) -> Answer:
        tensors = {CONFIDENCE: torch.ones(number)}
        verdict = Message.of(VERDICT, Verdict(cycle, cause), kind="scores", tensors=tensors)
        return (await self.relay.judged(peer, verdict)).read(Answer)


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    published: list[RelayRecord] = []
    words, members, worker = Words(), Members(["edge-0", "edge-1"], lambda _: None), Worker()
    spec = Relay(every=2, drift=0.01, samples=100)
    known = Known(("a glyph",), Passages(torch.empty(0, 4), torch.empty(0, 4)))
    learner = Learner("cloud", cast(Any, words), FIRST, tmp_path, spec, known, seed=0)
    told = cast(Any, published.append)
    relay = CloudRelay(learner, members, cast(Any, worker), told, rounds=5, patience_s=0.05)
    return Cloud(relay, words, published, worker)


async def test_a_lesson_is_learnt(cloud: Cloud) -> None:
    review = (await cloud.offer(["one", "two"] * 10)).read(Review)
    assert review.captions.captions == ()
    answer = await cloud.judge()
    assert (answer.is_closed, answer.version, sorted(answer.captions.captions)) == (True, 1, ["one", "two"])
    (record,) = cloud.published
    assert (record.accepted, record.share, record.usages) == (True, 1.0, ("usage tuning", "usage relay"))


async def test_a_lesson_that_failed_can_be_taught_again_and_its_costs_are_told(cloud: Cloud) -> None:
    cloud.words.failures = 1
    await cloud.offer(["one"] * 10)
    with pytest.raises(OSError, match="no space left"):
        await cloud.judge()
    assert not cloud.published
    answer = await cloud.judge()
    assert (answer.is_closed, answer.version) == (True, 1)
    (record,) = cloud.published
    assert record.usages == ("usage tuning", "usage tuning", "usage relay")


async def test_a_lesson_by_schedule_that_failed_too(cloud: Cloud) -> None:
    cloud.words.failures = 1
    for _ in range(2):
        await cloud.offer(["one"] * 10, cause="schedule")
        try:
            answer = await cloud.judge(cause="schedule")
        except OSError:
            continue
    assert (answer.is_closed, answer.version, len(cloud.published)) == (True, 1, 1)


async def test_a_cycle_that_comes_late_changes_nothing_of_a_later_one(cloud: Cloud) -> None:
    """One edge has gone on alone; the other returns with what it had before, while the cloud learns."""

    async def exchange(peer: Peer, cycle: int) -> Answer:
        await cloud.offer(["one"] * 10, cycle=cycle, peer=peer, cause="schedule")
        number = 10 * max(0, len(cloud.relay._open.offers(cycle) or ()) - 1)
        return await cloud.judge(number, cycle=cycle, cause="schedule", peer=peer)

    cloud.worker.may_go_on = asyncio.Event()
    later = asyncio.create_task(exchange(PEER, 1))
    await asyncio.sleep(0.2)
    late = asyncio.create_task(exchange(Peer("edge-1", "edge"), 0))
    await asyncio.sleep(0.2)
    cloud.worker.may_go_on.set()
    answers = await asyncio.wait_for(asyncio.gather(later, late), 5)
    assert [(answer.is_closed, answer.version) for answer in answers] == [(True, 1), (True, 1)]
    assert cloud.relay.state.cycle == 1
    assert (await exchange(PEER, 1)).is_closed
    assert len(cloud.published) == 1


async def test_who_counts_too_many_examples(cloud: Cloud) -> None:
    """Neither one number nor the sum of what many say grows past what can be sent on."""
    body, tensors = samples(["one"] * 2).packed()
    for count in (MOST + 1, 2**64 - 1):
        told = Offer(0, msgspec.structs.replace(body, evidence=(count,)), 2, "drift")
        with pytest.raises(ProtocolError, match="not a Offer"):
            await cloud.relay.exchange(PEER, Message.of(RELAY, told, kind="samples", tensors=tensors))
    one = Samples(torch.zeros(1, 4), ["one"], {"one": MOST})
    assert joined([one, one]).evidence == {"one": MOST}


async def test_a_lesson_of_one_sample_is_none(cloud: Cloud) -> None:
    await cloud.offer(["one"])
    answer = await cloud.judge()
    assert (answer.is_closed, answer.version, cloud.words.lessons) == (True, 0, [])
    assert cloud.published[0].reason.startswith("no edge drew")


async def test_an_edge_has_one_open_offer(cloud: Cloud) -> None:
    for cycle in range(5):
        await cloud.offer(["one"] * 10, cycle=cycle)
    assert not (await cloud.judge(cycle=3)).is_closed
    assert (await cloud.judge(cycle=4)).is_closed


async def test_what_an_edge_offers_anew_stands_for_what_it_taught_of_it(cloud: Cloud) -> None:
    for cycle in range(3):
        await cloud.offer(["one", "two"] * 10, cycle=cycle)
        await cloud.judge(cycle=cycle)
        assert cloud.relay.state.taught["edge-0"].samples.evidence == {"one": 5, "two": 5}
    await cloud.offer(["two"] * 10, cycle=4)
    await cloud.judge(cycle=4)
    taught = cloud.relay.state.taught["edge-0"].samples
    assert taught.evidence == {"one": 5, "two": 5}
    assert taught.captions.count("two") == taught.captions.count("one") == 10


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"peer": Peer("edge-9", "edge")}, "'edge-9' is no edge here; expected: edge-0, edge-1"),
        ({"cycle": 5}, "edge-0 asked for exchange 5; there are 5"),
        ({"cycle": 2, "cause": "schedule"}, "edge-0 asked for exchange 2; there are 2"),
        ({"cycle": 10**9, "cause": "schedule"}, "asked for exchange 1000000000"),
    ],
)
async def test_exchanges_that_there_are_none_of(cloud: Cloud, asked: dict[str, Any], problem: str) -> None:
    with pytest.raises(ProtocolError, match=problem):
        await cloud.offer(["one"] * 4, **asked)
