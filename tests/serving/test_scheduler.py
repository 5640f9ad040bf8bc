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

    def __init__(self, num_groups: int, num_slots: int, keeps_parts: bool = True) -> None:
        self.keeps_parts = keeps_parts
        self.slots: list[list[list[int]]] = [[[] for _ in range(num_slots)] for _ in range(num_groups)]

    def run(self, step: Step) -> list[int]:
        slots = self.slots[step.group]
        for move in step.moves:
            assert self.keeps_parts or move.num_tokens == len(slots[move.source])
            slots[move.target] = slots[move.source][: move.num_tokens]
        given = []
        for row, (tokens, position) in enumerate(zip(step.tokens, step.positions, strict=True)):
            slot = step.first + row
            assert position <= len(slots[slot])  # what lies below was written
            slots[slot] = [*slots[slot][:position], *tokens]
            given.append(follows(slots[slot]))
        return given


prompts = st.lists(st.integers(0, 99), min_size=1, max_size=12)
# Some begin alike, with more tokens than are worth a move.
alike = st.tuples(st.sampled_from([list(range(20)), list(range(30))]), prompts).map(lambda two: [*two[0], *two[1]])
requests = st.tuples(prompts | alike, st.integers(1, 9), st.integers(0, 30))


@given(
    wanted=st.lists(requests, min_size=1, max_size=12),
    num_groups=st.integers(1, 3),
    num_slots=st.integers(1, 4),
    chunk=st.integers(1, 30),
    cancelled=st.dictionaries(st.integers(0, 11), st.integers(0, 40), max_size=3),
    lost=st.none() | st.integers(0, 40),
    shelf=st.integers(0, 3),
    keeps_parts=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_every_request_is_answered_as_if_alone(
    wanted: list[tuple[list[int], int, int]],
    num_groups: int,
    num_slots: int,
    chunk: int,
    cancelled: dict[int, int],
    lost: int | None,
    shelf: int,
    keeps_parts: bool,
) -> None:
    """They come when they come, some are cancelled, and at some moment all that stages remember may be lost."""
    scheduler = Scheduler(num_groups, num_slots, chunk, shelf=shelf, keeps_parts=keeps_parts)
    stages = Stages(num_groups, num_slots + shelf, keeps_parts)
    answers: dict[str, list[int]] = {str(index): [] for index in range(len(wanted))}
    for tick in range(2000):
        for index, (prompt, _, arrival) in enumerate(wanted):
            if arrival == tick:
                scheduler.submit(str(index), prompt)
        for index in (index for index, when in cancelled.items() if when == tick):
            scheduler.cancel(str(index))
        if tick == lost:
            scheduler.restart(num_groups)
            stages = Stages(num_groups, num_slots + shelf, keeps_parts)
        for group in range(num_groups):
            if step := scheduler.begin(group):
                given, finished = stages.run(step), []
                for name, token in zip(step.requests[: step.gives], given, strict=False):
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


def test_short_prompts_go_through_together() -> None:
    scheduler = Scheduler(1, 8, chunk=8)
    for name, length in (("a", 2), ("b", 2), ("c", 3), ("d", 2), ("long", 11)):
        scheduler.submit(name, range(length))
    step = scheduler.begin(0)
    assert step is not None
    assert step.requests == ("a", "b", "c")  # d ends with a, but comes after one that does not
    assert step.tokens == ((0, 1),) * 3
    assert step.gives == 2
    scheduler.end(0, [5, 5])
    decoding = scheduler.begin(0)
    assert decoding is not None
    assert decoding.requests == ("a", "b")


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


def answer(scheduler: Scheduler, name: str, prompt: list[int], length: int, adapter: str = "") -> tuple[int, int]:
    """How many tokens of a prompt a chain computed, and how many the shelf had."""
    scheduler.submit(name, prompt, adapter)
    computed = 0
    for number in range(length):
        step = scheduler.begin(0)
        assert step is not None
        computed += len(step.tokens[0])
        reused = scheduler.num_reused(name)
        scheduler.end(0, [50 + number], [name] if number == length - 1 else [])
    return computed, reused


def test_what_begins_alike_is_computed_once() -> None:
    scheduler = Scheduler(1, 2, chunk=100, shelf=2)
    system = list(range(40))
    assert answer(scheduler, "a", [*system, 7], 3) == (43, 0)
    assert answer(scheduler, "b", [*system, 8], 1) == (1, 40), "the system prompt"
    assert answer(scheduler, "c", [*system, 7, 50, 51, 9], 1) == (1, 43), "a chat that goes on"
    assert answer(scheduler, "d", system, 1) == (1, 39), "the last token is computed anyway"
    assert answer(scheduler, "e", [*system, 7], 1, "tuned") == (41, 0), "another adapter makes something else of it"


def test_states_are_of_use_as_a_whole_only() -> None:
    scheduler = Scheduler(1, 2, chunk=100, shelf=2, keeps_parts=False)
    system = list(range(40))
    assert answer(scheduler, "a", [*system, 7], 2) == (42, 0)
    assert answer(scheduler, "b", [*system, 8], 1) == (41, 0)
    assert answer(scheduler, "c", [*system, 7, 50, 9], 1) == (1, 42)


def test_the_place_that_was_used_longest_ago_is_given_away() -> None:
    scheduler = Scheduler(1, 1, chunk=100, shelf=2)
    prompts = [[start, *range(30)] for start in (100, 200, 300)]
    for index in (0, 1, 0, 2, 0):
        last = answer(scheduler, f"r{index}", [*prompts[index], 9], 1)
    assert last == (1, 31)
    assert answer(scheduler, "x", [*prompts[1], 9], 1) == (32, 0)


def test_of_what_failed_nothing_is_kept() -> None:
    scheduler = Scheduler(1, 1, chunk=100, shelf=1)
    scheduler.submit("a", range(40))
    assert scheduler.begin(0) is not None
    scheduler.end(0, [0], failed=["a"])
    assert scheduler.num_running == 0
    assert answer(scheduler, "b", list(range(40)), 1) == (40, 0)
