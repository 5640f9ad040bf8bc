"""An edge's part of the relay: it draws what it knows for the cloud, and learns from what the cloud draws for it.

What an edge has learnt is refused if its own held-out pairs say that it does worse; these never leave it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import msgspec
from torch import Tensor

from ecogen.config import Relay
from ecogen.models.tunables import Tunables
from ecogen.records import Record, RelayRecord, Taught
from ecogen.relay.agreement import checked_by_itself
from ecogen.relay.cloud import held_out, refusal
from ecogen.relay.generator import Generator
from ecogen.relay.messages import CONFIDENCE, RELAY, VERDICT, Answer, Offer, Review, Verdict
from ecogen.relay.samples import Samples
from ecogen.relay.teacher import Lesson
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message
from ecogen.tuning.passages import Passages

_TEACH_KEY, _LEARN_KEY, _REHEARSE_KEY = 25, 26, 27

_GENTLE = 0.5
"""Share of the steps, and of the rate, at which an edge learns: it has been tuned to what it is there for."""

_REHEARSED = 600
"""Pictures that an edge draws of its own captions, to rehearse what it knows: as various as it knows them."""

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


class EdgeRelay:
    """Exchanges lessons with the cloud.

    Args:
        place: of the edge among all, which keys its random numbers.
        num_edges: whose lessons it may be asked to judge.
        publish: takes each record.
    """

    def __init__(
        self,
        node_id: str,
        place: int,
        generator: Generator,
        worker: Worker,
        spec: Relay,
        domain: Domain,
        publish: Callable[[Record], None],
        *,
        seed: int,
        num_edges: int,
    ) -> None:
        self._node_id, self._key, self._num_edges = node_id, (seed, place), num_edges
        self._generator, self._worker, self._spec, self._domain = generator, worker, spec, domain
        self._publish = publish

    def is_due(self, round_index: int) -> bool:
        """Whether lessons are exchanged after a round."""
        return (round_index + 1) % self._spec.every == 0

    async def exchange(self, round_index: int, tunables: Mapping[str, Tensor], ask: CallCloud) -> Tunables:
        """The tunables after the exchange that follows a round; the same where the cloud stays away."""
        cycle, began_s = (round_index + 1) // self._spec.every - 1, time.perf_counter()
        own = await self._worker.compute(self._teach, cycle, tunables)
        reply = await self._offer(cycle, own, tunables, ask)
        if reply is None:
            return dict(tunables)
        answer = reply.read(Answer)
        lesson = Lesson(self._generator.read(answer.captions, reply.tensors), answer.num_drawn)
        after, record = await self._worker.compute(self._learn, cycle, tunables, lesson, answer.version)
        wall_s, usage = time.perf_counter() - began_s, self._worker.usage("relay")
        self._publish(msgspec.structs.replace(record, wall_s=wall_s, usages=(usage,), time_s=time.time()))
        return after

    async def _offer(self, cycle: int, own: Lesson, tunables: Mapping[str, Tensor], ask: CallCloud) -> Message | None:
        """The cloud's lesson in return for one's own; offered again to a cloud that has forgotten it."""
        body, tensors = own.samples.packed()
        offer = Message.of(RELAY, Offer(cycle, body, own.num_drawn), kind="samples", tensors=tensors)
        while review := await ask(offer):
            shared = self._generator.read(review.read(Review).captions, review.tensors, self._num_edges)
            said = await self._worker.compute(self._generator.confidence, tunables, shared)
            verdict = Message.of(VERDICT, Verdict(cycle), kind="scores", tensors={CONFIDENCE: said})
            answer = await ask(verdict)
            if answer is None or answer.read(Answer).cycle >= cycle:
                return answer
        return None

    def _teach(self, cycle: int, tunables: Mapping[str, Tensor]) -> Lesson:
        key = [*self._key, cycle, _TEACH_KEY]
        return self._generator.teach(tunables, self._domain.evidence, self._spec.samples, key)

    def _learn(
        self, cycle: int, before: Mapping[str, Tensor], lesson: Lesson, version: int
    ) -> tuple[Tunables, RelayRecord]:
        """On the compute thread: the tunables after a lesson, or those before where it is refused."""
        said = self._generator.confidence(before, lesson.samples)
        taken = checked_by_itself(lesson.samples, self._domain.evidence, said)
        scores, after, reason = self._taken(cycle, before, taken)
        record = RelayRecord(
            self._node_id,
            cycle,
            "down",
            ("cloud",),
            accepted=not reason,
            version=version,
            num_drawn=lesson.num_drawn,
            num_samples=len(lesson.samples),
            sample_bytes=lesson.samples.nbytes,
            scores=scores,
            wall_s=0.0,
            usages=(),
            reason=reason,
            num_disputed=len(lesson.samples) - len(taken),
        )
        return (dict(before) if reason else after), record

    def _taken(
        self, cycle: int, before: Mapping[str, Tensor], lesson: Samples
    ) -> tuple[tuple[Taught, ...], Tunables, str]:
        if not len(lesson):
            return (), dict(before), "the cloud drew nothing that it, and this edge, were sure of"
        generator = self._generator
        told, learnt = held_out(lesson)
        key = [*self._key, cycle]
        known = generator.teach(before, self._domain.evidence, _REHEARSED, [*key, _REHEARSE_KEY], is_checked=False)
        rehearsal = generator.passages(known.samples)
        after = generator.learn(before, generator.passages(learnt), rehearsal, [*key, _LEARN_KEY], share=_GENTLE)
        of_new, of_own = generator.perplexity(generator.passages(told)), generator.perplexity(self._domain.held_out)
        scores = [
            Taught("cloud", of_new(before), of_new(after), is_new=True),
            Taught(self._node_id, of_own(before), of_own(after), is_new=False),
        ]
        return tuple(scores), after, refusal(scores, self._spec.tolerance)
