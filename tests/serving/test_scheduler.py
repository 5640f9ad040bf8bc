"""Whatever comes and goes, every request is answered as if it were alone, and slots hold what is said."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from ecogen.serving.scheduler import Scheduler, Step


def follows(tokens: Iterable[int]) -> int:
    """A model: what comes next depends on all that came before."""
    state = 7
    for token in tokens:
        state = (state * 31 + token + 1) % 1009
    return state


def alone(prompt: list[int], length: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(follows(tokens))
    return tokens[len(prompt) :]


class Stages:
    """A chain's memory: the tokens that each group's slots hold."""

    def __init__(self, num_groups: int, num_slots: int) -> None:
        self.slots: list[list[list[int]]] = [[[] for _ in range(num_slots)] for _ in range(num_groups)]

    def run(self, step: Step) -> list[int]:
        slots = self.slots[step.group]
        for move in step.moves:
            slots[move.target] = slots[move.source][: move.num_tokens]
        given = []
        for row, (tokens, position) in enumerate(zip(step.tokens, step.positions, strict=True)):
            slot = step.first + row
            assert position <= len(slots[slot])  # what lies below was written
            slots[slot] = [*slots[slot][:position], *tokens]
            given.append(follows(slots[slot]))
        return given


requests = st.tuples(st.lists(st.integers(0, 99), min_size=1, max_size=12), st.integers(1, 9), st.integers(0, 30))


@given(
    wanted=st.lists(requests, min_size=1, max_size=12),
    num_groups=st.integers(1, 3),
    num_slots=st.integers(1, 4),
    chunk=st.integers(1, 5),
    cancelled=st.dictionaries(st.integers(0, 11), st.integers(0, 40), max_size=3),
    lost=st.none() | st.integers(0, 40),
)
@settings(max_examples=300, deadline=None)
def test_every_request_is_answered_as_if_alone(
    wanted: list[tuple[list[int], int, int]],
    num_groups: int,
    num_slots: int,
    chunk: int,
    cancelled: dict[int, int],
    lost: int | None,
) -> None:
    """They come when they come, some are cancelled, and at some moment all that stages remember may be lost."""
    scheduler, stages = Scheduler(num_groups, num_slots, chunk), Stages(num_groups, num_slots)
    answers: dict[str, list[int]] = {str(index): [] for index in range(len(wanted))}
    for tick in range(2000):
        for index, (prompt, _, arrival) in enumerate(wanted):
            if arrival == tick:
                scheduler.submit(str(index), prompt)
        for index in (index for index, when in cancelled.items() if when == tick):
            scheduler.cancel(str(index))
        if tick == lost:
            scheduler.restart(num_groups)
            stages = Stages(num_groups, num_slots)
        for group in range(num_groups):
            if step := scheduler.begin(group):
                given, finished = stages.run(step), []
                if step.gives:
                    for name, token in zip(step.requests, given, strict=True):
                        answers[name].append(token)
                        if len(answers[name]) == wanted[int(name)][1]:
                            finished.append(name)
                scheduler.end(group, given, finished)
        assert scheduler.num_running <= num_groups * num_slots
        if tick > 50 and not scheduler.num_running and not scheduler.num_waiting:
            break
    for index, (prompt, length, _) in enumerate(wanted):
        whole = alone(prompt, length)
        answer = answers[str(index)]
        assert answer == (whole[: len(answer)] if index in cancelled else whole)


def test_a_long_prompt_delays_others_by_a_chunk_at_a_time() -> None:
    scheduler = Scheduler(1, 2, chunk=4)
    scheduler.submit("short", [1])
    first = scheduler.begin(0)
    assert first is not None
    scheduler.end(0, [5])
    scheduler.submit("long", range(10))
    seen = []
    for _ in range(6):
        step = scheduler.begin(0)
        assert step is not None
        seen.append((step.requests, len(step.tokens[0])))
        scheduler.end(0, [5] * len(step.requests))
    assert seen[:5] == [(("short",), 1), (("long",), 4), (("short",), 1), (("long",), 4), (("short",), 1)]


def test_groups_fill_evenly() -> None:
    scheduler = Scheduler(2, 4, chunk=8)
    for index in range(4):
        scheduler.submit(str(index), [index])
    for _ in range(6):
        for group in (0, 1):
            if scheduler.begin(group):
                scheduler.end(group, [0, 0])
    steps = [scheduler.begin(group) for group in (0, 1)]
    assert [len(step.requests) for step in steps if step] == [2, 2]


def test_a_group_at_work_has_no_next_step() -> None:
    scheduler = Scheduler(1, 1, chunk=4)
    assert scheduler.begin(0) is None
    scheduler.submit("a", [1])
    assert scheduler.begin(0) is not None
    assert scheduler.begin(0) is None
