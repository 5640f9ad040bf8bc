"""The slots of a group of requests: who is where, who moves when one leaves, and what those who left leave behind.

A group's slots hold the requests that decode, then those whose prompts are not through, without a gap: so what decodes
together lies together. Where one leaves, the highest of either kind moves down.

Above these slots each group has a shelf: what a request left there when it went saves the next one that begins with the
same tokens the work of computing them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from operator import eq
from typing import NamedTuple

WORTH = 16
"""So many tokens at the beginning of a prompt are worth a move."""


class Move(NamedTuple):
    """The request in one slot goes to another with its tokens."""

    source: int
    target: int
    num_tokens: int


@dataclass(slots=True)
class SlotRequest:
    """A request as slots hold it."""

    request_id: str
    tokens: list[int]  # prompt and answer
    adapter: str = ""
    num_cached: int = 0
    num_reused: int = 0

    @property
    def num_left(self) -> int:
        """Tokens that are not computed yet."""
        return len(self.tokens) - self.num_cached


@dataclass(slots=True)
class _Kept:
    """What a place on the shelf holds: tokens, and what an adapter made of them."""

    tokens: list[int]
    adapter: str
    used: int  # when, in requests that the group has seen

    def shared(self, request: SlotRequest) -> int:
        """How many first tokens it has in common with a request of the same adapter."""
        if self.adapter != request.adapter:
            return 0
        return sum(1 for _ in takewhile(bool, map(eq, self.tokens, request.tokens)))


@dataclass(slots=True)
class Group:
    """Slots: those that decode, then those whose prompts are not through, then the shelf.

    Attributes:
        first_place: the slot at which the shelf begins.
        keeps_parts: whether the first tokens of what is kept are of use without the others.
    """

    first_place: int
    num_places: int
    keeps_parts: bool

    decoding: list[SlotRequest] = field(default_factory=list)
    prefilling: list[SlotRequest] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    prefilled_last: bool = False
    shelf: list[_Kept] = field(default_factory=list)
    num_seen: int = 0

    def enter(self, request: SlotRequest) -> None:
        """A request takes the next slot, with what the shelf has of it."""
        self.num_seen += 1
        place, num_tokens = self.found(request)
        if num_tokens:
            self.shelf[place].used = self.num_seen
            self.moves.append(Move(self.first_place + place, len(self), num_tokens))
            request.num_cached = request.num_reused = num_tokens
        self.prefilling.append(request)

    def found(self, request: SlotRequest) -> tuple[int, int]:
        """The place that saves a request the most, and how many tokens that is; its last one is computed anyway."""
        useful = [(min(self._useful(kept, request), len(request.tokens) - 1), i) for i, kept in enumerate(self.shelf)]
        num_tokens, place = max(useful, default=(0, 0))
        return (place, num_tokens) if num_tokens >= WORTH else (0, 0)

    def _useful(self, kept: _Kept, request: SlotRequest) -> int:
        shared = kept.shared(request)
        is_whole = shared == len(kept.tokens) < len(request.tokens)
        return shared if self.keeps_parts or is_whole else 0

    def keep(self, request: SlotRequest) -> None:
        """Put what was computed of a request that goes on the shelf, in the place that is missed least."""
        tokens = request.tokens[: request.num_cached]
        if len(tokens) < WORTH or not self.num_places:
            return
        kept = _Kept(tokens, request.adapter, self.num_seen)
        place = self._place_for(kept)
        if self.shelf[place] is kept:
            self.moves.append(Move(self.requests.index(request), self.first_place + place, len(tokens)))

    def _place_for(self, kept: _Kept) -> int:
        """Where it lies, or something that is all of it already."""
        for place, other in enumerate(self.shelf):
            shortest = min(len(other.tokens), len(kept.tokens))
            if other.adapter == kept.adapter and other.tokens[:shortest] == kept.tokens[:shortest]:
                if self.keeps_parts and len(other.tokens) > shortest:
                    other.used = kept.used
                else:
                    self.shelf[place] = kept
                return place
        if len(self.shelf) < self.num_places:
            self.shelf.append(kept)
            return len(self.shelf) - 1
        oldest = min(range(len(self.shelf)), key=lambda place: self.shelf[place].used)
        self.shelf[oldest] = kept
        return oldest

    def leave(self, request: SlotRequest) -> None:
        """A request goes; its slot is taken by the highest that decodes, and that one's by the highest of all."""
        num_decoding = len(self.decoding)
        if request in self.prefilling:
            self._replace(self.prefilling, request, num_decoding)
            return
        self._replace(self.decoding, request, 0)
        if self.prefilling:
            highest = self.prefilling.pop()
            self._move(highest, num_decoding + len(self.prefilling), num_decoding - 1)
            self.prefilling.insert(0, highest)

    @property
    def requests(self) -> list[SlotRequest]:
        """By slot."""
        return [*self.decoding, *self.prefilling]

    def _replace(self, requests: list[SlotRequest], request: SlotRequest, first: int) -> None:
        slot, highest = requests.index(request), requests.pop()
        if highest is not request:
            requests[slot] = highest
            self._move(highest, first + len(requests), first + slot)

    def _move(self, request: SlotRequest, source: int, target: int) -> None:
        if request.num_cached:
            self.moves.append(Move(source, target, request.num_cached))

    def __len__(self) -> int:
        return len(self.decoding) + len(self.prefilling)


def together(requests: Sequence[SlotRequest]) -> Iterator[SlotRequest]:
    """Those that can go through with the first one, as many tokens of each; who ends with it stands first."""
    first = least = requests[0]
    for request in takewhile(lambda other: other.num_cached == first.num_cached, requests):
        if request.num_left < least.num_left:
            return
        least = request
        yield request
