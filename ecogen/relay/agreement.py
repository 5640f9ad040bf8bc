"""Teachers check each other: a picture whose caption others know better is handed on only if they read it likewise.

Edges may contradict each other about what a caption means: one has labels mixed up, or writes its sevens as others
write their ones. What an edge drew goes to the edges that know its captions too; they say how sure they are that the
caption is right, and the cloud weighs what they say by how many real examples each has.

Shapes: N samples.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ecogen.relay.samples import Samples, joined

AGREED = 0.5
"""More of all evidence for a caption than this must hold it for right: who stands alone against an equal is dropped."""


class Drawn(NamedTuple):
    """One sample: whose it is, and where in that teacher's lesson."""

    teacher: str
    place: int


def asked_of(lessons: Mapping[str, Samples], judge: str) -> list[Drawn]:
    """What others drew of captions of which a teacher has evidence too, in the order in which it is asked."""
    known = {caption for caption, count in lessons[judge].evidence.items() if count} if judge in lessons else set[str]()
    return [
        Drawn(teacher, index)
        for teacher, samples in sorted(lessons.items())
        if teacher != judge
        for index, caption in enumerate(samples.captions)
        if caption in known
    ]


def shared_with(lessons: Mapping[str, Samples], judge: str) -> Samples:
    """The samples of `asked_of`, without what evidence others have."""
    places = asked_of(lessons, judge)
    parts = [lessons[name][[one.place for one in places if one.teacher == name]] for name in sorted(lessons)]
    shared = joined(parts)
    return Samples(shared.codes, shared.captions, {})


def agreed(lessons: Mapping[str, Samples], verdicts: Mapping[str, Tensor]) -> dict[str, Samples]:
    """What is left of lessons once teachers have checked each other's.

    Args:
        verdicts: of each teacher that gave one, how likely it holds the captions of what it was asked to be right [N].
            Who gave none, or not of all, has no say.
    """
    said = {
        judge: dict(zip(places, verdict.tolist(), strict=True))
        for judge, verdict in verdicts.items()
        if len(places := asked_of(lessons, judge)) == len(verdict)
    }
    return {
        teacher: samples[[index for index in range(len(samples)) if _is_agreed(Drawn(teacher, index), lessons, said)]]
        for teacher, samples in lessons.items()
    }


def _is_agreed(drawn: Drawn, lessons: Mapping[str, Samples], said: Mapping[str, Mapping[Drawn, float]]) -> bool:
    """Whether most of the evidence is for a sample; its own teacher's is, by what it has handed on at all."""
    caption = lessons[drawn.teacher].captions[drawn.place]
    own = lessons[drawn.teacher].evidence.get(caption, 0)
    others = [(lessons[judge].evidence[caption], told[drawn]) for judge, told in said.items() if drawn in told]
    total = own + sum(count for count, _ in others)
    return not others or own + sum(count * share for count, share in others) > AGREED * total


def num_disputed(lessons: Mapping[str, Samples], left: Collection[Samples]) -> int:
    """How many samples were dropped."""
    return sum(map(len, lessons.values())) - sum(map(len, left))


def of_others(samples: Samples, evidence: Mapping[str, int]) -> Samples:
    """What a receiver does not know itself, or others have real examples of too: the rest is but its own, retold.

    Args:
        evidence: of the receiver; that of the samples is of all teachers together.
    """
    own = [evidence.get(caption, 0) for caption in samples.captions]
    told = [samples.evidence.get(caption, 0) for caption in samples.captions]
    return samples[[place for place in range(len(samples)) if not own[place] or told[place] > own[place]]]


def checked_by_itself(samples: Samples, evidence: Mapping[str, int], said: Tensor) -> Samples:
    """What a receiver takes of a lesson: of captions that it knows itself, only what it does not hold for wrong.

    Args:
        evidence: of the receiver.
        said: how likely it holds each caption to be right [N].
    """
    is_known = torch.tensor([bool(evidence.get(caption)) for caption in samples.captions], dtype=torch.bool)
    is_wrong = is_known & (said <= AGREED)
    return samples[torch.nonzero(~is_wrong).flatten().tolist()]
