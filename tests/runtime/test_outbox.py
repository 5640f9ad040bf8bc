"""What is put into an outbox is on disk at once and sent in order, whatever happens in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ecogen.errors import NodeLostError, RunError
from ecogen.records import EventRecord, from_line
from ecogen.runtime.outbox import Outbox
from tests.runs import until


class Receiver:
    """Takes lines; is away as often as it is told to."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.times_away = 0
        self.is_open = asyncio.Event()
        self.is_open.set()

    async def take(self, line: bytes) -> None:
        await self.is_open.wait()
        if self.times_away:
            self.times_away -= 1
            raise NodeLostError("cloud", "it is away")
        self.lines.append(line)

    @property
    def node_ids(self) -> list[str]:
        return [record.node_id for line in self.lines if isinstance(record := from_line(line), EventRecord)]


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause takes longer than a few milliseconds."""
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda delay_s: sleep(min(delay_s, 0.003)))


@asynccontextmanager
async def running(outbox: Outbox) -> AsyncIterator[None]:
    task = asyncio.create_task(outbox.run())
    async with asyncio.timeout(2):
        yield
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def log_of(path: Path) -> bytes:
    return path.read_bytes()


def cut_off(path: Path, num_lost: int) -> None:
    path.write_bytes(path.read_bytes()[:-num_lost])


def event(node_id: str) -> EventRecord:
    return EventRecord("joined", node_id)


async def test_a_record_is_on_disk_before_it_is_sent(path: Path) -> None:
    found: list[bool] = []

    async def take(line: bytes) -> None:
        found.append(line in log_of(path))

    outbox = Outbox(path, take)
    async with running(outbox):
        outbox.put(event("a"))
        await outbox.flush()
    assert found == [True]


async def test_a_record_is_on_disk_although_nobody_sends(path: Path, receiver: Receiver) -> None:
    Outbox(path, receiver.take).put(event("a"))
    assert from_line(log_of(path)) == event("a")
    assert not receiver.lines


async def test_records_are_sent_in_order_also_those_that_come_meanwhile(path: Path, receiver: Receiver) -> None:
    outbox = Outbox(path, receiver.take)
    receiver.is_open.clear()
    for node_id in "ab":
        outbox.put(event(node_id))
    async with running(outbox):
        await asyncio.sleep(0)
        for node_id in "cd":
            outbox.put(event(node_id))
        receiver.is_open.set()
        await outbox.flush()
        outbox.put(event("e"))
        await outbox.flush()
    assert receiver.node_ids == list("abcde")
    assert log_of(path) == b"".join(receiver.lines)


@pytest.mark.usefixtures("hasty")
async def test_a_receiver_that_is_away_is_tried_again_and_gets_each_record_once(path: Path, receiver: Receiver) -> None:
    outbox = Outbox(path, receiver.take)
    receiver.times_away = 3
    for node_id in "abc":
        outbox.put(event(node_id))
    async with running(outbox):
        await until(lambda: receiver.lines)
        receiver.times_away = 2
        await outbox.flush()
    assert receiver.node_ids == list("abc")


@pytest.mark.usefixtures("hasty")
async def test_flush_waits_until_the_last_record_has_arrived(path: Path, receiver: Receiver) -> None:
    outbox = Outbox(path, receiver.take)
    await outbox.flush()  # nothing to wait for
    receiver.is_open.clear()
    outbox.put(event("a"))
    async with running(outbox):
        flushed = asyncio.create_task(outbox.flush())
        await asyncio.sleep(0.003)
        assert not flushed.done()
        outbox.put(event("b"))
        receiver.is_open.set()
        await flushed
        assert receiver.node_ids == ["a", "b"]


async def test_after_a_restart_all_are_sent_again_before_the_new_ones(path: Path, receiver: Receiver) -> None:
    first = Outbox(path, receiver.take)
    async with running(first):
        first.put(event("a"))
        await first.flush()
    first.put(event("b"))  # too late for this life
    again = Outbox(path, receiver.take)
    again.put(event("c"))
    async with running(again):
        await again.flush()
    assert receiver.node_ids == ["a", "a", "b", "c"]


async def test_a_record_that_is_there_already_is_skipped_also_after_a_restart(path: Path, receiver: Receiver) -> None:
    first = Outbox(path, receiver.take)
    first.put(event("a"))
    first.put(event("a"))
    again = Outbox(path, receiver.take)
    again.put(event("a"))
    again.put(event("b"))
    async with running(again):
        await again.flush()
    assert receiver.node_ids == ["a", "b"]
    assert len(log_of(path).splitlines()) == 2


@pytest.mark.parametrize("num_lost", [1, 20, 80])
async def test_a_line_that_a_crash_cut_off_is_left_out_and_the_log_goes_on(
    path: Path, receiver: Receiver, num_lost: int
) -> None:
    before = Outbox(path, receiver.take)
    before.put(event("a"))
    before.put(event("b"))
    cut_off(path, num_lost)
    again = Outbox(path, receiver.take)
    again.put(event("b"))
    again.put(event("c"))
    async with running(again):
        await again.flush()
    assert receiver.node_ids == ["a", "b", "c"]
    assert log_of(path) == b"".join(receiver.lines)


def test_a_log_of_something_else_is_refused_with_its_place(path: Path, receiver: Receiver) -> None:
    path.write_bytes(b'{"type":"event","event":"joined","node_id":"a"}\nnot a record\n')
    with pytest.raises(RunError, match=r"records\.jsonl:2: not a record"):
        Outbox(path, receiver.take)
