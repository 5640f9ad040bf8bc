"""What a receiver has been taught lately: the last lesson of each teacher, mixed by caption and by evidence."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch

from ecogen.relay.samples import Samples, joined


def mixed(lessons: Mapping[str, Samples], number: int, generator: torch.Generator) -> Samples:
    """About so many samples: of each caption as many as of the others, and of each teacher by its evidence for it.

    Teachers may contradict each other about a caption: who has seen more real examples of it has more of a say. Where
    nobody has seen any, all have the same.

    Args:
        lessons: by teacher.
    """
    by_caption: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for teacher, samples in sorted(lessons.items()):
        for place, caption in enumerate(samples.captions):
            by_caption[caption].setdefault(teacher, []).append(place)
    chosen: dict[str, list[int]] = {teacher: [] for teacher in lessons}
    each = number / max(1, len(by_caption))
    for caption in sorted(by_caption):
        teachers = by_caption[caption]
        evidence = {teacher: lessons[teacher].evidence.get(caption, 0) for teacher in teachers}
        total = sum(evidence.values())
        for teacher, places in teachers.items():
            share = evidence[teacher] / total if total else 1 / len(teachers)
            count = min(len(places), math.ceil(each * share)) if share else 0
            order = torch.randperm(len(places), generator=generator)[:count].tolist()
            chosen[teacher] += [places[index] for index in order]
    return joined([lessons[teacher][sorted(places)] for teacher, places in sorted(chosen.items())])
