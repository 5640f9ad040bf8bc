"""The cloud's part of the relay: it learns from what all edges drew, and draws for them what it knows by then.

A lesson is taken once, when all edges that are here have sent theirs and have said what they think of those of others;
who asks again is given the same answer. What a lesson makes worse is refused, and the model stays what it was. Every
model that was accepted is kept as a version.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from ecogen.config import Relay
from ecogen.errors import ProtocolError
from ecogen.models.checkpoint import load_metadata, load_tensors, save_tensors
from ecogen.models.tunables import Tunables
from ecogen.records import Record, RelayRecord, Taught
from ecogen.relay.agreement import agreed, asked_of, num_disputed, shared_with
from ecogen.relay.buffer import mixed
from ecogen.relay.generator import Generator, keyed
from ecogen.relay.messages import CONFIDENCE, RELAY, Answer, Offer, Review, Verdict
from ecogen.relay.samples import Captions, Samples, joined
from ecogen.relay.teacher import Lesson
from ecogen.runtime.membership import Members
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message, Peer
from ecogen.tuning.gathering import Gathering
from ecogen.tuning.passages import Passages
from ecogen.tuning.pretrain_pairs import glyph_captions, glyph_passages
from ecogen.tuning.sync import note_seen

_MIX_KEY, _LEARN_KEY, _TEACH_KEY, _REHEARSE_KEY, _KNOWN_KEY = range(20, 25)
_NUM_KNOWN = 256

_REHEARSED = 1500
"""Pictures that the cloud draws once of what it knew, to rehearse: two of each glyph."""

HELD_OUT = 0.2
"""Share of a lesson that nobody learns from, so that it tells what was learnt."""


@dataclass(frozen=True)
class RelayState:
    """What the cloud knows after its last lesson.

    Attributes:
        cycle: of that lesson; -1 before the first.
        version: of the tunables; 0 is the model that was delivered.
        lesson: what it drew for the edges then.
    """

    tunables: Tunables
    cycle: int = -1
    version: int = 0
    lesson: Lesson | None = None

    def save(self, path: Path) -> None:
        """Write it atomically."""
        facts = {"cycle": self.cycle, "version": self.version}
        tensors = dict(self.tunables)
        if self.lesson is not None:
            body, own = self.lesson.samples.packed()
            tensors |= {f"{_LESSON}{name}": tensor for name, tensor in own.items()}
            facts |= {"num_drawn": self.lesson.num_drawn, "captions": msgspec.to_builtins(body)}
        save_tensors(path, tensors, {"state": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path, generator: Generator) -> RelayState:
        """The state that `save` wrote."""
        facts, tensors = json.loads(load_metadata(path)["state"]), load_tensors(path)
        own = {name.removeprefix(_LESSON): tensors.pop(name) for name in [*tensors] if name.startswith(_LESSON)}
        lesson = None
        if own:
            samples = generator.read(msgspec.convert(facts["captions"], Captions), own)
            lesson = Lesson(samples, facts["num_drawn"])
        return cls(tensors, facts["cycle"], facts["version"], lesson)


_LESSON = "lesson: "


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
        publish: takes each record.
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
        patience_s: float,
    ) -> None:
        self._node_id, self._generator, self._folder = node_id, generator, folder
        self._worker, self._spec, self._known, self._publish, self._seed = worker, spec, known, publish, seed
        path = folder / "state.safetensors"
        self.state = RelayState.load(path, generator) if path.exists() else RelayState(first)
        self._first = first
        self._offers: Gathering[tuple[Samples, int]] = Gathering(members, patience_s)
        self._verdicts: Gathering[Tensor] = Gathering(members, patience_s)
        self._offered: dict[int, asyncio.Task[Mapping[str, tuple[Samples, int]]]] = {}
        self._closing: dict[int, asyncio.Task[None]] = {}
        self._rehearsed: Passages | None = None

    async def exchange(self, peer: Peer, message: Message) -> Message:
        """Take an edge's lesson, and answer with what those of others are about that it can judge.

        Raises:
            ProtocolError: if it holds no samples.
        """
        offer = message.read(Offer)
        shared = self._nothing
        if offer.cycle > self.state.cycle:
            samples = self._generator.read(offer.captions, message.tensors)
            if not is_done(self._offered.get(offer.cycle)):
                await self._offers.put(offer.cycle, peer.node_id, (samples, offer.num_drawn))
            shared = shared_with(samples_of(await asyncio.shield(self._gathered(offer.cycle))), peer.node_id)
        body, tensors = shared.packed()
        return Message.of(RELAY, Review(offer.cycle, body), kind="samples", tensors=tensors)

    async def judged(self, peer: Peer, message: Message) -> Message:
        """Take what an edge says of others' lessons, and answer with the cloud's once it has learnt from those of all.

        Raises:
            ProtocolError: if it says anything but how likely it holds each of them to be right.
        """
        cycle = message.read(Verdict).cycle
        if cycle > self.state.cycle and cycle in self._offered:
            offers = await asyncio.shield(self._gathered(cycle))
            verdict = checked(message.tensors.get(CONFIDENCE), len(asked_of(samples_of(offers), peer.node_id)))
            await self._verdicts.put(cycle, peer.node_id, verdict)
            await asyncio.shield(self._close(cycle))
        return self._answer()

    async def set_finished(self, edge_ids: set[str]) -> None:
        """These edges come no more."""
        await self._offers.set_finished(edge_ids)
        await self._verdicts.set_finished(edge_ids)

    @property
    def _nothing(self) -> Samples:
        return Samples(torch.empty(0, self._generator.images.num_codes, dtype=torch.long), [], {})

    def _answer(self) -> Message:
        lesson = self.state.lesson or Lesson(self._nothing, 0)
        body, tensors = lesson.samples.packed()
        answer = Answer(self.state.cycle, body, lesson.num_drawn, self.state.version)
        return Message.of(RELAY, answer, kind="samples", tensors=tensors)

    def _gathered(self, cycle: int) -> asyncio.Task[Mapping[str, tuple[Samples, int]]]:
        """The task that waits for all offers of a cycle, begun by whoever comes first."""
        if cycle not in self._offered:
            task = self._offered[cycle] = asyncio.create_task(self._offers.take(cycle))
            task.add_done_callback(note_seen)
        return self._offered[cycle]

    def _close(self, cycle: int) -> asyncio.Task[None]:
        """The task that closes a cycle, begun by whoever comes first."""
        if cycle not in self._closing:
            task = self._closing[cycle] = asyncio.create_task(self._close_cycle(cycle))
            task.add_done_callback(note_seen)
        return self._closing[cycle]

    async def _close_cycle(self, cycle: int) -> None:
        verdicts, offers = await self._verdicts.take(cycle), await self._gathered(cycle)
        waiting, began_s = self._worker.usage("tuning"), time.perf_counter()
        state, record = await self._worker.compute(self._learn, cycle, offers, verdicts)
        self.state = state
        del self._offered[cycle], self._closing[cycle]
        wall_s, usage = time.perf_counter() - began_s, self._worker.usage("relay")
        self._publish(msgspec.structs.replace(record, wall_s=wall_s, usages=(waiting, usage), time_s=time.time()))

    def _learn(
        self, cycle: int, offers: Mapping[str, tuple[Samples, int]], verdicts: Mapping[str, Tensor]
    ) -> tuple[RelayState, RelayRecord]:
        """On the compute thread: the state after a lesson, written to disk, and its record."""
        offered = samples_of(offers)
        left = agreed(offered, verdicts)
        lessons = {edge: samples for edge, samples in left.items() if len(samples)}
        scores, tunables, reason = self._taken(cycle, lessons)
        version = self.state.version + (not reason)
        if not reason:
            save_tensors(self._folder / f"version-{version}.safetensors", tunables, {"cycle": str(cycle)})
        state = replace(self.state, tunables=self.state.tunables if reason else tunables, cycle=cycle, version=version)
        state = replace(state, lesson=self._drawn(cycle, state.tunables, lessons))
        state.save(self._folder / "state.safetensors")
        record = RelayRecord(
            self._node_id,
            cycle,
            "up",
            tuple(sorted(lessons)),
            accepted=not reason,
            version=version,
            num_drawn=sum(number for _, number in offers.values()),
            num_samples=sum(map(len, offered.values())),
            sample_bytes=sum(samples.nbytes + shared_with(offered, edge).nbytes for edge, samples in offered.items()),
            scores=scores,
            wall_s=0.0,
            usages=(),
            reason=reason,
            num_disputed=num_disputed(offered, left.values()),
        )
        return state, record

    def _taken(self, cycle: int, lessons: Mapping[str, Samples]) -> tuple[tuple[Taught, ...], Tunables, str]:
        """How well the model does after learning from lessons, its tunables then, and why they are refused, if so."""
        if not lessons:
            return (), self.state.tunables, "no edge drew what it, and others who know of it, were sure of"
        generator, before, key = self._generator, self.state.tunables, [self._seed, cycle]
        parts = {edge: held_out(samples) for edge, samples in lessons.items()}
        number = self._spec.samples * len(parts)
        new = mixed({edge: own for edge, (_, own) in parts.items()}, number, keyed([*key, _MIX_KEY]))
        after = generator.learn(before, generator.passages(new), self._rehearsal(), [*key, _LEARN_KEY])
        measures = {edge: generator.perplexity(generator.passages(own)) for edge, (own, _) in parts.items()}
        scores = [Taught(edge, of(before), of(after), is_new=True) for edge, of in sorted(measures.items())]
        of_known = generator.perplexity(self._known.held_out)
        scores.append(Taught("before the relay", of_known(self._first), of_known(after), is_new=False))
        return tuple(scores), after, refusal(scores, self._spec.tolerance)

    def _rehearsal(self) -> Passages:
        """What the delivered model draws of what it knew; drawn once."""
        if self._rehearsed is None:
            evidence, key = dict.fromkeys(self._known.captions, 0), [self._seed, _REHEARSE_KEY]
            lesson = self._generator.teach(self._first, evidence, _REHEARSED, key, is_checked=False)
            self._rehearsed = self._generator.passages(lesson.samples)
        return self._rehearsed

    def _drawn(self, cycle: int, tunables: Mapping[str, Tensor], lessons: Mapping[str, Samples]) -> Lesson:
        """The cloud's own lesson: of all captions that edges have taught."""
        earlier = [self.state.lesson.samples] if self.state.lesson else []
        evidence = dict.fromkeys((caption for part in earlier for caption in part.evidence), 0)
        evidence |= joined(list(lessons.values())).evidence if lessons else {}
        if not evidence:
            return Lesson(self._nothing, 0)
        return self._generator.teach(tunables, evidence, self._spec.samples, [self._seed, cycle, _TEACH_KEY])


