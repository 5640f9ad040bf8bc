"""Complete runs of tiny federations in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ecogen.config import Recipe
from ecogen.engines.federation import Federation
from ecogen.engines.inproc import InprocEngine, launch_inproc
from ecogen.records import EventRecord, Record, RoundRecord, read_records
from ecogen.transport.memory import MemoryNetwork


@dataclass(frozen=True)
class Finished:
    """What is left of a run."""

    records: Sequence[Record]
    tunables: dict[str, Tensor]

    def rounds(self, node_id: str) -> list[RoundRecord]:
        return rounds_of(self.records, node_id)

    def events(self, *kinds: str) -> list[EventRecord]:
        return [record for record in self.records if isinstance(record, EventRecord) and record.event in kinds]


@asynccontextmanager
async def running(
    recipe: Recipe, folder: Path, network: MemoryNetwork | None = None
) -> AsyncIterator[tuple[Federation, InprocEngine]]:
    """A federation and its engine, for tests that stop and start nodes."""
    async with launch_inproc(recipe, folder, network=network) as federation:
        engine = federation._engine
        assert isinstance(engine, InprocEngine)
        yield federation, engine


async def finish(federation: Federation) -> Finished:
    """Watch to the end."""
    async for _ in federation.watch():
        pass
    return Finished(federation.records, await federation.tunables())


async def run(recipe: Recipe, folder: Path, network: MemoryNetwork | None = None, timeout_s: float = 30) -> Finished:
    """A whole run, from its start to its end."""
    async with running(recipe, folder, network) as (federation, _):
        try:
            return await asyncio.wait_for(finish(federation), timeout_s)
        except TimeoutError:
            seen = [str(record)[:150] for record in federation.records[-8:]]
            waiting = [repr(task)[:300] for task in asyncio.all_tasks()]
            raise AssertionError("\n".join(["the run did not end", *seen, *waiting])) from None


async def until(condition: Callable[[], object], timeout_s: float = 20) -> None:
    """Wait for something that another task brings about."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110, it may be about anything
            await asyncio.sleep(0.002)


def in_background(work: Awaitable[Finished]) -> asyncio.Task[Finished]:
    return asyncio.ensure_future(work)


def rounds_of(records: Sequence[Record], node_id: str) -> list[RoundRecord]:
    return [record for record in records if isinstance(record, RoundRecord) and record.node_id == node_id]


def logged(folder: Path) -> list[Record]:
    """The records on the cloud's disk."""
    path = folder / "nodes" / "cloud" / "records.jsonl"
    return read_records(path.read_bytes().splitlines(keepends=True), str(path))


def duplicates(records: Sequence[Record]) -> Iterator[tuple[str, int]]:
    """Rounds that were recorded more than once."""
    seen = set()
    for record in records:
        if isinstance(record, RoundRecord):
            key = (record.node_id, record.round_index)
            if key in seen:
                yield key
            seen.add(key)
