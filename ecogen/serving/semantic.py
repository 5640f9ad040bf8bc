"""Answers that an edge has given before, for questions that mean the same in other words.

Kept apart as `answers` keeps them: by model and version of the adapter, by tenant, by everything that was asked for.
Only the last message of a chat, or the text of a completion, may be worded otherwise. Not thread-safe.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ecogen.config import Semantic
from ecogen.serving.answers import key_of
from ecogen.serving.calibration import Calibration, calibrate, likeness
from ecogen.serving.desk import Generate
from ecogen.serving.generation import Taken
from ecogen.serving.marks import Marks, marks_of
from ecogen.serving.pairs import OWN_PAIRS, read_pairs
from ecogen.serving.sampling import Chosen

logger = logging.getLogger(__name__)

_ENTRY_BYTES, _TOKEN_BYTES = 4096, 160
"""About what Python takes for one, without and for each token of its answer."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A question and its answer.

    Attributes:
        group: what must be the same.
        max_new: to which length it was cut; None where it came to its end.
    """

    group: Hashable
    text: str
    marks: Marks
    answer: tuple[Chosen, ...]
    max_new: int | None
    since_s: float

    def fits(self, max_new: int) -> bool:
        """Whether it is what would be said with this length."""
        return len(self.answer) <= max_new if self.max_new is None else self.max_new == max_new

    @property
    def nbytes(self) -> int:
        return _ENTRY_BYTES + _TOKEN_BYTES * sum(1 + len(chosen.top) for chosen in self.answer)


class SemanticAnswers:
    """The last ones asked for.

    Args:
        room: how many are kept; 0 for none.
        threshold: the likeness from which on two questions are the same; None keeps none.
        age_s: for how long one is given.
        nbytes: of all together.
    """

    def __init__(
        self,
        room: int,
        threshold: float | None,
        *,
        age_s: float,
        nbytes: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._room, self._threshold, self._age_s, self._nbytes, self._clock = room, threshold, age_s, nbytes, clock
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # the one not asked for longest first
        self._groups: dict[Hashable, set[int]] = {}
        self._held = 0.0
        self._number = 0

    @property
    def is_on(self) -> bool:
        return bool(self._room) and self._threshold is not None

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, wanted: Generate) -> tuple[tuple[Chosen, ...], Taken] | None:
        """The whole answer to the question that is most like this one, where one is like enough."""
        self._forget_old()
        asked = self._read(wanted)
        if asked is None or not (numbers := self._groups.get(asked[0])):
            return None
        fitting = (number for number in numbers if self._entries[number].fits(wanted.request.max_new))
        alike = [(likeness(self._entries[number].marks, asked[1]), number) for number in fitting]
        value, number = max(alike, default=(0.0, 0))
        if self._threshold is None or value < self._threshold:
            return None
        self._entries.move_to_end(number)
        entry = self._entries[number]
        return entry.answer, Taken(value, entry.text)

    def keep(self, wanted: Generate, answer: Sequence[Chosen]) -> None:
        """Keep a whole answer; those that were asked for longest ago make room."""
        asked, wording = self._read(wanted), wanted.request.wording
        if asked is None or wording is None or not answer:
            return
        (group, marks), request = asked, wanted.request
        max_new = None if answer[-1].token in request.ends else request.max_new
        entry = _Entry(group, wording.text, marks, tuple(answer), max_new, self._clock())
        self._number += 1
        self._entries[self._number] = entry
        self._groups.setdefault(group, set()).add(self._number)
        self._held += entry.nbytes
        while len(self._entries) > self._room or self._held > self._nbytes:
            self._forget(next(iter(self._entries)))

    def _read(self, wanted: Generate) -> tuple[Hashable, Marks] | None:
        """What must be the same, and what the question is about; None where no other's answer will do."""
        wording, key = wanted.request.wording, key_of(wanted)
        if not self.is_on or wording is None or key is None or (marks := marks_of(wording.text)) is None:
            return None
        adapter_id, request = key
        same = (request.model, request.tenant, request.sampling, request.ends, wording.context)
        return (adapter_id, same, marks.asking, marks.numbers), marks

    def _forget_old(self) -> None:
        old = [number for number, entry in self._entries.items() if self._clock() - entry.since_s > self._age_s]
        for number in old:
            self._forget(number)

    def _forget(self, number: int) -> None:
        entry = self._entries.pop(number)
        self._held -= entry.nbytes
        self._groups[entry.group].discard(number)
        if not self._groups[entry.group]:
            del self._groups[entry.group]


def from_config(spec: Semantic) -> SemanticAnswers:
    """As a recipe has them; off where it says so, and where no threshold keeps the budget.

    Raises:
        ServingError: if its pairs cannot be read.
    """
    threshold = calibration_of(spec).threshold if spec.answers else None
    return SemanticAnswers(spec.answers, threshold, age_s=spec.age_s, nbytes=spec.mib * 2**20)


def calibration_of(spec: Semantic) -> Calibration:
    """What a recipe's pairs say of its budget.

    Raises:
        ServingError: if they cannot be read.
    """
    seen = calibrate(read_pairs(Path(spec.pairs) if spec.pairs else OWN_PAIRS), spec.false_hits)
    if seen.threshold is None:
        logger.warning(
            "answers to questions that mean the same stay off: of %d opposite pairs no threshold is known to mix up at "
            "most %.2g, at best it is %.2g; raise serving.semantic.false_hits or give more serving.semantic.pairs",
            *(seen.num_opposite, spec.false_hits, seen.bound),
        )
    else:
        logger.info(
            "questions are the same from a likeness of %.2f on: %d of %d pairs that are, %d of %d that are not",
            *(seen.threshold, seen.num_hits, seen.num_same, seen.num_false, seen.num_opposite),
        )
    return seen