def is_done(task: asyncio.Task[Any] | None) -> bool:
    """Whether a task has been begun and has ended."""
    return task is not None and task.done()


def samples_of(offers: Mapping[str, tuple[Samples, int]]) -> dict[str, Samples]:
    """What each edge offered."""
    return {edge: samples for edge, (samples, _) in offers.items()}


def checked(verdict: Tensor | None, number: int) -> Tensor:
    """A verdict on so many samples.

    Raises:
        ProtocolError: if it is none.
    """
    if verdict is None or verdict.shape != (number,) or not ((verdict >= 0) & (verdict <= 1)).all():
        raise ProtocolError(f"a verdict is to say of {number} samples how likely each is right, from 0 to 1")
    return verdict.float()


def held_out(samples: Samples) -> tuple[Samples, Samples]:
    """What tells how much was learnt of a lesson, and the rest of it, which is learnt from."""
    every = max(2, round(1 / HELD_OUT))
    kept = [place for place in range(len(samples)) if place % every == 0]
    return samples[kept], samples[[place for place in range(len(samples)) if place % every]]


def refusal(scores: list[Taught], tolerance: float) -> str:
    """Why a lesson is refused; empty where it is accepted.

    It is where the mean log-perplexity of what it was about has not fallen, or that of something that was known before
    has risen by more than the tolerance.
    """
    gains = [math.log(score.before) - math.log(score.after) for score in scores if score.is_new]
    if not sum(gains) > 0:  # nor where it is no number
        return "nothing was learnt from it"
    for score in scores:
        if not score.is_new and not score.after <= score.before * (1 + tolerance):
            return f"perplexity on {score.name} rose from {score.before:.2f} to {score.after:.2f}"
    return ""
