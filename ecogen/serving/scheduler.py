"""Which requests run in the next step: continuous batching, without a tensor.

Requests live in slots. A chain of S stages is kept busy by S groups of slots: while one group's step is at the second
stage, the next group's is at the first. A group's step is either a chunk of prompts (Agrawal et al. 2023, Sarathi,
https://arxiv.org/abs/2308.16369) or one token of every request that has its prompt behind it; the two alternate where
there is both, so that prompts delay the others by a chunk at most. A chunk is of one long prompt or of several short
ones: as many tokens of each, since a step is a rectangle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from ecogen.serving.slots import Group, Move, SlotRequest, together


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
        self._waiting: deque[SlotRequest] = deque()
        self._steps: dict[int, Step] = {}  # those that run, by group
        self._cancelled: set[str] = set()

    def submit(self, request_id: str, prompt: Iterable[int], adapter: str = "") -> None:
        """A request waits for a slot, behind those that came before."""
        self._waiting.append(SlotRequest(request_id, list(prompt), adapter))

    def cancel(self, request_id: str) -> None:
        """A request goes, at once or when its step ends; one that is unknown changes nothing."""
        self._waiting = deque(request for request in self._waiting if request.request_id != request_id)
        for index, group in enumerate(self._groups):
            if any(request.request_id == request_id for request in group.requests):
                self._cancelled.add(request_id)
                if index not in self._steps:
                    self._drop_cancelled(index)

    def begin(self, group: int) -> Step | None:
        """The next step of a group; None where it has nothing to do, or its last one has not ended."""
        own = self._groups[group]
        if group in self._steps:
            return None
        self._admit(own)
        if own.prefilling and not (own.decoding and own.prefilled_last):
            self._steps[group] = self._prefill(group)
        elif own.decoding:
            self._steps[group] = self._decode(group)
        return self._steps.get(group)

    def end(self, group: int, tokens: Iterable[int], finished: Iterable[str] = (), failed: Iterable[str] = ()) -> None:
        """A group's step has ended.

        Args:
            tokens: the answers' next, of the rows that have one.
            finished: requests that need no more.
            failed: those of which nothing is to be kept.
        """
        own, tokens = self._groups[group], list(tokens)
        step = self._steps.pop(group)
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
            self._waiting.appendleft(SlotRequest(request.request_id, request.tokens, request.adapter))
        self._cancelled.clear()
        self._steps.clear()
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

    def _new_groups(self, number: int) -> list[Group]:
        return [Group(self._room, self._shelf, self._keeps_parts) for _ in range(number)]

    def _admit(self, own: Group) -> None:
        """Requests that wait go to the group whose shelf has most of them, or else to the emptiest."""
        while self._waiting and len(own) < self._room and self._is_best(own, self._waiting[0]):
            own.enter(self._waiting.popleft())

    def _is_best(self, own: Group, request: SlotRequest) -> bool:
        rooms = [group for group in self._groups if len(group) < self._room]
        return max((group.found(request)[1], -len(group)) for group in rooms) == (own.found(request)[1], -len(own))

    def _prefill(self, group: int) -> Step:
        own = self._groups[group]
        own.prefilled_last, begin = True, own.prefilling[0].num_cached
        length = min(own.prefilling[0].num_left, self._chunk)
        ran = list(islice(together(own.prefilling), max(1, self._chunk // length)))
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

    def _moves(self, own: Group) -> tuple[Move, ...]:
        moves, own.moves = tuple(own.moves), []
        return moves

    def _drop_cancelled(self, group: int) -> None:
        own = self._groups[group]
        for request in own.requests:
            if request.request_id in self._cancelled:
                own.keep(request)
                own.leave(request)
                self._cancelled.discard(request.request_id)
