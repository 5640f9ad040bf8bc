"""What the cloud makes of what edges drew: a lesson learnt or refused, remembered, and its own drawings in return.

What was taught before of other captions is learnt along. Where edges sent their tunables too, learning may begin on the
way to their mean. Every model that was accepted is kept as a version. It is a function of what is given: a cloud that
was killed comes to the same.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ecogen.config import Relay
from ecogen.models.tunables import Tunables
from ecogen.records import Cause, RelayRecord, Taught
from ecogen.relay import versions
from ecogen.relay.acceptance import LEAST, Taken, held_out, take
from ecogen.relay.agreement import agreed, num_disputed, shared_with
from ecogen.relay.averaging import Measure, begun
from ecogen.relay.buffer import mixed
from ecogen.relay.cloud_state import RelayState, Remembered, remaining
from ecogen.relay.generator import Generator, keyed
from ecogen.relay.samples import Samples, balanced, joined
from ecogen.relay.teacher import Lesson
from ecogen.tuning.passages import Passages
from ecogen.tuning.pretrain_pairs import glyph_captions, glyph_passages
from ecogen.tuning.ranks import LoraRanks

_MIX_KEY, _LEARN_KEY, _TEACH_KEY, _REHEARSE_KEY, _KNOWN_KEY = range(20, 25)
_REMEMBER_KEY = 27
_NUM_KNOWN = 256
_KNOWN = "before the relay"
_STATE = "state.safetensors"

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
        return replace(state, number=state.number + 1, cycle=max(state.cycle, self.cycle))


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


class Learner:
    """The cloud's model as it learns and teaches; on the compute thread.

    Args:
        first: the tunables of the delivered model.
        folder: where state and versions are kept.
        ranks: how LoRA is averaged where its products are.
    """

    def __init__(
        self,
        node_id: str,
        generator: Generator,
        first: Tunables,
        folder: Path,
        spec: Relay,
        known: Known,
        *,
        seed: int,
        ranks: LoraRanks | None = None,
    ) -> None:
        self.generator, self.spec = generator, spec
        self._node_id, self._first, self._folder = node_id, first, folder
        self._known, self._seed, self._ranks = known, seed, ranks
        self._rehearsed: Passages | None = None

    def first_state(self) -> RelayState:
        """What is on disk, or that of the delivered model."""
        if not versions.path_of(self._folder, 0).exists():
            versions.keep(self._folder, versions.Version(0, "delivered"), self._first)
        path = self._folder / _STATE
        return RelayState.load(path) if path.exists() else RelayState(self._first)

    def learn(
        self,
        state: RelayState,
        asked: Exchange,
        offers: Mapping[str, Lesson],
        verdicts: Mapping[str, Tensor],
        given: Mapping[str, Tunables],
    ) -> RelayState:
        """The state after a lesson, written to disk.

        Args:
            state: before it.
            given: tunables of edges.
        """
        offered = samples_of(offers)
        left, earlier = agreed(offered, verdicts), remaining(state.taught, offered)
        lessons = {edge: samples for edge, samples in left.items() if len(samples) >= LEAST}
        taken, state = self.taken(state, asked, lessons, earlier, given), asked.closed(state)
        if not taken.reason:
            latest = state.latest + 1
            version = versions.Version(latest, "after", state.number, asked.round_index)
            versions.keep(self._folder, version, taken.tunables)
            taught = self._remembered(state, asked, lessons, earlier)
            state = replace(state, tunables=taken.tunables, version=latest, latest=latest, taught=taught)
        state = replace(state, lesson=self._drawn(asked, state, [*lessons.values(), *earlier.values()]))
        state = replace(state, record=self._record(asked, state, offers, left, given, taken))
        state.save(self._folder / _STATE)
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
            tunables_share=taken.tunables_share,
        )

    def taken(
        self,
        state: RelayState,
        asked: Exchange,
        lessons: Mapping[str, Samples],
        earlier: Mapping[str, Samples],
        given: Mapping[str, Tunables],
    ) -> Taken:
        """What the model learns from lessons, and from what was taught earlier of other captions.

        It begins where what edges have tuned does best.
        """
        if not lessons:
            return Taken(state.tunables, reason="no edge drew what it, and others who know of it, were sure of")
        generator, before, key = self.generator, state.tunables, asked.key(self._seed)
        parts = {edge: held_out(samples) for edge, samples in lessons.items()}
        parts |= {f"{edge}, earlier": held_out(samples) for edge, samples in earlier.items()}
        number = self.spec.samples * len({*lessons, *earlier})
        new = mixed({edge: own for edge, (_, own) in parts.items()}, number, keyed([*key, _MIX_KEY]))
        measures = self._measures({edge: own for edge, (own, _) in parts.items()})
        start, tunables_share = begun(before, given, lessons, list(measures.values()), self._ranks)
        after = generator.learn(start, generator.passages(new), self._rehearsal(), [*key, _LEARN_KEY])
        taken = take(before, after, self._judge(before, measures, lessons.keys()), self.spec.tolerance)
        return replace(taken, tunables_share=tunables_share)

    def _measures(self, told: Mapping[str, Samples]) -> dict[str, Measure]:
        """How unlikely what is held out of lessons, by edge, and of what was known before all, is to tunables."""
        generator = self.generator
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
            drawn = self.generator.rehearse(self._first, evidence, _REHEARSED, key)
            self._rehearsed = self.generator.passages(drawn)
        return self._rehearsed

    def _remembered(
        self, state: RelayState, asked: Exchange, lessons: Mapping[str, Samples], earlier: Mapping[str, Samples]
    ) -> dict[str, Remembered]:
        """What each edge has taught, by its last accepted lesson of each caption; no more than twice a lesson."""
        generator = keyed([*asked.key(self._seed), _REMEMBER_KEY])
        rest = {edge: balanced(samples, self.spec.samples, generator) for edge, samples in sorted(earlier.items())}
        cycles = {edge: own.cycle for edge, own in state.taught.items()} | dict.fromkeys(lessons, state.number)
        return {
            edge: Remembered(joined([part[edge] for part in (lessons, rest) if edge in part]), cycles[edge])
            for edge in sorted({*lessons, *rest})
        }

    def _drawn(self, asked: Exchange, state: RelayState, told: Sequence[Samples]) -> Lesson:
        """The cloud's own lesson: of all captions that edges have taught."""
        earlier = state.lesson.samples.evidence if state.lesson else {}
        evidence = dict.fromkeys(earlier, 0) | dict(joined(told).evidence if told else {})
        if not evidence:
            return Lesson(nothing(self.generator.images.num_codes), 0)
        return self.generator.teach(state.tunables, evidence, self.spec.samples, [*asked.key(self._seed), _TEACH_KEY])


def samples_of(offers: Mapping[str, Lesson]) -> dict[str, Samples]:
    """What each edge offered."""
    return {edge: one.samples for edge, one in offers.items()}


def nothing(length: int) -> Samples:
    """No samples, of so many codes each."""
    return Samples(torch.empty(0, length, dtype=torch.long), [], {})
