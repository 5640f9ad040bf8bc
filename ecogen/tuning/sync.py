"""The cloud's part of tuning: averages what the edges learned, once all of them that are here have sent it.

An edge asks again after a restart of either side, and gets the same answer: an update is counted once, by
round and edge.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ecogen.models.checkpoint import load_metadata, load_tensors, save_tensors
from ecogen.models.tunables import Tunables
from ecogen.records import EventRecord, Record, RoundRecord, Score
from ecogen.runtime.membership import Members
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message, Peer
from ecogen.tuning.aggregate import Update
from ecogen.tuning.gathering import Gathering
from ecogen.tuning.messages import SYNC, SyncOrder, SyncResult
from ecogen.tuning.ranks import LoraRanks, average

Evaluate = Callable[[Tunables], Score]


@dataclass
class CloudState:
    """What the cloud knows after its last average.

    Attributes:
        round_index: of that average; -1 is the start.
        counted: the last round in which each edge was counted.
    """

    tunables: Tunables
    round_index: int = -1
    counted: dict[str, int] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it atomically."""
        metadata = {"round_index": self.round_index, "counted": self.counted}
        save_tensors(path, self.tunables, {"state": json.dumps(metadata)})

    @classmethod
    def load(cls, path: Path) -> CloudState:
        """The state that `save` wrote."""
        return cls(load_tensors(path), **json.loads(load_metadata(path)["state"]))


class CloudSync:
    """Averages over edges, round by round.

    Args:
        evaluate: how well tunables do, run on the compute thread.
        publish: takes each record.
        patience_s: how long a lost edge is waited for.
        ranks: how LoRA is averaged where its products are: edges have turned their factors, each in its own way.
    """

    def __init__(
        self,
        node_id: str,
        state: CloudState,
        path: Path,
        members: Members,
        worker: Worker,
        evaluate: Evaluate,
        publish: Callable[[Record], None],
        *,
        patience_s: float,
        ranks: LoraRanks | None = None,
    ) -> None:
        self.state = state
        self._node_id, self._ranks = node_id, ranks
        self._path, self._members, self._worker = path, members, worker
        self._evaluate, self._publish = evaluate, publish
        self._gathering: Gathering[Update] = Gathering(members, patience_s)
        self._closing: dict[int, asyncio.Task[None]] = {}
        self._averaging = asyncio.Lock()

    async def sync(self, peer: Peer, message: Message) -> Message:
        """Answer an edge with the average of its round, once that is closed."""
        order = message.read(SyncOrder)
        if order.round_index > self.state.round_index:
            update = Update(peer.node_id, message.tensors, order.num_examples)
            await self._gathering.put(order.round_index, peer.node_id, update)
            await self._closed(order.round_index)
        counted = self.state.counted.get(peer.node_id) == order.round_index
        if not counted:
            self._fence(peer.node_id, order.round_index)
        result = SyncResult(self.state.round_index, counted)
        return Message.of(SYNC, result, kind="tunables", tensors=self.state.tunables)

    async def _closed(self, round_index: int) -> None:
        """Return once a round is closed, by a task that whoever comes first begins."""
        if round_index <= self.state.round_index:  # it was, while an update for it was put down
            return
        if round_index not in self._closing:
            task = self._closing[round_index] = asyncio.create_task(self._close_round(round_index))
            task.add_done_callback(note_seen)  # those who wait for it are told; where all have gone, nobody is
            task.add_done_callback(lambda _: self._closing.pop(round_index))  # who asks after a failure begins anew
        await asyncio.shield(self._closing[round_index])

    async def _close_round(self, round_index: int) -> None:
        began_s = time.perf_counter()
        updates = list((await self._gathering.take(round_index)).values())
        async with self._averaging:  # another round may close meanwhile, of an edge that went on alone
            tunables, _, error = await self._worker.compute(average, self.state.tunables, updates, self._ranks)
            score = await self._worker.compute(self._evaluate, tunables)
            members = sorted(update.sender_id for update in updates)
            state = CloudState(tunables, round_index, self.state.counted | dict.fromkeys(members, round_index))
            await self._worker.compute(state.save, self._path)
            self.state = state  # what is not on disk is no answer
            self._publish(self._record(updates, members, score, error, time.perf_counter() - began_s))

    async def set_finished(self, edge_ids: set[str]) -> None:
        """These edges have done their last round; nobody waits for them any more."""
        await self._gathering.set_finished(edge_ids)

    def _record(
        self,
        updates: list[Update],
        members: list[str],
        score: Score,
        lora_error: float | None,
        wall_s: float,
    ) -> RoundRecord:
        missing = tuple(sorted(set(self._members.expected) - set(members)))
        return RoundRecord(
            self._node_id,
            self.state.round_index,
            score.accuracy,
            None,
            sum(update.num_examples for update in updates),
            tuple(members),
            missing,
            wall_s,
            (self._worker.usage("tuning"),),
            time.time(),
            lora_error,
            perplexity=score.perplexity,
        )

    def _fence(self, node_id: str, round_index: int) -> None:
        detail = f"its update came after the cloud had closed round {round_index + 1} without it"
        self._publish(EventRecord("fenced", node_id, round_index, detail, time.time()))


def note_seen(task: asyncio.Task[Any]) -> None:
    """Take note of how a task ended, so that asyncio does not print it."""
    if not task.cancelled():
        task.exception()
