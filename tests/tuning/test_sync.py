"""The cloud's average: every edge once a round, the same answer to whoever asks again, and none for who comes late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from ecogen.metering.meter import null_meter
from ecogen.records import EventRecord, Record, RoundRecord, Score
from ecogen.runtime.membership import Members
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message, Peer, TrafficCounter
from ecogen.tuning.messages import SYNC, SyncOrder, SyncResult
from ecogen.tuning.sync import CloudState, CloudSync

EDGES = ["edge-0", "edge-1"]


class Cloud:
    """A cloud's sync with its two edges here and ready."""

    def __init__(self, path: Path, state: CloudState | None = None) -> None:
        self.records: list[Record] = []
        self.members = Members(EDGES, self.records.append)
        self.worker = Worker(null_meter("cloud"), TrafficCounter())
        start = state or CloudState({"w": torch.zeros(1)})
        self.sync = CloudSync(
            "cloud", start, path, self.members, self.worker, lambda _: Score(), self.records.append, patience_s=0.05
        )

    async def send(self, edge_id: str, round_index: int, value: float, num_examples: int) -> tuple[float, SyncResult]:
        order = Message.of(SYNC, SyncOrder(round_index, num_examples), tensors={"w": torch.tensor([value])})
        reply = await self.sync.sync(Peer(edge_id, "edge"), order)
        return float(reply.tensors["w"]), reply.read(SyncResult)

    @property
    def rounds(self) -> list[RoundRecord]:
        return [record for record in self.records if isinstance(record, RoundRecord)]

    def events(self, kind: str) -> list[str]:
        return [r.node_id for r in self.records if isinstance(r, EventRecord) and r.event == kind]


@pytest.fixture
async def cloud(tmp_path: Path) -> AsyncIterator[Cloud]:
    made = Cloud(tmp_path / "state")
    for edge in EDGES:
        await made.members.join(edge, edge)
        await made.members.ready(edge)
    yield made
    made.worker.close()


async def test_both_edges_get_the_average_by_examples(cloud: Cloud) -> None:
    answers = await asyncio.gather(cloud.send("edge-0", 0, 1.0, 30), cloud.send("edge-1", 0, 5.0, 10))
    assert answers == [(2.0, SyncResult(0, True))] * 2
    assert [(record.num_examples, record.members, record.missing) for record in cloud.rounds] == [
        (40, ("edge-0", "edge-1"), ())
    ]


async def test_who_asks_again_gets_the_same_answer_and_is_counted_once(cloud: Cloud, tmp_path: Path) -> None:
    await asyncio.gather(cloud.send("edge-0", 0, 1.0, 30), cloud.send("edge-1", 0, 5.0, 10))
    assert await cloud.send("edge-0", 0, 1.0, 30) == (2.0, SyncResult(0, True))
    later = Cloud(tmp_path / "state", CloudState.load(tmp_path / "state"))  # and after a restart
    assert await later.send("edge-1", 0, 5.0, 10) == (2.0, SyncResult(0, True))
    assert len(cloud.rounds) == 1
    assert not later.rounds
    later.worker.close()


async def test_an_update_sent_twice_before_the_round_is_closed_counts_once(cloud: Cloud) -> None:
    twice = [asyncio.create_task(cloud.send("edge-0", 0, 1.0, 30)) for _ in range(2)]
    await asyncio.sleep(0.01)
    await cloud.send("edge-1", 0, 5.0, 10)
    assert {value for value, _ in await asyncio.gather(*twice)} == {2.0}
    assert cloud.rounds[0].num_examples == 40


async def test_a_lost_edge_is_waited_for_a_while_and_its_late_update_fenced(cloud: Cloud) -> None:
    await cloud.members.lose("edge-1", "silent")
    assert await cloud.send("edge-0", 0, 1.0, 30) == (1.0, SyncResult(0, True))
    assert cloud.rounds[0].missing == ("edge-1",)
    assert await cloud.send("edge-1", 0, 5.0, 10) == (1.0, SyncResult(0, False))
    assert cloud.events("fenced") == ["edge-1"]
    assert len(cloud.rounds) == 1


async def test_an_edge_that_was_counted_and_comes_back_after_a_later_round_is_not_fenced(cloud: Cloud) -> None:
    await asyncio.gather(cloud.send("edge-0", 0, 1.0, 30), cloud.send("edge-1", 0, 5.0, 10))
    await cloud.members.lose("edge-1", "silent")
    await cloud.send("edge-0", 1, 4.0, 30)
    assert await cloud.send("edge-1", 0, 5.0, 10) == (4.0, SyncResult(1, True))
    assert cloud.events("fenced") == []
    assert await cloud.send("edge-1", 1, 5.0, 10) == (4.0, SyncResult(1, False))
    assert cloud.events("fenced") == ["edge-1"]


async def test_a_slow_edge_that_lives_is_waited_for(cloud: Cloud) -> None:
    early = asyncio.create_task(cloud.send("edge-0", 0, 1.0, 10))
    await asyncio.sleep(0.15)
    assert not early.done()
    await cloud.send("edge-1", 0, 3.0, 10)
    assert (await early)[0] == 2.0


async def test_an_edge_that_comes_back_in_time_is_in_the_average(cloud: Cloud) -> None:
    await cloud.members.lose("edge-1", "silent")
    early = asyncio.create_task(cloud.send("edge-0", 0, 1.0, 10))
    await asyncio.sleep(0.02)
    await cloud.members.join("edge-1", "edge-1")
    await cloud.members.ready("edge-1")
    await asyncio.sleep(0.1)
    assert not early.done()
    await cloud.send("edge-1", 0, 3.0, 10)
    assert (await early)[0] == 2.0
    assert cloud.rounds[0].missing == ()
