"""An edge that serves: has its clusters hold the model, and answers what gateways ask."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import product
from pathlib import Path

from ecogen import config as recipes
from ecogen.accounting.constants import Constants
from ecogen.errors import AuthenticationError, CheckpointError, NodeLostError, ProtocolError, ServingError
from ecogen.models.folder import ModelFolder, open_folder, write_text_files
from ecogen.models.mixed_lora import Adapter
from ecogen.node.books import BooksOfEdge
from ecogen.node.context import BOOKS, HEARD, OPERATOR, PUBLISH, Caller, NodeContext, Ready, Welcome, methods
from ecogen.node.parent import Parent
from ecogen.node.status import tell_heard
from ecogen.records import PhaseRecord, Usage
from ecogen.runtime.membership import Members, attend
from ecogen.runtime.neighbours import Neighbours
from ecogen.runtime.outbox import Outbox
from ecogen.serving.answers import Answers
from ecogen.serving.cluster import Account, ServedCluster
from ecogen.serving.desk import Desk, Generate
from ecogen.serving.generation import Finish, Taken
from ecogen.serving.language import LanguageModel
from ecogen.serving.loading import (
    DRAIN,
    DROP,
    HOLDS,
    PREPARE,
    Assembly,
    Drain,
    Drop,
    Held,
    Holds,
    fetch_folder,
)
from ecogen.serving.replicas import Replicas
from ecogen.serving.sampling import Chosen
from ecogen.serving.semantic import from_config
from ecogen.serving.tally import Tally
from ecogen.topology import Tier
from ecogen.transport.base import Message, Peer, Stream


class ServingEdge:
    """One edge site; which devices it has, the cloud's welcome says."""

    def __init__(self, context: NodeContext, cloud_id: str) -> None:
        self._context, self._cloud_id = context, cloud_id
        self._outbox = Outbox(context.folder / "records.jsonl", self._send_record)
        self._members = Members([], self._outbox.put)
        self._prepared = asyncio.Event()
        self._clusters: list[ServedCluster] = []
        self._neighbours = Neighbours(context.transport, self._deliver, self._lose)
        read = lambda names: self._folder.read(names)  # noqa: E731 - the folder is there when a child asks
        parent = Parent(Tier.END, context, self._members, self._welcome, read, self._outbox.put, "serve")
        self._assembly = Assembly()
        self._early: dict[str, Adapter] = {}  # came before the clusters were known
        self._num_gateways, self._was_left = 0, asyncio.Event()
        self.methods = {
            **parent.methods(),
            **methods(Caller(OPERATOR), **{PREPARE: self._hold, HOLDS: self._is_held}),
            **methods(Caller(OPERATOR), **{DROP: self._forget, DRAIN: self._drain}),
            **methods(Caller(OPERATOR), Caller(Tier.CLOUD, cloud_id), **{BOOKS: self._hand_in_books}),
            **methods(Caller(Tier.CLOUD, cloud_id), **{HEARD: tell_heard(self._members)}),
        }

    async def run(self, address: str) -> None:
        """Stay a member of the cloud and serve; that goes on while the cloud is away."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(attend(self._context.transport, self._cloud_id, address, self._prepare))
                group.create_task(self._members.watch_for_silence())
                group.create_task(self._outbox.run())
                await self._prepared.wait()
                group.create_task(self._replicas.run())
                group.create_task(self._forget_all())
                group.create_task(self._books.keep())
        finally:
            await self._neighbours.close()

    async def accept(self, peer: Peer, stream: Stream) -> None:
        """Serve the stream of a gateway, or of a device that is here.

        Raises:
            AuthenticationError: if it is neither.
        """
        if peer.tier == OPERATOR:
            await self._attend_gateway(peer, stream)
        elif peer.tier == Tier.END and self._members.is_ready(peer.node_id):
            await self._neighbours.adopt(peer, stream)
        else:
            raise AuthenticationError(f"{peer.node_id!r} ({peer.tier}) is no device of {self._context.node_id!r}")

    async def _attend_gateway(self, peer: Peer, stream: Stream) -> None:
        """Take its requests. With the last gateway go all adapters: whichever comes next brings its own."""
        self._num_gateways += 1
        try:
            await Desk(peer, stream, self._answer).run()
        finally:
            self._num_gateways -= 1
            if not self._num_gateways:
                self._was_left.set()

    async def _forget_all(self) -> None:
        """Forever: when the last gateway has left, have no stage hold an adapter."""
        while True:
            await self._was_left.wait()
            self._was_left.clear()
            if not self._num_gateways:
                self._assembly.clear()
                self._early.clear()
                await asyncio.gather(*(cluster.drop_all() for cluster in self._clusters))

    async def _prepare(self, message: Message) -> Message:
        """Get ready to work as the cloud's welcome says; returns the answer to it."""
        if self._prepared.is_set():
            self._books.end_window()  # it served, and the cloud was away
        else:
            await self._settle(message.read(Welcome))
            self._prepared.set()
        return Message.of("ready", Ready(self._context.worker.usage("delivery")))

    async def _settle(self, welcome: Welcome) -> None:
        context = self._context
        recipe = recipes.from_table(welcome.recipe, f"the recipe of {self._cloud_id}")
        self._recipe, self._topology = recipe, recipes.build_topology(recipe.topology)
        self._folder = await self._obtain(welcome, Path(recipe.model.source))
        self._answers = Answers(recipe.serving.answers)
        self._semantic = await context.worker.compute(from_config, recipe.serving.semantic)
        self._books = BooksOfEdge(context, self._members, self._outbox, recipe.serving.books_s)
        clusters = self._topology.clusters_of(context.node_id)
        dtypes = {recipes.compute_of(recipe, node_id).dtype for cluster in clusters for node_id in cluster.node_ids}
        model = LanguageModel(self._folder, dtypes)
        account = Account(self._finish, self._count, self._note_loaded)
        self._clusters = [
            ServedCluster(
                cluster,
                self._topology.nodes,
                model,
                recipe.serving,
                self._members,
                context.transport,
                self._neighbours,
                account,
                recipe.placement.labels,
            )
            for cluster in clusters
        ]
        for cluster, (adapter_id, adapter) in product(self._clusters, self._early.items()):
            cluster.adapters.keep(adapter_id, adapter)
        self._early.clear()
        spec = recipe.serving
        least = spec.replicas or len(self._clusters)
        self._replicas = Replicas(self._clusters, least, busy_s=spec.busy_s, idle_s=spec.idle_s)
        self._members.expected = [node_id for cluster in clusters for node_id in cluster.node_ids]

    async def _obtain(self, welcome: Welcome, source: Path) -> ModelFolder:
        """The model: where the cloud has it, if this machine has that too, or else on this edge's disk."""
        compute = self._context.worker.compute
        try:
            folder = await compute(open_folder, source)
            if await compute(lambda: folder.digest) == welcome.digest:
                return folder
        except CheckpointError:
            pass
        names = {name: [name] for name in welcome.names}
        path = self._context.folder / f"model-{welcome.digest}"
        await fetch_folder(self._context.transport, self._cloud_id, path, welcome.model, names, compute)
        await compute(write_text_files, path, welcome.files)
        return await compute(open_folder, path)

    async def _welcome(self, device_id: str) -> Message:
        await self._prepared.wait()
        if device_id not in self._members.expected:
            raise ProtocolError(f"{device_id!r} is not a device of {self._context.node_id!r}; let it join its own edge")
        return Message.of("join", Welcome(recipes.to_table(self._recipe), {}, ""))

    async def _answer(self, wanted: Generate) -> AsyncGenerator[Chosen | Finish, bool | None]:
        """As it was answered before, where it was, or else by a cluster."""
        await self._prepared.wait()
        known, taken = await self._known(wanted)
        if known:
            num_prompt = len(wanted.request.prompt)
            tally = Tally(
                self._context.node_id, "", num_prompt, num_reused=num_prompt, is_probe=wanted.request.is_probe
            )
            for chosen in known:
                tally.num_tokens += 1
                if (yield chosen):
                    break
            self._count(tally)
            yield replace(self._finish(tally), taken=taken)
            return
        said = list[Chosen]()
        async with aclosing(self._computed(wanted)) as answer:
            one = await anext(answer)
            while isinstance(one, Chosen):
                said.append(one)
                is_stopped = yield one
                one = await answer.asend(is_stopped)
                if is_stopped:
                    said.clear()
            if said:
                await self._keep(wanted, said)
            yield one

    async def _known(self, wanted: Generate) -> tuple[Sequence[Chosen], Taken | None]:
        """A whole answer that was given before, and of which question it is where that was another."""
        if (same := self._answers.find(wanted)) is not None:
            return same, None
        if not self._semantic.is_on:
            return (), None
        return await self._context.worker.compute(self._semantic.find, wanted) or ((), None)

    async def _keep(self, wanted: Generate, said: Sequence[Chosen]) -> None:
        self._answers.keep(wanted, said)
        if self._semantic.is_on:
            await self._context.worker.compute(self._semantic.keep, wanted, said)

    def _computed(self, wanted: Generate) -> AsyncGenerator[Chosen | Finish, bool | None]:
        cluster = self._replicas.choose(wanted.request, wanted.adapter_id)
        return cluster.generate(wanted.request_id, wanted.request, wanted.adapter_id, wanted.given)

    async def _hold(self, _: Peer, message: Message) -> Message:
        """Keep an adapter once all of it is here, and have the stages hold it that there are; says whether they do."""
        adapter_id, adapter = self._assembly.add(message)
        if adapter is None:
            return Message.of(PREPARE, Held())
        if not self._clusters:
            self._early[adapter_id] = adapter
        held = await asyncio.gather(*(cluster.prepare(adapter_id, adapter) for cluster in self._clusters))
        return Message.of(PREPARE, Held(any(held)))

    async def _is_held(self, _: Peer, message: Message) -> Message:
        adapter_id = message.read(Holds).adapter_id
        return Message.of(HOLDS, Held(any(cluster.holds(adapter_id) for cluster in self._clusters)))

    async def _forget(self, _: Peer, message: Message) -> Message:
        adapter_id = message.read(Drop).adapter_id
        self._early.pop(adapter_id, None)
        self._assembly.forget(adapter_id)
        await asyncio.gather(*(cluster.drop(adapter_id) for cluster in self._clusters))
        return Message.of(DROP)

    async def _drain(self, _: Peer, message: Message) -> Message:
        """Hold nothing on a device any more, or do again.

        Raises:
            ServingError: if it is none of this edge's.
        """
        drain = message.read(Drain)
        owners = [cluster for cluster in self._clusters if cluster.has(drain.node_id)]
        if not owners:
            raise ServingError(f"{drain.node_id!r} is no device of {self._context.node_id!r}")
        await owners[0].drain(drain.node_id, is_out=drain.is_out)
        return Message.of(DRAIN)

    def _finish(self, tally: Tally) -> Finish:
        return tally.finish(self._topology, Constants())

    def _count(self, tally: Tally) -> None:
        if not tally.is_probe:
            self._books.count(tally, self._finish(tally).bill.energy_j.mid)

    def _note_loaded(self, usage: Usage) -> None:
        self._outbox.put(PhaseRecord(usage.node_id, "delivery", usage.wall_s, (usage,), time_s=time.time()))

    async def _hand_in_books(self, peer: Peer, _: Message) -> Message:
        """Write the books now, and see that the cloud has them. Who leaves may be the last one who asks for it."""
        if self._prepared.is_set() and (self._books.has_news or peer.tier == OPERATOR):
            await self._books.hand_in()
        return Message.of(BOOKS, counted=False)

    def _deliver(self, sender_id: str, message: Message) -> None:
        for cluster in self._clusters:
            if cluster.has(sender_id):
                cluster.deliver(message)

    def _lose(self, error: NodeLostError) -> None:
        for cluster in self._clusters:
            cluster.lose(error)

    async def _send_record(self, line: bytes) -> None:
        await self._context.transport.call(self._cloud_id, Message(PUBLISH, body=line))
