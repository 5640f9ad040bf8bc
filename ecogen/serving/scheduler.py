"""Which requests run in the next step: continuous batching, without a tensor.

Requests live in slots. A chain of S stages is kept busy by S groups of slots: while one group's step is at the second
stage, the next group's is at the first. A group's step is either a chunk of prompts (Agrawal et al. 2023, Sarathi,
https://arxiv.org/abs/2308.16369) or one token of every request that has its prompt behind it; the two alternate where
there is both, so that prompts delay the others by a chunk at most. A chunk is of one long prompt or of several short
ones: as many tokens of each, since a step is a rectangle.

A group's slots hold the requests that decode, then those whose prompts are not through, without a gap: so what decodes
together lies together. Where one leaves, the highest of either kind moves down.

Above these slots each group has a shelf: what a request left there when it went saves the next one that begins with the
same tokens the work of computing them again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from operator import eq
from typing import NamedTuple

WORTH = 16
"""So many tokens at the beginning of a prompt are worth a move."""


class Move(NamedTuple):
    """The request in one slot goes to another with its tokens."""

    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Step:
    """What all stages do next for one group.

    Attributes:
        moves: before anything else.
        first: the first slot of the rows that run.
        tokens: their tokens, as many of each.
        positions: where the first of these goes, row by row.
        requests: whose they are, row by row.
        gives: how many rows, from the first on, are followed by a token of the answer.
    """

    group: int
    moves: tuple[Move, ...]
    first: int
    tokens: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]
    requests: tuple[str, ...]
    gives: int


@dataclass(slots=True)
class _Request:
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

    def shared(self, request: _Request) -> int:
        """How many first tokens it has in common with a request of the same adapter."""
        if self.adapter != request.adapter:
            return 0
        return sum(1 for _ in takewhile(bool, map(eq, self.tokens, request.tokens)))


@dataclass(slots=True)
class _Group:
    """Slots: those that decode, then those whose prompts are not through, then the shelf.

    Attributes:
        first_place: the slot at which the shelf begins.
        keeps_parts: whether the first tokens of what is kept are of use without the others.
    """

    first_place: int
    num_places: int
    keeps_parts: bool

    decoding: list[_Request] = field(default_factory=list)
    prefilling: list[_Request] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    prefilled_last: bool = False
    step: Step | None = None  # the one that runs
    shelf: list[_Kept] = field(default_factory=list)
    num_seen: int = 0

    def enter(self, request: _Request) -> None:
        """A request takes the next slot, with what the shelf has of it."""
        self.num_seen += 1
        place, num_tokens = self.found(request)
        if num_tokens:
            self.shelf[place].used = self.num_seen
            self.moves.append(Move(self.first_place + place, len(self), num_tokens))
            request.num_cached = request.num_reused = num_tokens
        self.prefilling.append(request)

    def found(self, request: _Request) -> tuple[int, int]:
        """The place that saves a request the most, and how many tokens that is; its last one is computed anyway."""
        useful = [(min(self._useful(kept, request), len(request.tokens) - 1), i) for i, kept in enumerate(self.shelf)]
        num_tokens, place = max(useful, default=(0, 0))
        return (place, num_tokens) if num_tokens >= WORTH else (0, 0)

    def _useful(self, kept: _Kept, request: _Request) -> int:
        shared = kept.shared(request)
        is_whole = shared == len(kept.tokens) < len(request.tokens)
        return shared if self.keeps_parts or is_whole else 0

    def keep(self, request: _Request) -> None:
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

    def leave(self, request: _Request) -> None:
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
    def requests(self) -> list[_Request]:
        """By slot."""
        return [*self.decoding, *self.prefilling]

    def _replace(self, requests: list[_Request], request: _Request, first: int) -> None:
        slot, highest = requests.index(request), requests.pop()
        if highest is not request:
            requests[slot] = highest
            self._move(highest, first + len(requests), first + slot)

    def _move(self, request: _Request, source: int, target: int) -> None:
        if request.num_cached:
            self.moves.append(Move(source, target, request.num_cached))

    def __len__(self) -> int:
        return len(self.decoding) + len(self.prefilling)


def _together(requests: Sequence[_Request]) -> Iterator[_Request]:
    """Those that can go through with the first one, as many tokens of each; who ends with it stands first."""
    first = least = requests[0]
    for request in takewhile(lambda other: other.num_cached == first.num_cached, requests):
        if request.num_left < least.num_left:
            return
        least = request
        yield request


class Scheduler:
    """Continuous batching over groups of slots.

    Args:
        num_groups: as many as the chain has stages.
        slots_per_group: how many requests each has room for.
        chunk: how many tokens of prompts go through at once.
        shelf: places of each group for what requests leave behind; their slots come after the others.
        keeps_parts: whether the first of these tokens are of use without the rest: not where states are kept that
            have seen all of them.
    """

    def __init__(
        self, num_groups: int, slots_per_group: int, chunk: int, *, shelf: int = 0, keeps_parts: bool = True
    ) -> None:
        self._room, self._chunk, self._shelf, self._keeps_parts = slots_per_group, chunk, shelf, keeps_parts
        self._groups = self._new_groups(num_groups)
        self._waiting: deque[_Request] = deque()
        self._cancelled: set[str] = set()

    def submit(self, request_id: str, prompt: Iterable[int], adapter: str = "") -> None:
        """A request waits for a slot, behind those that came before."""
        self._waiting.append(_Request(request_id, list(prompt), adapter))

    def cancel(self, request_id: str) -> None:
        """A request goes, at once or when its step ends; one that is unknown changes nothing."""
        self._waiting = deque(request for request in self._waiting if request.request_id != request_id)
        for index, group in enumerate(self._groups):
            if any(request.request_id == request_id for request in group.requests):
                self._cancelled.add(request_id)
                if group.step is None:
                    self._drop_cancelled(index)

    def begin(self, group: int) -> Step | None:
        """The next step of a group; None where it has nothing to do, or its last one has not ended."""
        own = self._groups[group]
        if own.step is not None:
            return None
        self._admit(own)
        if own.prefilling and not (own.decoding and own.prefilled_last):
            own.step = self._prefill(group)
        elif own.decoding:
            own.step = self._decode(group)
        return own.step

    def end(self, group: int, tokens: Iterable[int], finished: Iterable[str] = (), failed: Iterable[str] = ()) -> None:
        """A group's step has ended.

        Args:
            tokens: the answers' next, of the rows that have one.
            finished: requests that need no more.
            failed: those of which nothing is to be kept.
        """
        own, tokens = self._groups[group], list(tokens)
        step, own.step = own.step, None
        assert step is not None
        ran = (own.prefilling if own.prefilled_last else own.decoding)[: len(step.tokens)]
        for row, request in enumerate(ran):
            request.num_cached += len(step.tokens[row])
            if row < step.gives:
                request.tokens.append(tokens[row])
        if own.prefilled_last:
            own.decoding += own.prefilling[: step.gives]
            del own.prefilling[: step.gives]
        failed = set(failed)
        for request in [request for request in own.requests if request.request_id in failed]:
            own.leave(request)
        self._cancelled.update(finished)
        self._cancelled -= failed
        self._drop_cancelled(group)

    def restart(self, num_groups: int) -> None:
        """Nothing is cached any more: what has a slot waits again, before the others, with what it was given."""
        running = [request for group in self._groups for request in group.requests]
        kept = [request for request in running if request.request_id not in self._cancelled]
        for request in reversed(kept):
            self._waiting.appendleft(_Request(request.request_id, request.tokens, request.adapter))
        self._cancelled.clear()
        self._groups = self._new_groups(num_groups)

    def num_reused(self, request_id: str) -> int:
        """How many first tokens of a request with a slot the shelf had."""
        requests = (request for group in self._groups for request in group.requests)
        return next((request.num_reused for request in requests if request.request_id == request_id), 0)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with one."""
        return sum(map(len, self._groups))

    def _new_groups(self, number: int) -> list[_Group]:
        return [_Group(self._room, self._shelf, self._keeps_parts) for _ in range(number)]

    def _admit(self, own: _Group) -> None:
        """Requests that wait go to the group whose shelf has most of them, or else to the emptiest."""
        while self._waiting and len(own) < self._room and self._is_best(own, self._waiting[0]):
            own.enter(self._waiting.popleft())

    def _is_best(self, own: _Group, request: _Request) -> bool:
        rooms = [group for group in self._groups if len(group) < self._room]
        return max((group.found(request)[1], -len(group)) for group in rooms) == (own.found(request)[1], -len(own))

    def _prefill(self, group: int) -> Step:
        own = self._groups[group]
        own.prefilled_last, begin = True, own.prefilling[0].num_cached
        length = min(own.prefilling[0].num_left, self._chunk)
        ran = list(islice(_together(own.prefilling), max(1, self._chunk // length)))
        tokens = tuple(tuple(request.tokens[begin : begin + length]) for request in ran)
        names = tuple(request.request_id for request in ran)
        gives = sum(request.num_left == length for request in ran)
        return Step(group, self._moves(own), len(own.decoding), tokens, (begin,) * len(ran), names, gives)

    def _decode(self, group: int) -> Step:
        own = self._groups[group]
        own.prefilled_last = False
        tokens = tuple((request.tokens[-1],) for request in own.decoding)
        positions = tuple(request.num_cached for request in own.decoding)
        names = tuple(request.request_id for request in own.decoding)
        return Step(group, self._moves(own), 0, tokens, positions, names, gives=len(names))

    def _moves(self, own: _Group) -> tuple[Move, ...]:
        moves, own.moves = tuple(own.moves), []
        return moves

    def _drop_cancelled(self, group: int) -> None:
        own = self._groups[group]
        for request in own.requests:
            if request.request_id in self._cancelled:
                own.keep(request)
                own.leave(request)
                self._cancelled.discard(request.request_id)
