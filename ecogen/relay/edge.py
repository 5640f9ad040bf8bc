"""An edge's part of the relay: it draws what it knows for the cloud, and learns from what the cloud draws for it.

What an edge has learnt is refused if its own held-out pairs say that it does worse; these never leave it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from torch import Tensor

from ecogen.config import Relay
from ecogen.models.tunables import Tunables
from ecogen.records import Cause, RelayRecord, Taught
from ecogen.relay.acceptance import LEAST, Taken, held_out, take
from ecogen.relay.agreement import checked_by_itself, of_others
from ecogen.relay.drift import DriftWatch
from ecogen.relay.generator import Generator
from ecogen.relay.messages import CONFIDENCE, RELAY, TUNED, VERDICT, Answer, Offer, Review, Tuned, Verdict
from ecogen.relay.samples import Samples
from ecogen.relay.teacher import Lesson
from ecogen.relay.versions import Version, keep
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message
from ecogen.tuning.edge_state import EdgeState
from ecogen.tuning.passages import Passages

_TEACH_KEY, _LEARN_KEY, _REHEARSE_KEY = 25, 26, 27

_GENTLE = 0.5
"""Share of the steps, and of the rate, at which an edge learns: it has been tuned to what it is there for."""

_REHEARSED = 600
"""Pictures that an edge that hands on nothing draws of its own captions, to rehearse what it knows."""

CallCloud = Callable[[Message], Awaitable[Message | None]]
"""Asks the cloud; None where it stays away."""


@dataclass(frozen=True)
class Domain:
    """What an edge knows of its own.

    Attributes:
        evidence: its captions, and how many real examples it has of each.
        held_out: pairs that nobody tunes on.
    """

    evidence: Mapping[str, int]
    held_out: Passages


@dataclass(frozen=True)
class Asked:
    """An exchange that an edge asks for.

    Attributes:
        cycle: of the schedule; where its domain has drifted, the round.
    """

    cause: Cause
    cycle: int
    round_index: int

    @classmethod
    def of(cls, state: EdgeState, every: int) -> Asked:
        """What a state says is due."""
        round_index = state.next_round - 1
        if state.drift is not None:
            return cls("drift", round_index, round_index)
        return cls("schedule", (round_index + 1) // every - 1, round_index)

    @property
    def key(self) -> tuple[int, ...]:
        """What tells its random numbers from those of others."""
        return (self.cycle, 1) if self.cause == "drift" else (self.cycle,)


class EdgeRelay:
    """Exchanges lessons with the cloud.

    Args:
        place: of the edge among all, which keys its random numbers.
        num_edges: whose lessons it may be asked to judge.
        domain: what the edge knows of its own in a round.
        folder: where versions are kept, and what drift is told by.
    """

    def __init__(
        self,
        node_id: str,
        place: int,
        generator: Generator,
        worker: Worker,
        spec: Relay,
        domain: Callable[[int], Domain],
        folder: Path,
        *,
        seed: int,
        num_edges: int,
    ) -> None:
        self._node_id, self._key, self._num_edges = node_id, (seed, place), num_edges
        self._generator, self._worker, self._spec, self._domain = generator, worker, spec, domain
        self._folder = folder
        known = folder / "known.safetensors"
        self._watch = DriftWatch(generator, known, lambda index: domain(index).held_out, spec.drift)

    def is_due(self, round_index: int) -> bool:
        """Whether lessons are exchanged after a round, by schedule."""
        return bool(self._spec.every) and (round_index + 1) % self._spec.every == 0

    async def drift(self, round_index: int, tunables: Mapping[str, Tensor]) -> float | None:
        """Whether they are out of turn, as `DriftWatch.look` says."""
        return await self._worker.compute(self._watch.look, round_index, tunables)

    async def exchange(self, state: EdgeState, ask: CallCloud) -> EdgeState:
        """The state after the exchange that it says is due; with the same tunables where the cloud stays away."""
        asked, began_s = Asked.of(state, self._spec.every), time.perf_counter()
        own = await self._worker.compute(self._teach, asked, state.tunables)
        reply = await self._offer(asked, own, state.tunables, ask)
        if reply is None:
            return replace(state, is_untaught=False, drift=None)
        answer = reply.read(Answer)
        lesson = Lesson(self._generator.read(answer.captions, reply.tensors), answer.num_drawn)
        after = await self._worker.compute(self._learn, asked, state, own.samples, lesson, answer.cycle)
        wall_s, usage = time.perf_counter() - began_s, self._worker.usage("relay")
        assert after.lesson is not None
        return replace(after, lesson=msgspec.structs.replace(after.lesson, wall_s=wall_s, usages=(usage,)))

    async def _offer(self, asked: Asked, own: Lesson, tunables: Mapping[str, Tensor], ask: CallCloud) -> Message | None:
        """The cloud's lesson in return for one's own; all is sent again to a cloud that has forgotten it."""
        body, tensors = own.samples.packed()
        told = Offer(asked.cycle, body, own.num_drawn, asked.cause)
        offer = Message.of(RELAY, told, kind="samples", tensors=tensors)
        tuned = Message.of(TUNED, Tuned(asked.cycle, asked.cause), kind="tunables", tensors=tunables)
        while review := await _answer_to([tuned, offer] if self._spec.tunables else [offer], ask):
            shared = self._generator.read(review.read(Review).captions, review.tensors, self._num_edges)
            said = await self._worker.compute(self._generator.confidence, tunables, shared)
            verdict = Verdict(asked.cycle, asked.cause)
            answer = await ask(Message.of(VERDICT, verdict, kind="scores", tensors={CONFIDENCE: said}))
            if answer is None or answer.read(Answer).is_closed:
                return answer
        return None

    def _teach(self, asked: Asked, tunables: Mapping[str, Tensor]) -> Lesson:
        key = [*self._key, *asked.key, _TEACH_KEY]
        return self._generator.teach(tunables, self._domain(asked.round_index).evidence, self._spec.samples, key)

    def _learn(self, asked: Asked, state: EdgeState, own: Samples, lesson: Lesson, cycle: int) -> EdgeState:
        """On the compute thread: the state after a lesson, with the tunables before where it is refused.

        Args:
            own: what the edge handed on.
        """
        evidence = self._domain(asked.round_index).evidence
        news = of_others(lesson.samples, evidence)
        taken = checked_by_itself(news, evidence, self._generator.confidence(state.tunables, news))
        outcome = self._taken(asked, state.tunables, own, taken)
        learnt = replace(state, is_untaught=False, drift=None)
        if not outcome.reason:
            number = state.latest + 2
            for version, tunables in (
                (Version(number - 1, "before", cycle, asked.round_index), state.tunables),
                (Version(number, "after", cycle, asked.round_index), outcome.tunables),
            ):
                keep(self._folder, version, tunables)
            learnt = replace(learnt, tunables=outcome.tunables, version=number, latest=number)
        self._watch.remember(asked.round_index, learnt.tunables)
        return replace(
            learnt,
            lesson=self._record(asked, state, learnt.version, lesson, len(news) - len(taken), cycle, outcome),
        )

    def _record(
        self,
        asked: Asked,
        state: EdgeState,
        version: int,
        lesson: Lesson,
        num_disputed: int,
        cycle: int,
        outcome: Taken,
    ) -> RelayRecord:
        return RelayRecord(
            self._node_id,
            cycle,
            "down",
            ("cloud",),
            accepted=not outcome.reason,
            version=version,
            num_drawn=lesson.num_drawn,
            num_samples=len(lesson.samples),
            sample_bytes=lesson.samples.nbytes,
            scores=outcome.scores,
            wall_s=0.0,
            usages=(),
            reason=outcome.reason,
            share=outcome.share,
            time_s=time.time(),
            cause=asked.cause,
            round_index=asked.round_index,
            p_value=state.drift,
            num_disputed=num_disputed,
        )

    def _taken(self, asked: Asked, before: Mapping[str, Tensor], own: Samples, lesson: Samples) -> Taken:
        if len(lesson) < LEAST:
            return Taken(
                dict(before), reason="the cloud drew nothing of what others know that this edge, too, was sure of"
            )
        generator, key = self._generator, [*self._key, *asked.key, _LEARN_KEY]
        told, learnt = held_out(lesson)
        rehearsal = generator.passages(own if len(own) else self._drawn(asked, before))
        after = generator.learn(before, generator.passages(learnt), rehearsal, key, share=_GENTLE)
        return take(before, after, self._judge(asked, before, told), self._spec.tolerance)

    def _drawn(self, asked: Asked, tunables: Mapping[str, Tensor]) -> Samples:
        """What an edge rehearses that was sure of nothing it drew."""
        key = [*self._key, *asked.key, _REHEARSE_KEY]
        evidence = self._domain(asked.round_index).evidence
        return self._generator.rehearse(tunables, evidence, _REHEARSED, key)

    def _judge(self, asked: Asked, before: Mapping[str, Tensor], told: Samples) -> Callable[[Tunables], list[Taught]]:
        """What tunables are judged by: what is held out of the lesson, and what the edge holds out of its own."""
        of_new = self._generator.perplexity(self._generator.passages(told))
        of_own = self._generator.perplexity(self._domain(asked.round_index).held_out)
        first = of_new(before), of_own(before)
        return lambda tunables: [
            Taught("cloud", first[0], of_new(tunables), is_new=True),
            Taught(self._node_id, first[1], of_own(tunables), is_new=False),
        ]


async def _answer_to(messages: Sequence[Message], ask: CallCloud) -> Message | None:
    """To the last of some, which are sent one by one; None where the cloud stays away."""
    for message in messages:
        answer = await ask(message)
        if answer is None:
            return None
    return answer
