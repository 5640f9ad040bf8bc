"""An edge: holds the domain model, tunes it with its clusters round by round, and has it answer requests in the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
from torch import Tensor

from ecogen import config as recipes
from ecogen.errors import NodeLostError, ProtocolError, TransportError
from ecogen.models.adapters import load_whole, read_backbone
from ecogen.models.checkpoint import Foundation, open_foundation
from ecogen.models.family import family_of, whole_segment
from ecogen.models.profile import shape_of
from ecogen.models.tunables import get_tunables, tunables_of
from ecogen.node.context import (
    BOOKS,
    HEARD,
    INSTALL,
    OPERATOR,
    PUBLISH,
    RESULT,
    Caller,
    NodeContext,
    Ready,
    Welcome,
    methods,
)
from ecogen.node.crossings import compare_crossings
from ecogen.node.device import ASK, Ask, Asked, Install
from ecogen.node.parent import Parent
from ecogen.node.status import tell_heard
from ecogen.placement import Placement, neighbours_of, segments_held
from ecogen.planning.clusters import place_clusters
from ecogen.records import EventKind, EventRecord, PhaseRecord, Score
from ecogen.relay.edge import Domain, EdgeRelay
from ecogen.relay.generator import Generator
from ecogen.runtime.membership import Members, attend
from ecogen.runtime.outbox import Outbox
from ecogen.runtime.stage import Stage
from ecogen.storage import write_atomically
from ecogen.topology import Tier
from ecogen.transport.base import Message, Peer, Stream
from ecogen.tuning.discretion import spread
from ecogen.tuning.edge_state import EdgeState
from ecogen.tuning.evaluate import Evaluator
from ecogen.tuning.foundation import fetch_foundation
from ecogen.tuning.messages import placement_table
from ecogen.tuning.pair_data import domain_at, domains_of, read_domain
from ecogen.tuning.privacy import ClusterPrivacy, ExamplePrivacy
from ecogen.tuning.ranks import LoraRanks
from ecogen.tuning.rounds import EdgeRounds
from ecogen.tuning.task import task_of
from ecogen.units import MIB


class EdgeRole:
    """One edge site; which devices it has, the cloud's welcome says."""

    def __init__(self, context: NodeContext, cloud_id: str) -> None:
        self._context, self._cloud_id = context, cloud_id
        self._outbox = Outbox(context.folder / "records.jsonl", self._send_record)
        self._members = Members([], self._outbox.put)
        self._prepared = asyncio.Event()
        self._books_closed = False
        self._incarnation = _next_incarnation(context.folder / "incarnation")
        self._work: asyncio.Task[None] | None = None
        parent = Parent(Tier.END, context, self._members, self._welcome, self._read, self._outbox.put)
        self.methods = {
            **parent.methods(),
            **methods(Caller(OPERATOR), **{RESULT: self._result}),
            **methods(Caller(Tier.CLOUD, cloud_id), **{HEARD: tell_heard(self._members)}),
        }

    async def run(self, address: str) -> None:
        """Stay a member of the cloud and do what it is there for; the rounds go on while the cloud is away."""
        async with asyncio.TaskGroup() as group:
            group.create_task(attend(self._context.transport, self._cloud_id, address, self._prepare))
            group.create_task(self._members.watch_for_silence())
            group.create_task(self._outbox.run())
            await self._prepared.wait()
            group.create_task(self._tune_then_serve())

    async def accept(self, peer: Peer, stream: Stream) -> None:
        """Nobody streams to an edge."""
        await stream.close()

    async def _prepare(self, message: Message) -> Message:
        """Get ready to work as the cloud's welcome says; returns the answer to it."""
        if not self._prepared.is_set():
            await self._settle(message.read(Welcome), dict(message.tensors))
            self._prepared.set()
        return Message.of("ready", Ready(self._context.worker.usage("delivery", self._stage.memory_bytes)))

    async def _settle(self, welcome: Welcome, tunables: dict[str, Tensor]) -> None:
        context = self._context
        self._recipe = recipe = recipes.from_table(welcome.recipe, f"the recipe of {self._cloud_id}")
        self._family = family_of(welcome.model["model_type"])
        self._digest, self._config = welcome.digest, self._family.config(welcome.model)
        self._shape = shape_of(self._config, recipe)
        placements = place_clusters(recipe, self._shape)
        topology = recipes.build_topology(recipe.topology)
        self._placements = {c.cluster_id: placements[c.cluster_id] for c in topology.clusters_of(context.node_id)}
        self._members.expected = [node_id for placement in self._placements.values() for node_id in placement.node_ids]
        self._foundation = await self._fetch_foundation(welcome.offered)
        self._stage = await context.worker.compute(self._load)
        self._evaluators = await context.worker.compute(self._make_evaluators)
        path = context.folder / "state.safetensors"
        own = get_tunables(self._stage.model)  # of which the cloud has all, but for the head where labels differ
        state = EdgeState.load(path) if path.exists() else EdgeState({**own, **tunables}, welcome.next_round)
        self._rounds = EdgeRounds(
            state,
            path,
            recipe.tuning,
            self._placements,
            self._members,
            context.transport,
            context.worker,
            self._cloud_id,
            self._evaluate,
            self._outbox.put,
            attempt=self._incarnation * 1_000_000,
            num_owners=recipe.data.owners,
            aggregation=recipe.aggregation,
            ranks=LoraRanks.of(recipe),
            seed=recipe.seed,
            privacy=self._privacy(),
            examples=ExamplePrivacy(recipe.privacy) if recipe.privacy.protects_examples else None,
            wire=recipe.wire,
            keeps_head=not tunables.keys() >= own.keys(),
            lessons=await context.worker.compute(self._make_relay) if recipe.relay.is_on else None,
        )

    def _make_relay(self) -> EdgeRelay:
        context, recipe = self._context, self._recipe
        edge_ids, length = recipes.build_topology(recipe.topology).edge_ids, recipe.model.context_length
        folder = self._foundation.folder
        generator = Generator(self._stage, folder, self._shape, context.worker, recipe.relay, length)
        domains = [
            Domain(*read_domain(recipe, edge_ids, context.node_id, generator.writer, generator.images, domain))
            for domain in range(len(domains_of(recipe.data, context.node_id)))
        ]
        return EdgeRelay(
            context.node_id,
            edge_ids.index(context.node_id),
            generator,
            context.worker,
            recipe.relay,
            lambda round_index: domains[domain_at(recipe.data, context.node_id, round_index)],
            context.folder / "relay",
            seed=recipe.seed,
            num_edges=len(edge_ids),
        )

    def _privacy(self) -> ClusterPrivacy | None:
        spec = self._recipe.privacy
        if not spec.protects_clusters:
            return None
        return ClusterPrivacy(spec, self._recipe.tuning.participation, len(self._placements))

    async def _fetch_foundation(self, offered: list[str]) -> Foundation:
        """The whole backbone on this edge's disk, fetched from the cloud unless it is there."""
        folder = self._context.folder / f"backbone-{self._digest}"
        if (folder / "config.json").exists():
            return open_foundation(folder)
        context = self._context
        names = offered or self._family.names(self._config, [whole_segment(self._config)], ())
        return await fetch_foundation(
            context.transport, self._cloud_id, self._config, names, folder, context.worker.compute
        )

    def _load(self) -> Stage:
        model = load_whole(self._foundation, self._config, self._recipe.tunables, self._recipe.seed)
        return Stage(model, device=self._context.device, dtype=self._context.dtype)

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return read_backbone(self._foundation, self._config, names)

    def _make_evaluators(self) -> list[Evaluator]:
        """Of each domain that this edge has in its time."""
        recipe, node_id = self._recipe, self._context.node_id
        task = task_of(recipe, recipes.build_topology(recipe.topology), self._foundation.folder)
        domains = range(len(domains_of(recipe.data, node_id)))
        kept_bytes = int(recipe.tuning.prefix_memory_mib * MIB) // len(domains)
        stage, shape, worker = self._stage, self._shape, self._context.worker
        return [Evaluator(stage, shape, worker, task.evaluated(node_id, domain), kept_bytes) for domain in domains]

    def _evaluate(self, tunables: Mapping[str, Tensor]) -> Score:
        """By what is this edge's domain in the round under way."""
        domain = domain_at(self._recipe.data, self._context.node_id, self._rounds.state.next_round)
        return self._evaluators[domain](tunables)

    async def _welcome(self, device_id: str) -> Message:
        await self._prepared.wait()
        cluster = next((p for p in self._placements.values() if device_id in p.node_ids), None)
        if cluster is None:
            raise ProtocolError(f"{device_id!r} is not a device of {self._context.node_id!r}; let it join its own edge")
        table, offered = recipes.to_table(self._recipe), self._foundation.offered
        welcome = Welcome(table, self._config.to_dict(), self._digest, placement_table(cluster), offered=offered)
        return Message.of("join", welcome)

    # After the last round.

    async def _tune_then_serve(self) -> None:
        if self._incarnation > 1:
            self._announce("resumed", f"from round {self._rounds.state.next_round + 1}")
        elif self._recipe.data.is_text:
            await self._evaluate_delivered()
        await self._rounds.run()
        await self._install()
        await self._serve_requests()
        if self._recipe.evaluation.crossings:
            await compare_crossings(
                self._context, self._cloud_id, self._foundation.folder, self._recipe, self._outbox.put
            )
        await self._close_books()
        self._announce("finished", f"{self._rounds.state.next_round} rounds")

    async def _evaluate_delivered(self) -> None:
        """Publish how well the model does that the cloud delivered, before anything is tuned here."""
        context = self._context
        score = await context.worker.compute(self._evaluate, self._rounds.state.tunables)
        usage = context.worker.usage("evaluation", self._stage.memory_bytes)
        record = PhaseRecord(context.node_id, "evaluation", usage.wall_s, (usage,), "the delivered model", time.time())
        self._outbox.put(msgspec.structs.replace(record, perplexity=score.perplexity))

    async def _install(self) -> None:
        """Give every device that is here the tuned tunables of its segments, to serve with."""
        orders = []
        for cluster_id, placement in self._placements.items():
            if self._members.are_ready(placement.node_ids):
                tunables = await self._rounds.begin_of(cluster_id)
                orders += [self._install_on(node_id, placement, tunables) for node_id in placement.node_ids]
        await asyncio.gather(*orders)

    async def _install_on(self, node_id: str, placement: Placement, tunables: Mapping[str, Tensor]) -> None:
        owners = self._recipe.data.owners
        own = tunables_of(tunables, segments_held(placement, owners, node_id))
        order = Install(self._members.locate(neighbours_of(placement, owners, node_id)))
        await self._ask_device(node_id, Message.of(INSTALL, order, kind="tunables", tensors=own))

    async def _serve_requests(self) -> None:
        """Have each cluster in turn answer test examples, one a request."""
        for number in range(self._recipe.evaluation.requests):
            formed = self._rounds.formed()
            if not formed:
                return
            start = self._placements[formed[number % len(formed)]].start_id
            ask = Ask(f"{self._context.node_id}-{number}", test_indices=[number])
            reply = await self._ask_device(start, Message.of(ASK, ask))
            if reply is not None:
                self._outbox.put(reply.read(Asked).record)

    async def _close_books(self) -> None:
        """Collect what no answer has reported yet; this collection itself is not in the books."""
        books = [self._ask_device(node_id, Message.of(BOOKS, counted=False)) for node_id in self._members.ready_ids]
        replies = [reply for reply in await asyncio.gather(*books) if reply is not None]
        await self._outbox.flush()
        usages = [reply.read(Ready).usage for reply in replies] + [self._context.worker.usage("serving")]
        self._books_closed = True
        wall_s = max(usage.wall_s for usage in usages)
        if self._recipe.privacy.protects_clusters:  # a device's last window begins with the last round it took part in
            usages = list(spread(usages, [placement.node_ids for placement in self._placements.values()]))
        self._outbox.put(PhaseRecord(self._context.node_id, "serving", wall_s, tuple(usages), time_s=time.time()))

    async def _ask_device(self, node_id: str, message: Message) -> Message | None:
        try:
            return await self._context.transport.call(node_id, message)
        except TransportError as problem:
            lost = problem.node_id if isinstance(problem, NodeLostError) else node_id
            await self._members.lose(lost, str(problem))
            return None

    async def _result(self, _: Peer, __: Message) -> Message:
        await self._prepared.wait()  # a run that was cut off while it was saved asks at once when it is resumed
        return Message.of(RESULT, tensors=dict(self._rounds.state.tunables), counted=False)

    # Records.

    def _announce(self, event: EventKind, detail: str) -> None:
        self._outbox.put(EventRecord(event, self._context.node_id, detail=detail, time_s=time.time()))

    async def _send_record(self, line: bytes) -> None:
        message = Message(PUBLISH, body=line, counted=not self._books_closed)
        await self._context.transport.call(self._cloud_id, message)


def _next_incarnation(path: Path) -> int:
    """How many times this node has been started on this disk, this time included."""
    number = int(path.read_text()) + 1 if path.exists() else 1
    write_atomically(path, str(number))
    return number
