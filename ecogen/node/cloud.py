"""The cloud: makes and delivers the foundation model, averages over edges, keeps the federation's records."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
from torch import Tensor

from ecogen import config as recipes
from ecogen.errors import ProtocolError, TransportError
from ecogen.models.adapters import load_whole, read_backbone
from ecogen.models.checkpoint import Foundation, load_tensors
from ecogen.models.profile import shape_of
from ecogen.models.tunables import get_tunables
from ecogen.node.context import (
    DESCRIBE,
    END,
    OPERATOR,
    PROGRESS,
    PUBLISH,
    RECORD,
    RESULT,
    STATUS,
    WATCH,
    Caller,
    NodeContext,
    ProgressReport,
    Welcome,
    methods,
)
from ecogen.node.crossings import asked_generator
from ecogen.node.parent import Parent
from ecogen.node.status import ask_heard, status_of
from ecogen.planning.clusters import place_clusters
from ecogen.records import EventRecord, PhaseRecord, Record, RelayRecord, RoundRecord, from_line, read_records, to_line
from ecogen.relay.cloud import CloudRelay
from ecogen.relay.cloud_learner import Learner, known_glyphs
from ecogen.relay.generator import Generator
from ecogen.relay.messages import RELAY, TUNED, VERDICT
from ecogen.runtime.membership import Members
from ecogen.runtime.stage import Stage
from ecogen.serving.crossing import CROSS, AskedGenerator
from ecogen.storage import append_line, read_lines
from ecogen.topology import Tier
from ecogen.transport.base import Message, Peer, Stream
from ecogen.tuning.evaluate import Evaluator
from ecogen.tuning.messages import SYNC
from ecogen.tuning.ranks import LoraRanks
from ecogen.tuning.sync import CloudState, CloudSync
from ecogen.tuning.task import task_of
from ecogen.units import MIB

logger = logging.getLogger(__name__)

OnStep = Callable[[str, int, int, float], None]
Foundry = Callable[[recipes.Recipe, OnStep], tuple[Foundation, str]]
"""Gives the foundation model of a recipe, and says how it came by it; runs on the compute thread."""


class Watch(msgspec.Struct, frozen=True):
    """Operator to cloud, opening a stream: send me the records from this number on, and what comes."""

    begin: int = 0


class Log:
    """All records of the federation, on disk and to those who watch. Each is kept once, however often it is sent."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records = read_records(read_lines(path), str(path))
        self._keys = {_key(record) for record in self.records}
        self.changed = asyncio.Condition()

    def put(self, record: Record) -> None:
        """Take a record; one that is there already is skipped."""
        if not self.has(record):
            append_line(self._path, to_line(record))
            self._keys.add(_key(record))
            self.records.append(record)

    def has(self, record: Record) -> bool:
        """Whether it is here already."""
        return _key(record) in self._keys

    async def announce(self) -> None:
        """Wake those who watch."""
        async with self.changed:
            self.changed.notify_all()


