"""The cloud's part of the relay: it learns from what all edges drew, and draws for them what it knows by then.

A lesson is taken once, when all edges that are here have sent theirs and have said what they think of those of others,
or from one edge alone whose domain has drifted; who asks again is given the same answer. What was taught before of
other captions is learnt along. Where edges send their tunables too, learning may begin on the way to their mean. What a
lesson makes worse is refused, and the model stays what it was. Every model that was accepted is kept as a version.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from ecogen.config import Relay
from ecogen.errors import ProtocolError
from ecogen.models.tunables import Tunables
from ecogen.records import Cause, Record, RelayRecord, Taught, Usage
from ecogen.relay import versions
from ecogen.relay.acceptance import LEAST, Taken, held_out, take
from ecogen.relay.agreement import agreed, asked_of, num_disputed, shared_with
from ecogen.relay.averaging import Given, Measure, begun, checked_tunables
from ecogen.relay.buffer import mixed
from ecogen.relay.cloud_state import RelayState, Remembered, remaining
from ecogen.relay.generator import Generator, keyed
from ecogen.relay.messages import CONFIDENCE, RELAY, TUNED, Answer, Offer, Review, Tuned, Verdict
from ecogen.relay.open_cycles import OpenCycles
from ecogen.relay.samples import Samples, balanced, joined
from ecogen.relay.teacher import Lesson
from ecogen.runtime.membership import Members
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message, Peer
from ecogen.tuning.passages import Passages
from ecogen.tuning.pretrain_pairs import glyph_captions, glyph_passages
from ecogen.tuning.ranks import LoraRanks
from ecogen.tuning.sync import note_seen

_MIX_KEY, _LEARN_KEY, _TEACH_KEY, _REHEARSE_KEY, _KNOWN_KEY = range(20, 25)
_REMEMBER_KEY = 27
_NUM_KNOWN = 256
_KNOWN = "before the relay"

_REHEARSED = 1500
"""Pictures that the cloud draws once of what it knew, to rehearse: two of each glyph."""


@dataclass(frozen=True)
class Exchange:
    """What edges ask for.

    Attributes:
        cycle: of the schedule; where one edge's domain has drifted, the round after which it comes.
        edge_id: then, whose.
        round_index: the round after which it comes.
    """

    cause: Cause
    cycle: int
    round_index: int
    edge_id: str = ""

    def key(self, seed: int) -> list[int]:
        """What its random numbers are drawn from."""
        return [seed, self.cycle, *([zlib.crc32(self.edge_id.encode())] if self.edge_id else [])]

    def closed(self, state: RelayState) -> RelayState:
        """The state of a cloud that takes this one no more."""
        if self.cause == "drift":
            return replace(state, number=state.number + 1, alone={**state.alone, self.edge_id: self.round_index})
        return replace(state, number=state.number + 1, cycle=self.cycle)


@dataclass(frozen=True)
class Known:
    """What the cloud's model knew before the first lesson.

    Attributes:
        captions: that it may rehearse.
        held_out: real pairs of the cloud's own, which tell whether it forgets.
    """

    captions: tuple[str, ...]
    held_out: Passages


def known_glyphs(generator: Generator, seed: int) -> Known:
    """What a model knows that was pre-trained here: rendered glyphs with captions."""
    images, writer = generator.images, generator.writer
    drawn = glyph_passages(writer, images.num_channels, images.image_size)
    return Known(tuple(glyph_captions()), drawn(_NUM_KNOWN, keyed([seed, _KNOWN_KEY])))


class CloudRelay:
    """Takes lessons of the edges, cycle by cycle, and gives its own.

    Args:
        first: the tunables of the delivered model.
        folder: where state and versions are kept.
        rounds: of the federation, beyond which nobody has a lesson.
        publish: takes each record.
        ranks: how LoRA is averaged where its products are.
    """

    def __init__(
        self,
        node_id: str,
        generator: Generator,
        first: Tunables,
        folder: Path,
        members: Members,
        worker: Worker,
        spec: Relay,
        known: Known,
        publish: Callable[[Record], None],
        *,
        seed: int,
        rounds: int,
        patience_s: float,
        ranks: LoraRanks | None = None,
    ) -> None:
        self._node_id, self._generator, self._folder, self._ranks = node_id, generator, folder, ranks
        self._worker, self._spec, self._known, self._publish, self._seed = worker, spec, known, publish, seed
        path = folder / "state.safetensors"
        self.state = RelayState.load(path) if path.exists() else RelayState(first)
        if not versions.path_of(folder, 0).exists():
            versions.keep(folder, versions.Version(0, "delivered"), first)
        self._first, self._rounds, self._members = first, rounds, members
        self._open = OpenCycles(members, patience_s)
        self._alone: dict[str, tuple[int, Lesson]] = {}
        self._unbilled: tuple[Usage, ...] = ()
        self._given: dict[str, Given] = {}
        self._closing: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._learning = asyncio.Lock()
        self._rehearsed: Passages | None = None

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
        offer, edge_id, shared = message.read(Offer), peer.node_id, self._nothing
        self._check_asked(edge_id, offer)
        if not self._is_closed(edge_id, offer) and self._has_tunables(edge_id, offer):
            offered = Lesson(self._generator.read(offer.captions, message.tensors), offer.num_drawn)
            if offer.cause == "drift":
                self._alone[edge_id] = offer.cycle, offered
            else:
                shared = shared_with(samples_of(await self._open.offer(offer.cycle, edge_id, offered)), edge_id)
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

    def _is_closed(self, edge_id: str, asked: Offer | Verdict | Tuned) -> bool:
        """Whether what is asked for is over, with what was asked or without it."""
        last = self.state.cycle if asked.cause == "schedule" else self.state.alone.get(edge_id, -1)
        return asked.cycle <= last

    async def set_finished(self, edge_ids: set[str]) -> None:
        """These edges come no more."""
        await self._open.set_finished(edge_ids)

    @property
    def _nothing(self) -> Samples:
        return Samples(torch.empty(0, self._generator.images.num_codes, dtype=torch.long), [], {})

    def _answer(self, *, is_closed: bool) -> Message:
        lesson = self.state.lesson or Lesson(self._nothing, 0)  # before the first, and after a rollback
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
            self._unbilled += (self._worker.usage("tuning"),)
            began_s = time.perf_counter()
            given = self._given_for(asked, offers)
            self.state = await self._worker.compute(self._learn, asked, offers, verdicts, given)
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

    def _learn(
        self,
        asked: Exchange,
        offers: Mapping[str, Lesson],
        verdicts: Mapping[str, Tensor],
        given: Mapping[str, Tunables],
    ) -> RelayState:
        """On the compute thread: the state after a lesson, written to disk."""
        offered = samples_of(offers)
        left, earlier = agreed(offered, verdicts), remaining(self.state.taught, offered)
        lessons = {edge: samples for edge, samples in left.items() if len(samples) >= LEAST}
        taken, state = self._taken(asked, lessons, earlier, given), asked.closed(self.state)
        if not taken.reason:
            latest = state.latest + 1
            version = versions.Version(latest, "after", state.number, asked.round_index)
            versions.keep(self._folder, version, taken.tunables)
            taught = self._remembered(asked, state.number, lessons, earlier)
            state = replace(state, tunables=taken.tunables, version=latest, latest=latest, taught=taught)
        state = replace(state, lesson=self._drawn(asked, state.tunables, [*lessons.values(), *earlier.values()]))
        state = replace(state, record=self._record(asked, state, offers, left, given, taken))
        state.save(self._folder / "state.safetensors")
        return state

    def _record(
        self,
        asked: Exchange,
        state: RelayState,
        offers: Mapping[str, Lesson],
        left: Mapping[str, Samples],
        given: Mapping[str, Tunables],
        taken: Taken,
    ) -> RelayRecord:
        offered = samples_of(offers)
        return RelayRecord(
            self._node_id,
            state.number,
            "up",
            tuple(sorted(edge for edge, samples in left.items() if len(samples))),
            accepted=not taken.reason,
            version=state.version,
            num_drawn=sum(one.num_drawn for one in offers.values()),
            num_samples=sum(map(len, offered.values())),
            sample_bytes=sum(samples.nbytes + shared_with(offered, edge).nbytes for edge, samples in offered.items()),
            scores=taken.scores,
            wall_s=0.0,
            usages=(),
            reason=taken.reason,
            share=taken.share,
            time_s=time.time(),
            cause=asked.cause,
            round_index=asked.round_index,
            num_disputed=num_disputed(offered, left.values()),
            tunable_bytes=sum(tensor.nbytes for tunables in given.values() for tensor in tunables.values()),
            tunables_share=taken.begun_at,
        )

    def _taken(
        self,
        asked: Exchange,
        lessons: Mapping[str, Samples],
        earlier: Mapping[str, Samples],
        given: Mapping[str, Tunables],
    ) -> Taken:
        """What the model learns from lessons, and from what was taught earlier of other captions.

        It begins where what edges have tuned does best.
        """
        if not lessons:
            return Taken(self.state.tunables, reason="no edge drew what it, and others who know of it, were sure of")
        generator, before, key = self._generator, self.state.tunables, asked.key(self._seed)
        parts = {edge: held_out(samples) for edge, samples in lessons.items()}
        parts |= {f"{edge}, earlier": held_out(samples) for edge, samples in earlier.items()}
        number = self._spec.samples * len({*lessons, *earlier})
        new = mixed({edge: own for edge, (_, own) in parts.items()}, number, keyed([*key, _MIX_KEY]))
        measures = self._measures({edge: own for edge, (own, _) in parts.items()})
        start, begun_at = begun(before, given, lessons, list(measures.values()), self._ranks)
        after = generator.learn(start, generator.passages(new), self._rehearsal(), [*key, _LEARN_KEY])
        taken = take(before, after, self._judge(before, measures, lessons.keys()), self._spec.tolerance)
        return replace(taken, begun_at=begun_at)

    def _measures(self, told: Mapping[str, Samples]) -> dict[str, Measure]:
        """How unlikely what is held out of lessons, by edge, and of what was known before all, is to tunables."""
        generator = self._generator
        of_told = {edge: generator.perplexity(generator.passages(own)) for edge, own in sorted(told.items())}
        return of_told | {_KNOWN: generator.perplexity(self._known.held_out)}

    def _judge(
        self, before: Tunables, measures: Mapping[str, Measure], new: Collection[str]
    ) -> Callable[[Tunables], list[Taught]]:
        """What tunables are judged by: these, which were measured before; what was known, by the delivered model."""
        first = {name: of(self._first if name == _KNOWN else before) for name, of in measures.items()}
        return lambda tunables: [
            Taught(name, first[name], of(tunables), is_new=name in new) for name, of in measures.items()
        ]

    def _rehearsal(self) -> Passages:
        """What the delivered model draws of what it knew; drawn once."""
        if self._rehearsed is None:
            evidence, key = dict.fromkeys(self._known.captions, 0), [self._seed, _REHEARSE_KEY]
            lesson = self._generator.teach(self._first, evidence, _REHEARSED, key, is_checked=False)
            self._rehearsed = self._generator.passages(lesson.samples)
        return self._rehearsed

    def _remembered(
        self, asked: Exchange, number: int, lessons: Mapping[str, Samples], earlier: Mapping[str, Samples]
    ) -> dict[str, Remembered]:
        """What each edge has taught, by its last accepted lesson of each caption; no more than twice a lesson."""
        generator = keyed([*asked.key(self._seed), _REMEMBER_KEY])
        rest = {edge: balanced(samples, self._spec.samples, generator) for edge, samples in sorted(earlier.items())}
        cycles = {edge: own.cycle for edge, own in self.state.taught.items()} | dict.fromkeys(lessons, number)
        return {
            edge: Remembered(joined([part[edge] for part in (lessons, rest) if edge in part]), cycles[edge])
            for edge in sorted({*lessons, *rest})
        }

    def _drawn(self, asked: Exchange, tunables: Mapping[str, Tensor], told: Sequence[Samples]) -> Lesson:
        """The cloud's own lesson: of all captions that edges have taught."""
        earlier = self.state.lesson.samples.evidence if self.state.lesson else {}
        evidence = dict.fromkeys(earlier, 0) | dict(joined(told).evidence if told else {})
        if not evidence:
            return Lesson(self._nothing, 0)
        return self._generator.teach(tunables, evidence, self._spec.samples, [*asked.key(self._seed), _TEACH_KEY])


def samples_of(offers: Mapping[str, Lesson]) -> dict[str, Samples]:
    """What each edge offered."""
    return {edge: one.samples for edge, one in offers.items()}


def checked(verdict: Tensor | None, number: int) -> Tensor:
    """A verdict on so many samples.

    Raises:
        ProtocolError: if it is none.
    """
    if verdict is None or verdict.shape != (number,) or not ((verdict >= 0) & (verdict <= 1)).all():
        raise ProtocolError(f"a verdict is to say of {number} samples how likely each is right, from 0 to 1")
    return verdict.float()
