"""The cloud of a federation that serves: keeps the model, delivers it to edges, and keeps the records."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import msgspec

from ecogen import config as recipes
from ecogen.errors import ProtocolError
from ecogen.models.folder import open_folder, read_text_files
from ecogen.node.books import hand_in_books
from ecogen.node.cloud import Log
from ecogen.node.context import (
    DESCRIBE,
    LOCATE,
    OPERATOR,
    PUBLISH,
    STATUS,
    Caller,
    Located,
    NodeContext,
    ProgressReport,
    Welcome,
    methods,
)
from ecogen.node.parent import Parent
from ecogen.node.status import ask_heard, status_of
from ecogen.records import PhaseRecord, ServedRecord, from_line
from ecogen.runtime.membership import Members
from ecogen.topology import Tier
from ecogen.transport.base import Message, Peer, Stream


class ServingCloud:
    """The cloud of one federation; the model is in the folder that the recipe names."""

    def __init__(self, context: NodeContext, recipe: recipes.Recipe) -> None:
        self._context, self._recipe = context, recipe
        self._log = Log(context.folder / "records.jsonl")
        self._members = Members(recipes.build_topology(recipe.topology).edge_ids, self._log.put)
        self._prepared = asyncio.Event()
        read = lambda names: self._folder.read(names)  # noqa: E731 - the folder is there when a child asks
        parent = Parent(Tier.EDGE, context, self._members, self._welcome, read, self._log.put, "serve")
        asked = {STATUS: self._status, DESCRIBE: self._describe, LOCATE: self._locate}
        self.methods = {
            **parent.methods(),
            **methods(Caller(Tier.EDGE), **{PUBLISH: self._publish}),
            **methods(Caller(OPERATOR), **asked),
        }

    async def run(self, address: str) -> None:
        """Answer edges."""
        compute = self._context.worker.compute
        self._folder = await compute(open_folder, Path(self._recipe.model.source))
        self._digest = await compute(lambda: self._folder.digest)
        self._prepared.set()
        await self._members.watch_for_silence()

    async def accept(self, peer: Peer, stream: Stream) -> None:
        """Nobody streams to the cloud."""
        await stream.close()

    async def _welcome(self, _: str) -> Message:
        await self._prepared.wait()
        folder = self._folder
        table = recipes.to_table(self._recipe)
        files = await self._context.worker.compute(read_text_files, folder.path)
        names, nbytes = list(folder.files), folder.nbytes
        welcome = Welcome(table, dict(folder.config), self._digest, names=names, files=files, nbytes=nbytes)
        return Message.of("join", welcome)

    def _write_own_books(self) -> None:
        """As often as an edge writes its own."""
        usage = self._context.worker.usage("serving")
        self._log.put(PhaseRecord(self._context.node_id, "serving", usage.wall_s, (usage,), time_s=time.time()))

    async def _describe(self, _: Peer, __: Message) -> Message:
        """What an edge is told when it joins, for an operator whose gateway joins."""
        return replace(await self._welcome(OPERATOR), counted=False)

    async def _status(self, _: Peer, __: Message) -> Message:
        await hand_in_books(self._context.transport, self._members.ready_ids)
        edge_ids = self._members.expected
        progress = ProgressReport("serving", len(self._members.ready_ids), len(edge_ids), "edges are ready")
        heard_s = await ask_heard(self._context.transport, self._members)
        status = status_of(self._recipe, progress, self._log.records, self._members.addresses, heard_s, finished=False)
        return Message.of(STATUS, status, counted=False)

    async def _locate(self, _: Peer, __: Message) -> Message:
        return Message.of(LOCATE, Located(self._members.addresses), counted=False)

    async def _publish(self, peer: Peer, message: Message) -> Message:
        """Take a record of an edge."""
        try:
            record = from_line(message.body)
        except msgspec.MsgspecError as problem:
            raise ProtocolError(f"{peer.node_id} published what is not a record: {problem}") from problem
        if isinstance(record, ServedRecord) and not self._log.has(record):
            self._write_own_books()
        self._log.put(record)
        return Message.of(PUBLISH, counted=message.counted)
