"""An edge in a test: its devices add numbers, so a round's average is known in advance, and its cloud answers one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecogen.config import Aggregation, Tuning
from ecogen.errors import AuthenticationError, EcoGenError
from ecogen.metering.meter import null_meter
from ecogen.placement import place
from ecogen.records import EventRecord, Record, RoundRecord, Score, Usage
from ecogen.runtime.membership import Members
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message, Peer, Stream
from ecogen.transport.memory import MemoryNetwork
from ecogen.tuning.edge_state import EdgeState
from ecogen.tuning.messages import SYNC, TUNE, Sampled, SyncOrder, SyncResult, TuneOrder, TuneResult
from ecogen.tuning.privacy import ClusterPrivacy, ExamplePrivacy
from ecogen.tuning.ranks import LoraRanks
from ecogen.tuning.rounds import EdgeRounds

CLUSTERS = {name: place([f"{name}-0", f"{name}-1"], [1], 2) for name in ("near", "far")}
NAMES = ("vit.layers.0.prompts", "vit.layers.1.prompts", "classifier.bias")
FIRST_ATTEMPT = 1000
FEDAVG = Aggregation()
RECORD = RoundRecord("edge", 2, 0.5, 0.25, 40, ("near",), ("far",), 1.5, (Usage("near-0", "tuning", 1.0, 0.5),), 7.0)


def tunables(value: float) -> dict[str, Tensor]:
    """All tunables, full of one value."""
    return {name: torch.full((2,), value) for name in NAMES}


def values(tensors: Mapping[str, Tensor]) -> set[float]:
    """The values in all tunables, each of which should be there."""
    assert set(tensors) == set(NAMES)
    return {value for tensor in tensors.values() for value in tensor.tolist()}


class Device:
    """Adds a number to what it is sent; the first of a cluster owns its examples."""

    def __init__(self, node_id: str, step: float | Tensor, num_examples: int) -> None:
        self.node_id, self.step, self.num_examples = node_id, step, num_examples
        self.orders: list[TuneOrder] = []
        self.names: set[str] = set()
        self.problems: list[EcoGenError] = []
        self.before_answer: Callable[[], Awaitable[object]] | None = None
        self.sampled: Sampled | None = None

    async def handle(self, _: Peer, message: Message) -> Message:
        assert message.method == TUNE
        self.orders.append(message.read(TuneOrder))
        self.names |= set(message.tensors)
        if self.problems:
            raise self.problems.pop(0)
        if self.before_answer is not None:
            await self.before_answer()
        loss = 0.5 if self.node_id == "near-0" else 1.5 if self.node_id == "far-0" else None
        result = TuneResult(self.num_examples, loss, Usage(self.node_id, "tuning", 1.0, 1.0), sampled=self.sampled)
        tensors = {name: tensor + self.step for name, tensor in message.tensors.items()}
        return Message.of(TUNE, result, kind="tunables", tensors=tensors)

    async def accept(self, peer: Peer, stream: Stream) -> None:
        raise AuthenticationError("these devices talk to nobody")

    @property
    def rounds(self) -> list[int]:
        return [order.key.round_index for order in self.orders]


class Cloud:
    """Answers every edge with the same tunables."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.orders: list[SyncOrder] = []
        self.sent: list[set[float]] = []

    async def handle(self, _: Peer, message: Message) -> Message:
        assert message.method == SYNC
        self.orders.append(message.read(SyncOrder))
        self.sent.append(values(message.tensors))
        return Message.of(SYNC, SyncResult(self.orders[-1].round_index, True), tensors=tunables(self.value))

    async def accept(self, peer: Peer, stream: Stream) -> None:
        raise AuthenticationError("nobody streams to the cloud")


class Edge:
    """An edge with two clusters of two devices: near adds 1 with 30 examples, far adds 5 with 10, 2 on average."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "state.safetensors"
        self.network = MemoryNetwork()
        self.transport = self.network.join(Peer("edge", "edge"))
        self.records: list[Record] = []
        self.saved: list[EdgeState | None] = []
        self.members = Members([n for placement in CLUSTERS.values() for n in placement.node_ids], self.publish)
        self.worker = Worker(null_meter("edge"), self.transport.counter)
        numbers = {"near-0": (1, 30), "near-1": (1, 0), "far-0": (5, 10), "far-1": (5, 0)}
        self.devices = {node_id: Device(node_id, *number) for node_id, number in numbers.items()}

    async def arrive(self, *node_ids: str) -> None:
        for node_id in node_ids:
            await self.network.join(Peer(node_id, "end")).serve(self.devices[node_id])
            await self.members.join(node_id, f"at {node_id}")
            await self.members.ready(node_id)

    async def have_cloud(self, value: float) -> Cloud:
        cloud = Cloud(value)
        await self.network.join(Peer("cloud", "cloud")).serve(cloud)
        return cloud

    def rounds(
        self,
        state: EdgeState | None = None,
        aggregation: Aggregation = FEDAVG,
        ranks: LoraRanks | None = None,
        privacy: ClusterPrivacy | None = None,
        examples: ExamplePrivacy | None = None,
        **tuning: Any,
    ) -> EdgeRounds:
        return EdgeRounds(
            state or EdgeState(tunables(0.0)),
            self.path,
            Tuning(**{"rounds": 1, "cloud_every": 0, "rejoin_timeout_s": 0.03} | tuning),
            CLUSTERS,
            self.members,
            self.transport,
            self.worker,
            "cloud",
            lambda tensors: Score(accuracy=float(tensors["classifier.bias"][0]) / 100),
            self.publish,
            attempt=FIRST_ATTEMPT,
            aggregation=aggregation,
            ranks=ranks,
            privacy=privacy,
            examples=examples,
        )

    async def run(self, state: EdgeState | None = None, aggregation: Aggregation = FEDAVG, **tuning: Any) -> EdgeState:
        """Run all rounds; gives the state in the end, which should be the one on disk."""
        rounds = self.rounds(state, aggregation, **tuning)
        async with asyncio.timeout(5):
            await rounds.run()
        return rounds.state

    def publish(self, record: Record) -> None:
        """Keep a record and what is on disk at that time; as an outbox does, skip what is there already."""
        if record not in self.records:
            self.records.append(record)
            self.saved.append(EdgeState.load(self.path) if self.path.exists() else None)

    @property
    def round_records(self) -> list[RoundRecord]:
        return [record for record in self.records if isinstance(record, RoundRecord)]

    @property
    def cluster_events(self) -> list[tuple[str, str, int | None]]:
        events = [record for record in self.records if isinstance(record, EventRecord)]
        return [(e.event, e.node_id, e.round_index) for e in events if e.event.startswith("cluster_")]

    def details(self, event: str) -> list[str]:
        return [r.detail for r in self.records if isinstance(r, EventRecord) and r.event == event]
