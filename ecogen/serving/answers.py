"""Answers that an edge has given before, for requests that would be answered alike: exactly the same, and not drawn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from ecogen.serving.desk import Generate
from ecogen.serving.generation import GenerationRequest
from ecogen.serving.sampling import Chosen

Key = tuple[str, GenerationRequest]


class Answers:
    """The last ones asked for.

    Args:
        room: how many are kept; 0 for none.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._answers: OrderedDict[Key, tuple[Chosen, ...]] = OrderedDict()

    def find(self, wanted: Generate) -> tuple[Chosen, ...] | None:
        """All tokens of a whole answer, where the same was asked before."""
        key = key_of(wanted)
        if key is None or key not in self._answers:
            return None
        self._answers.move_to_end(key)
        return self._answers[key]

    def keep(self, wanted: Generate, answer: Sequence[Chosen]) -> None:
        """Keep a whole answer; the one that was asked for longest ago makes room."""
        key = key_of(wanted)
        if self._room and key is not None:
            self._answers[key] = tuple(answer)
            self._answers.move_to_end(key)
            while len(self._answers) > self._room:
                self._answers.popitem(last=False)


def key_of(wanted: Generate) -> Key | None:
    """The version of the adapter, and all that was asked, by whom; None for what may be answered otherwise."""
    request, sampling = replace(wanted.request, wording=None), wanted.request.sampling
    if wanted.given or (sampling.temperature and sampling.seed is None):
        return None
    if not sampling.temperature:  # then its seed says nothing
        request = replace(request, sampling=replace(sampling, seed=None))
    return wanted.adapter_id, request
