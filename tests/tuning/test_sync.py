"""The cloud's average: every edge once a round, the same answer to whoever asks again, and none for who comes late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import pytest
import torch

from ecogen.errors import AggregationError, StorageError
from ecogen.metering.meter import null_meter
from ecogen.records import EventRecord, Record, RoundRecord, Score
from ecogen.runtime.membership import Members
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message, Peer, TrafficCounter
from ecogen.tuning.aggregate import Update
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


async def test_after_an_average_that_failed_the_round_is_tried_again(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Edges are told, and send their updates again; what failed was given to whoever asked, for ever."""
    scores = iter([AggregationError("no"), Score()])

    def evaluate(_: object) -> Score:
        if isinstance(score := next(scores), Exception):
            raise score
        return score

    def both() -> Awaitable[list[Any]]:
        sends = cloud.send("edge-0", 0, 1.0, 30), cloud.send("edge-1", 0, 5.0, 10)
        return asyncio.gather(*sends, return_exceptions=True)

    monkeypatch.setattr(cloud.sync, "_evaluate", evaluate)
    assert [str(problem) for problem in await both()] == ["no", "no"]
    assert (cloud.sync.state.round_index, cloud.rounds) == (-1, [])
    assert await both() == [(2.0, SyncResult(0, True))] * 2
    assert len(cloud.rounds) == 1
    assert not cloud.sync._closing


async def test_what_is_not_on_disk_is_no_answer(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    await cloud.members.lose("edge-1", "silent")
    with monkeypatch.context() as full:
        full.setattr(CloudState, "save", _no_room)
        with pytest.raises(StorageError, match="full"):
            await cloud.send("edge-0", 0, 1.0, 30)
    assert cloud.sync.state.round_index == -1
    assert await cloud.send("edge-0", 0, 1.0, 30) == (1.0, SyncResult(0, True))
    assert len(cloud.rounds) == 1


def _no_room(*_: object) -> None:
    raise StorageError("the disk is full")


async def test_a_round_that_closes_while_an_update_is_put_down_is_not_closed_again(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, is_closed = cloud.sync._gathering.put, asyncio.Event()

    async def put_late(round_index: int, edge_id: str, update: Update) -> None:
        if edge_id == "edge-1":
            await is_closed.wait()
        await put(round_index, edge_id, update)

    monkeypatch.setattr(cloud.sync._gathering, "put", put_late)
    late = asyncio.create_task(cloud.send("edge-1", 0, 5.0, 10))
    await cloud.members.lose("edge-1", "silent")
    assert await cloud.send("edge-0", 0, 1.0, 30) == (1.0, SyncResult(0, True))
    is_closed.set()
    assert await asyncio.wait_for(late, 1) == (1.0, SyncResult(0, False))
    assert len(cloud.rounds) == 1
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