class CloudRole:
    """The cloud of one federation.

    Args:
        foundry: where the foundation model comes from.
        tuned: tunables to begin with, for a federation that only serves.
    """

    def __init__(
        self, context: NodeContext, recipe: recipes.Recipe, foundry: Foundry, *, tuned: Path | None = None
    ) -> None:
        self._context, self._recipe, self._foundry, self._tuned = context, recipe, foundry, tuned
        self._topology = recipes.build_topology(recipe.topology)
        self._log = Log(context.folder / "records.jsonl")
        self._members = Members(self._topology.edge_ids, self._log.put)
        self._progress = ProgressReport("starting", 0, 1)
        self._prepared = asyncio.Event()
        self._begin_more_rounds()
        self._finished_edges = self._finished
        parent = Parent(Tier.EDGE, context, self._members, self._welcome, self._read, self._log.put)
        self.methods = {
            **parent.methods(),
            **methods(
                Caller(Tier.EDGE),
                **{SYNC: self._on_sync, PUBLISH: self._publish, CROSS: self._on_crossing},
                **{TUNED: self._on_tuned, RELAY: self._on_relay, VERDICT: self._on_verdict},
            ),
            **methods(Caller(OPERATOR), **{STATUS: self._status, RESULT: self._result, DESCRIBE: self._describe}),
        }

    async def run(self, address: str) -> None:
        """Prepare the foundation model, then answer edges and watchers."""
        logger.info("%s serves at %s", self._context.node_id, address)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._members.watch_for_silence())
            group.create_task(self._tick())
            await self._prepare()

    async def _tick(self) -> None:
        """Forever: let watchers see what changed; a steady beat also wakes them for progress."""
        while True:
            await self._log.announce()
            await asyncio.sleep(0.1)

    async def _prepare(self) -> None:
        context, recipe = self._context, self._recipe
        self._foundation, how = await context.worker.compute(self._foundry, recipe, self._on_step)
        self._digest = await context.worker.compute(lambda: self._foundation.digest)
        await context.worker.compute(self._load)
        usage = context.worker.usage("pretraining", self._stage.memory_bytes)
        self._log.put(PhaseRecord(context.node_id, "pretraining", usage.wall_s, (usage,), how, time.time()))
        path = context.folder / "state.safetensors"
        state = CloudState.load(path) if path.exists() else self._first_state()
        evaluate = await context.worker.compute(self._evaluator)
        patience_s = recipe.tuning.rejoin_timeout_s
        self._sync = CloudSync(
            context.node_id,
            state,
            path,
            self._members,
            context.worker,
            evaluate,
            self._log.put,
            patience_s=patience_s,
            ranks=LoraRanks.of(recipe),
        )
        self._relay = await context.worker.compute(self._make_relay) if recipe.relay.is_on else None
        if self._relay is not None:
            self._relay.publish_again()
        self._asked = await context.worker.compute(self._make_asked) if recipe.evaluation.crossings else None
        self._report(ProgressReport("delivery", 0, len(self._topology.end_ids)))
        await self._set_finished()
        self._prepared.set()
        if not self._has_finished:  # the edges may have, while this node was away
            self._close_books()

    def _load(self) -> None:
        self._task = task_of(self._recipe, self._topology, self._foundation.folder)
        self._config = self._task.config(self._foundation)
        self._shape = shape_of(self._config, self._recipe)
        place_clusters(self._recipe, self._shape)
        model = load_whole(self._foundation, self._config, self._recipe.tunables, self._recipe.seed)
        self._stage = Stage(model, device=self._context.device, dtype=self._context.dtype)

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return read_backbone(self._foundation, self._config, names)

    def _first_state(self) -> CloudState:
        if self._tuned is None:
            return CloudState(self._task.shared(get_tunables(self._stage.model)))
        return CloudState(load_tensors(self._tuned), self._recipe.tuning.rounds - 1)

    def _evaluator(self) -> Evaluator:
        kept_bytes = int(self._recipe.tuning.prefix_memory_mib * MIB)
        return Evaluator(self._stage, self._shape, self._context.worker, self._task.evaluated(), kept_bytes)

    def _make_relay(self) -> CloudRelay:
        context, recipe = self._context, self._recipe
        length = recipe.model.context_length
        folder, shape = self._foundation.folder, self._shape
        told = lambda done, total: self._report(ProgressReport("learning", done, total, "from edges"))  # noqa: E731
        generator = Generator(self._stage, folder, shape, context.worker, recipe.relay, length, on_step=told)
        learner = Learner(
            context.node_id,
            generator,
            get_tunables(self._stage.model),
            context.folder / "relay",
            recipe.relay,
            known_glyphs(generator, recipe.seed),
            seed=recipe.seed,
            ranks=LoraRanks.of(recipe),
        )
        patience_s, rounds = recipe.tuning.rejoin_timeout_s, recipe.tuning.rounds
        return CloudRelay(learner, self._members, context.worker, self._log.put, rounds=rounds, patience_s=patience_s)

    async def _set_finished(self) -> None:
        await self._sync.set_finished(self._finished_edges)
        if self._relay is not None:
            await self._relay.set_finished(self._finished_edges)

    # Edges.

    async def _on_tuned(self, peer: Peer, message: Message) -> Message:
        return await (await self._relay_of(peer)).take_tunables(peer, message)

    async def _on_relay(self, peer: Peer, message: Message) -> Message:
        return await (await self._relay_of(peer)).exchange(peer, message)

    async def _on_verdict(self, peer: Peer, message: Message) -> Message:
        return await (await self._relay_of(peer)).judged(peer, message)

    async def _relay_of(self, peer: Peer) -> CloudRelay:
        await self._prepared.wait()
        if self._relay is None:
            raise ProtocolError(
                f"{peer.node_id} has something for a relay, and none is asked for; set relay.every or relay.drift"
            )
        return self._relay

    async def _on_crossing(self, peer: Peer, message: Message) -> Message:
        """Draw or describe for an edge, with what the cloud knows now."""
        await self._prepared.wait()
        if self._asked is None:
            raise ProtocolError(f"{peer.node_id} asks for a picture, and none is asked for; set evaluation.crossings")
        return await self._asked.answer(message)

    def _make_asked(self) -> AskedGenerator:
        folder, length = self._foundation.folder, self._recipe.model.context_length
        return asked_generator(self._context, self._stage, folder, self._shape, length, self._tunables)

    def _tunables(self) -> Mapping[str, Tensor]:
        return self._sync.state.tunables if self._relay is None else self._relay.state.tunables

    async def _welcome(self, node_id: str) -> Message:
        await self._prepared.wait()
        state = self._sync.state
        is_edge = node_id in self._topology.edge_ids  # or else an operator
        config = self._task.config(self._foundation, node_id) if is_edge else self._config
        table, model = recipes.to_table(self._recipe), config.to_dict()
        next_round, offered = state.round_index + 1, self._foundation.offered
        welcome = Welcome(table, model, self._digest, next_round=next_round, offered=offered)
        return Message.of("join", welcome, kind="tunables", tensors=state.tunables)

    async def _on_sync(self, peer: Peer, message: Message) -> Message:
        await self._prepared.wait()  # an edge may ask again before a restarted cloud is ready
        return await self._sync.sync(peer, message)

    async def _publish(self, peer: Peer, message: Message) -> Message:
        """Take a record of an edge."""
        try:
            record = from_line(message.body)
        except msgspec.MsgspecError as problem:
            raise ProtocolError(f"{peer.node_id} published what is not a record: {problem}") from problem
        is_new = not self._log.has(record)
        self._log.put(record)
        if isinstance(record, RoundRecord):
            self._report(ProgressReport("tuning", record.round_index + 1, self._recipe.tuning.rounds, record.node_id))
        if is_new and isinstance(record, EventRecord) and record.event in ("finished", "resumed"):
            self._finished_edges = self._finished
            if self._prepared.is_set():  # or else the end of preparing looks at it
                await self._set_finished()
                self._close_books()
        return Message.of(PUBLISH, counted=message.counted)

    def _close_books(self) -> None:
        """Close the cloud's own books once every edge has closed its own."""
        if self._prepared.is_set() and self._finished_edges.issuperset(self._topology.edge_ids):
            usage = self._context.worker.usage("serving", self._stage.memory_bytes)
            now_s = time.time()
            self._log.put(PhaseRecord(self._context.node_id, "serving", usage.wall_s, (usage,), time_s=now_s))
            self._log.put(EventRecord("finished", self._context.node_id, time_s=now_s))

    # Whoever watches.

    async def accept(self, peer: Peer, stream: Stream) -> None:
        """Send records to an operator, from the one it names, until the federation has finished."""
        if peer.tier != OPERATOR:
            return
        message = await stream.receive()
        if message is None or message.method != WATCH:
            return
        try:
            await self._feed(stream, message.read(Watch).begin)
        except TransportError:
            logger.info("a watcher left")

    async def _feed(self, stream: Stream, sent: int) -> None:
        shown, looked = None, -1
        while True:
            while sent < len(self._log.records):
                await stream.send(Message(RECORD, body=to_line(self._log.records[sent]), counted=False))
                sent += 1
            if sent > looked and self._has_finished:
                await stream.send(Message.of(END, counted=False))
                return
            looked = sent
            if self._progress is not shown:
                shown = self._progress
                await stream.send(Message.of(PROGRESS, shown, counted=False))
            async with self._log.changed:
                await self._log.changed.wait()

    def _begin_more_rounds(self) -> None:
        """Where the federation had finished and is to do more rounds, say that it has not."""
        done = max((r.round_index + 1 for r in self._log.records if isinstance(r, RoundRecord)), default=0)
        if self._has_finished and self._tuned is None and done < self._recipe.tuning.rounds:
            self._log.put(EventRecord("resumed", self._context.node_id, None, "to do more rounds", time.time()))

    @property
    def _finished(self) -> set[str]:
        """The nodes that have finished, and were not started again since; the cloud's start is that of all."""
        nodes: set[str] = set()
        for record in self._log.records:
            if isinstance(record, EventRecord) and record.event == "finished":
                nodes.add(record.node_id)
            elif isinstance(record, EventRecord) and record.event == "resumed":
                nodes = set() if record.node_id == self._context.node_id else nodes - {record.node_id}
        return nodes

    @property
    def _has_finished(self) -> bool:
        return self._context.node_id in self._finished

    async def _status(self, _: Peer, __: Message) -> Message:
        heard_s = await ask_heard(self._context.transport, self._members)
        records, addresses = self._log.records, self._members.addresses
        status = status_of(self._recipe, self._progress, records, addresses, heard_s, finished=self._has_finished)
        return Message.of(STATUS, status, counted=False)

    async def _describe(self, _: Peer, __: Message) -> Message:
        """What an edge is told when it joins, for an operator who saves the run."""
        return replace(await self._welcome(OPERATOR), counted=False)

    async def _result(self, _: Peer, __: Message) -> Message:
        await self._prepared.wait()
        return Message.of(RESULT, tensors=self._tunables(), counted=False)

    def _on_step(self, phase: str, step: int, total: int, loss: float) -> None:
        """Called from the compute thread."""
        self._context.worker.check_given_up()
        self._report(ProgressReport("pretraining", step, total, f"{phase}, loss {loss:.3f}"))

    def _report(self, progress: ProgressReport) -> None:
        self._progress = progress


def _key(record: Record) -> tuple[object, ...]:
    """What makes a record the same record: a node's round or lesson is counted once, even if it was done again."""
    if isinstance(record, RoundRecord):
        return ("round", record.node_id, record.round_index)
    if isinstance(record, RelayRecord):
        return ("relay", record.node_id, record.direction, record.cycle, record.round_index)
    return (type(record).__name__, to_line(record))
