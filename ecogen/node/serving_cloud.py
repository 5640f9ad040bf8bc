"""The cloud of a federation that serves: keeps the model, delivers it to edges, and keeps the records."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from ecogen import config as recipes
from ecogen.errors import ProtocolError
from ecogen.models.folder import open_folder, read_text_files
from ecogen.node.cloud import Log
from ecogen.node.context import PUBLISH, Caller, NodeContext, Welcome, methods
from ecogen.node.parent import Parent
from ecogen.records import from_line
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
        parent = Parent(Tier.EDGE, context, self._members, self._welcome, read, self._log.put)
        self.methods = parent.methods() | methods(Caller(Tier.EDGE), **{PUBLISH: self._publish})

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
        welcome = Welcome(table, dict(folder.config), self._digest, names=list(folder.files), files=files)
        return Message.of("join", welcome)

    async def _publish(self, peer: Peer, message: Message) -> Message:
        """Take a record of an edge."""
        try:
            self._log.put(from_line(message.body))
        except msgspec.MsgspecError as problem:
            raise ProtocolError(f"{peer.node_id} published what is not a record: {problem}") from problem
        return Message.of(PUBLISH, counted=message.counted)
