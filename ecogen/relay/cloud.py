"""The cloud's part of the relay: it learns from what all edges drew, and draws for them what it knows by then.

A lesson is taken once, when all edges that are here have sent theirs and have said what they think of those of others,
or from one edge alone whose domain has drifted; who asks again is given the same answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Mapping

import msgspec
from torch import Tensor

from ecogen.errors import ProtocolError
from ecogen.models.tunables import Tunables
from ecogen.records import Record, Usage
from ecogen.relay.agreement import asked_of, shared_with
from ecogen.relay.averaging import Given, checked_tunables
from ecogen.relay.cloud_learner import Exchange, Learner, nothing, samples_of
from ecogen.relay.messages import CONFIDENCE, RELAY, TUNED, Answer, Offer, Review, Tuned, Verdict
from ecogen.relay.open_cycles import OpenCycles
from ecogen.relay.teacher import Lesson
from ecogen.runtime.membership import Members
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message, Peer
from ecogen.tuning.sync import note_seen


class CloudRelay:
    """Takes lessons of the edges, cycle by cycle, and gives its own.

    Args:
        learner: the model that learns and teaches.
        rounds: of the federation, beyond which nobody has a lesson.
        publish: takes each record.
    """

    def __init__(
        self,
        learner: Learner,
        members: Members,
        worker: Worker,
        publish: Callable[[Record], None],
        *,
        rounds: int,
        patience_s: float,
    ) -> None:
        self.learner, self.state = learner, learner.first_state()
        self._generator, self._spec = learner.generator, learner.spec
        self._worker, self._publish = worker, publish
        self._rounds, self._members = rounds, members
        self._open = OpenCycles(members, patience_s)
        self._alone: dict[str, tuple[int, Lesson]] = {}
        self._unbilled: tuple[Usage, ...] = ()
        self._given: dict[str, Given] = {}
        self._closing: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._learning = asyncio.Lock()

    def publish_again(self) -> None:
        """Publish the record of the last lesson, in case this node died before it had."""
        if self.state.record is not None:
            self._publish(self.state.record)

    async def take_tunables(self, peer: Peer, message: Message) -> Message:
        """Keep an edge's tunables until its exchange is closed, or it sends others.

        Raises:
            ProtocolError: if they are none that can be averaged with the cloud's, or nothing here asks for them.
        """
        told, edge_id = message.read(Tuned), peer.node_id
        self._check_asked(edge_id, told)
        if not self._spec.tunables:
            raise ProtocolError(f"{edge_id} sent its tunables, and relay.tunables is off; set relay.tunables = true")
        tunables = await self._worker.compute(checked_tunables, edge_id, message.tensors, self.state.tunables)
        if not self._is_closed(edge_id, told):
            self._given[edge_id] = Given(told, tunables)
        return Message.of(TUNED)

    async def exchange(self, peer: Peer, message: Message) -> Message:
        """Take an edge's lesson, and answer with what those of others are about that it can judge.

        It is not taken where its tunables are missing, since the cloud was lost between both: then the edge is told so
        when it has judged nothing, and sends both again.

        Raises:
            ProtocolError: if it holds no samples, or comes as nothing here asks for.
        """
        offer, edge_id, shared = message.read(Offer), peer.node_id, nothing(self._generator.images.num_codes)
        self._check_asked(edge_id, offer)
        if not self._is_closed(edge_id, offer) and self._has_tunables(edge_id, offer):
            offered = Lesson(self._generator.read(offer.captions, message.tensors), offer.num_drawn)
            if offer.cause == "drift":
                self._alone[edge_id] = offer.cycle, offered
            else:
                offers = await self._open.offer(offer.cycle, edge_id, offered)
                shared = shared_with(samples_of(offers), edge_id) if offers else shared
        body, tensors = shared.packed()
        return Message.of(RELAY, Review(offer.cycle, body), kind="samples", tensors=tensors)

    async def judged(self, peer: Peer, message: Message) -> Message:
        """Take what an edge says of others' lessons, and answer with the cloud's once it has learnt from it, or by
        schedule from those of all.

        Raises:
            ProtocolError: if it says anything but how likely it holds each of them to be right.
        """
        verdict, edge_id = message.read(Verdict), peer.node_id
        self._check_asked(edge_id, verdict)
        cycle, said = verdict.cycle, message.tensors.get(CONFIDENCE)
        if self._is_closed(edge_id, verdict):
            return self._answer(is_closed=True)
        if verdict.cause == "schedule" and (offers := self._open.offers(cycle)) is not None:
            await self._open.judge(cycle, edge_id, checked(said, len(asked_of(samples_of(offers), edge_id))))
            asked = Exchange("schedule", cycle, (cycle + 1) * self._spec.every - 1)
            if not self._is_closed(edge_id, verdict):  # as it may be since
                await asyncio.shield(self._close(asked, lambda: self._close_cycle(asked, offers)))
        elif verdict.cause == "drift" and edge_id in self._alone and self._alone[edge_id][0] == cycle:
            alone = {edge_id: self._alone[edge_id][1]}
            asked = Exchange("drift", cycle, cycle, edge_id)
            await asyncio.shield(self._close(asked, lambda: self._take(asked, alone, {})))
        return self._answer(is_closed=self._is_closed(edge_id, verdict))

    def _check_asked(self, edge_id: str, asked: Offer | Verdict | Tuned) -> None:
        """Refuse who is not expected, and exchanges that there are none of."""
        every = self._spec.every if asked.cause == "schedule" else bool(self._spec.drift)
        if not every:
            raise ProtocolError(f"{edge_id} sent a lesson by {asked.cause}, and relay.{asked.cause} is off")
        if edge_id not in self._members.expected:
            raise ProtocolError(f"{edge_id!r} is no edge here; expected: {', '.join(self._members.expected)}")
        if asked.cycle >= self._rounds // every:
            raise ProtocolError(f"{edge_id} asked for exchange {asked.cycle}; there are {self._rounds // every}")

    def _has_tunables(self, edge_id: str, offer: Offer) -> bool:
        """Whether all is here that was to come before an offer."""
        given = self._given.get(edge_id)
        return not self._spec.tunables or (given is not None and given.is_for(offer.cause, offer.cycle))

    def _given_for(self, asked: Exchange, edge_ids: Collection[str]) -> dict[str, Tunables]:
        """The tunables that these edges sent for an exchange."""
        return {
            edge_id: given.tunables
            for edge_id, given in self._given.items()
            if edge_id in edge_ids and given.is_for(asked.cause, asked.cycle)
        }

    def _is_closed(self, edge_id: str, asked: Offer | Verdict | Tuned | Exchange) -> bool:
        """Whether what is asked for is over, with what was asked or without it."""
        last = self.state.cycle if asked.cause == "schedule" else self.state.alone.get(edge_id, -1)
        return asked.cycle <= last

    async def set_finished(self, edge_ids: set[str]) -> None:
        """These edges come no more."""
        await self._open.set_finished(edge_ids)

    def _answer(self, *, is_closed: bool) -> Message:
        untaught = Lesson(nothing(self._generator.images.num_codes), 0)  # before the first lesson, and after a rollback
        lesson = self.state.lesson or untaught
        body, tensors = lesson.samples.packed()
        answer = Answer(max(0, self.state.number), body, lesson.num_drawn, self.state.version, is_closed)
        return Message.of(RELAY, answer, kind="samples", tensors=tensors)

    def _close(self, asked: Exchange, work: Callable[[], Coroutine[None, None, None]]) -> asyncio.Task[None]:
        """The task that closes an exchange, begun by whoever comes first."""
        place = (asked.edge_id, asked.cycle)
        if place not in self._closing:
            task = self._closing[place] = asyncio.create_task(work())
            task.add_done_callback(note_seen)
            task.add_done_callback(lambda _: self._closing.pop(place))  # who asks after a failure begins anew
        return self._closing[place]

    async def _close_cycle(self, asked: Exchange, offers: Mapping[str, Lesson]) -> None:
        await self._take(asked, offers, await self._open.verdicts(asked.cycle))

    async def _take(self, asked: Exchange, offers: Mapping[str, Lesson], verdicts: Mapping[str, Tensor]) -> None:
        async with self._learning:
            if self._is_closed(asked.edge_id, asked):  # a later one was learnt while this one waited
                return
            self._unbilled += (self._worker.usage("tuning"),)
            began_s = time.perf_counter()
            given = self._given_for(asked, offers)
            self.state = await self._worker.compute(self.learner.learn, self.state, asked, offers, verdicts, given)
            self._forget(asked)
            usages = (*self._unbilled, self._worker.usage("relay"))
            assert self.state.record is not None
            wall_s = time.perf_counter() - began_s
            self._publish(msgspec.structs.replace(self.state.record, wall_s=wall_s, usages=usages))
            self._unbilled = ()

    def _forget(self, asked: Exchange) -> None:
        """What was sent for an exchange that is closed."""
        if asked.cause == "drift":
            self._alone.pop(asked.edge_id, None)
        else:
            self._open.close(asked.cycle)
        self._given = {edge: own for edge, own in self._given.items() if not self._is_closed(edge, own.told)}


def checked(verdict: Tensor | None, number: int) -> Tensor:
    """A verdict on so many samples.

    Raises:
        ProtocolError: if it is none.
    """
    if verdict is None or verdict.shape != (number,) or not ((verdict >= 0) & (verdict <= 1)).all():
        raise ProtocolError(f"a verdict is to say of {number} samples how likely each is right, from 0 to 1")
    return verdict.float()
