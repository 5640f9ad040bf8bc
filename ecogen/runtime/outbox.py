"""An outbox: records go to disk first and then to the parent, in order, for as long as it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from ecogen.errors import TransportError
from ecogen.records import Record, read_records, to_line
from ecogen.storage import append_line, read_lines


class Outbox:
    """A log of records, sent one by one; after a restart all are sent again, and the receiver skips what it has.

    Args:
        send: delivers one line; raises TransportError if the receiver is away.
    """

    def __init__(self, path: Path, send: Callable[[bytes], Awaitable[None]]) -> None:
        self._path, self._send = path, send
        self._lines = [to_line(record) for record in read_records(read_lines(path), str(path))]
        self._known = set(self._lines)
        self._news = asyncio.Event()
        self._sent = 0
        self._all_sent = asyncio.Event()

    def put(self, record: Record) -> None:
        """Take a record; one that is there already is skipped."""
        line = to_line(record)
        if line not in self._known:
            append_line(self._path, line)
            self._lines.append(line)
            self._known.add(line)
            self._all_sent.clear()
            self._news.set()

    async def run(self) -> None:
        """Forever: send what is there."""
        while True:
            while self._sent < len(self._lines):
                try:
                    await self._send(self._lines[self._sent])
                    self._sent += 1
                except TransportError:
                    await asyncio.sleep(0.5)
            self._all_sent.set()
            self._news.clear()
            if self._sent == len(self._lines):
                await self._news.wait()

    async def flush(self) -> None:
        """Wait until everything is sent."""
        if self._sent < len(self._lines):
            await self._all_sent.wait()
