"""Which requests run in the next step: continuous batching, without a tensor.

Requests live in slots. A chain of S stages is kept busy by S groups of slots: while one group's step is at the second
stage, the next group's is at the first. A group's step is either a chunk of one prompt (Agrawal et al. 2023, Sarathi,
https://arxiv.org/abs/2308.16369) or one token of every request that has its prompt behind it; the two alternate where
there is both, so that a long prompt delays the others by a chunk at most.

A group's slots hold the requests that decode, then those whose prompts are not through, without a gap: so what decodes
together lies together. Where one leaves, the highest of either kind moves down.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


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
        tokens: their tokens; several of one row, or one of each.
        positions: where the first of these goes, row by row.
        requests: whose they are, row by row.
        gives: whether each row's last token is followed by one of the answer.
    """

    group: int
    moves: tuple[Move, ...]
    first: int
    tokens: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]
    requests: tuple[str, ...]
    gives: bool


@dataclass(slots=True)
class _Request:
    request_id: str
    tokens: list[int]  # prompt and answer
    num_cached: int = 0


@dataclass(slots=True)
class _Group:
    """Slots: those that decode, then those whose prompts are not through."""

    decoding: list[_Request] = field(default_factory=list)
    prefilling: list[_Request] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    prefilled_last: bool = False
    step: Step | None = None  # the one that runs

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


class Scheduler:
    """Continuous batching over groups of slots.

    Args:
        num_groups: as many as the chain has stages.
        slots_per_group: how many requests each has room for.
        chunk: how many tokens of a prompt go through at once.
    """

    def __init__(self, num_groups: int, slots_per_group: int, chunk: int) -> None:
        self._groups = [_Group() for _ in range(num_groups)]
        self._room, self._chunk = slots_per_group, chunk
        self._waiting: deque[_Request] = deque()
        self._cancelled: set[str] = set()

    def submit(self, request_id: str, prompt: Iterable[int]) -> None:
        """A request waits for a slot, behind those that came before."""
        self._waiting.append(_Request(request_id, list(prompt)))

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

    def end(self, group: int, tokens: Iterable[int], finished: Iterable[str] = ()) -> None:
        """A group's step has ended.

        Args:
            tokens: the answer's next, row by row; not looked at where the step gives none.
            finished: requests that need no more.
        """
        own, tokens = self._groups[group], list(tokens)
        step, own.step = own.step, None
        assert step is not None
        ran = own.prefilling[:1] if own.prefilled_last else own.decoding
        for row, request in enumerate(ran):
            request.num_cached += len(step.tokens[row])
            if step.gives:
                request.tokens.append(tokens[row])
        if own.prefilled_last and step.gives:
            own.decoding.append(own.prefilling.pop(0))
        self._cancelled.update(finished)
        self._drop_cancelled(group)

    def restart(self, num_groups: int) -> None:
        """Nothing is cached any more: what has a slot waits again, before the others, with what it was given."""
        running = [request for group in self._groups for request in group.requests]
        kept = [request for request in running if request.request_id not in self._cancelled]
        self._waiting.extendleft(_Request(request.request_id, request.tokens) for request in reversed(kept))
        self._cancelled.clear()
        self._groups = [_Group() for _ in range(num_groups)]

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with one."""
        return sum(map(len, self._groups))

    def _admit(self, own: _Group) -> None:
        """Requests that wait go to the emptiest group first."""
        while self._waiting and len(own) < self._room and len(own) == min(map(len, self._groups)):
            own.prefilling.append(self._waiting.popleft())

    def _prefill(self, group: int) -> Step:
        own = self._groups[group]
        own.prefilled_last, request = True, own.prefilling[0]
        begin = request.num_cached
        tokens = tuple(request.tokens[begin : begin + self._chunk])
        gives = begin + len(tokens) == len(request.tokens)
        slot = len(own.decoding)
        return Step(group, self._moves(own), slot, (tokens,), (begin,), (request.request_id,), gives)

    def _decode(self, group: int) -> Step:
        own = self._groups[group]
        own.prefilled_last = False
        tokens = tuple((request.tokens[-1],) for request in own.decoding)
        positions = tuple(request.num_cached for request in own.decoding)
        names = tuple(request.request_id for request in own.decoding)
        return Step(group, self._moves(own), 0, tokens, positions, names, gives=True)

    def _moves(self, own: _Group) -> tuple[Move, ...]:
        moves, own.moves = tuple(own.moves), []
        return moves

    def _drop_cancelled(self, group: int) -> None:
        own = self._groups[group]
        for request in own.requests:
            if request.request_id in self._cancelled:
                own.leave(request)
                self._cancelled.discard(request.request_id)
