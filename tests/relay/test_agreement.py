"""Teachers that check each other: who is asked what, and what is left of lessons that contradict each other."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecogen.errors import ProtocolError
from ecogen.relay.agreement import agreed, asked_of, checked_by_itself, num_disputed, of_others, shared_with
from ecogen.relay.cloud import checked
from ecogen.relay.samples import Samples

NAMES = ("one", "two", "three")
EVIDENCE = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 50))


def lesson(captions: Mapping[str, int], first: int = 0, each: int = 2) -> Samples:
    """So many samples of each caption; their codes count on from the first."""
    said = [caption for caption in captions for _ in range(each)]
    return Samples(torch.arange(first, first + len(said))[:, None], said, captions)


def sure(lessons: Mapping[str, Samples], judge: str, value: float) -> torch.Tensor:
    return torch.full((len(asked_of(lessons, judge)),), value)


@given(st.lists(EVIDENCE, min_size=1, max_size=4))
def test_who_knows_a_caption_is_asked_of_what_others_drew_of_it(known: list[dict[str, int]]) -> None:
    lessons = {f"edge-{index}": lesson(one, first=100 * index) for index, one in enumerate(known)}
    for judge, own in lessons.items():
        shared = shared_with(lessons, judge)
        assert len(shared) == len(asked_of(lessons, judge))
        assert all(own.evidence[caption] for caption in shared.captions)
        assert not set(shared.codes.flatten().tolist()) & set(own.codes.flatten().tolist())
        assert not shared.evidence
        codes = [lessons[drawn.teacher].codes[drawn.place] for drawn in asked_of(lessons, judge)]
        assert shared.codes.flatten().tolist() == [int(code) for code in codes]


@given(st.lists(EVIDENCE, min_size=1, max_size=4), st.floats(0.51, 1))
def test_nothing_is_dropped_that_all_hold_for_right(known: list[dict[str, int]], value: float) -> None:
    lessons = {f"edge-{index}": lesson(one) for index, one in enumerate(known)}
    left = agreed(lessons, {judge: sure(lessons, judge, value) for judge in lessons})
    assert {name: one.captions for name, one in left.items()} == {name: one.captions for name, one in lessons.items()}
    assert num_disputed(lessons, left.values()) == 0


@pytest.mark.parametrize(("counts", "kept"), [((30, 10), {"a": 2, "b": 0}), ((10, 10), {"a": 0, "b": 0})])
def test_of_contradicting_teachers_the_one_with_more_evidence_is_believed(
    counts: tuple[int, int], kept: dict[str, int]
) -> None:
    """Neither, where they have as much."""
    lessons = {name: lesson({"one": count}) for name, count in zip("ab", counts, strict=True)}
    left = agreed(lessons, {name: sure(lessons, name, 0.0) for name in lessons})
    assert {name: len(samples) for name, samples in left.items()} == kept
    assert num_disputed(lessons, left.values()) == 4 - sum(kept.values())


def test_a_minority_is_outvoted_and_who_knows_nothing_of_it_is_not_asked() -> None:
    lessons = {"a": lesson({"one": 10}), "b": lesson({"one": 10}), "c": lesson({"one": 10}), "d": lesson({"two": 99})}
    is_odd = {"a": 0.0, "b": 0.9, "c": 0.9}

    def said(judge: str) -> torch.Tensor:
        """The others agree with each other, and nobody with a."""
        return torch.tensor([0.0 if drawn.teacher == "a" else is_odd[judge] for drawn in asked_of(lessons, judge)])

    left = agreed(lessons, {judge: said(judge) for judge in is_odd})
    assert {name: len(samples) for name, samples in left.items()} == {"a": 0, "b": 2, "c": 2, "d": 2}
    assert not asked_of(lessons, "d")


def test_a_verdict_on_other_than_was_asked_has_no_say() -> None:
    lessons = {name: lesson({"one": 10}) for name in "ab"}
    assert len(agreed(lessons, {"b": torch.zeros(1)})["a"]) == 2
    assert len(agreed(lessons, {})["a"]) == 2
    assert not asked_of(lessons, "stranger")


def test_a_receiver_is_not_retold_its_own() -> None:
    """Of what it knows it takes what others have real examples of too."""
    told = lesson({"one": 5, "two": 9, "three": 4})
    assert of_others(told, {"one": 5, "two": 5}).captions == ["two", "two", "three", "three"]
    assert of_others(told, {}).captions == told.captions


def test_what_a_receiver_knows_better_it_does_not_take() -> None:
    taken = checked_by_itself(lesson({"one": 0, "two": 0}), {"one": 5}, torch.tensor([0.9, 0.1, 0.9, 0.1]))
    assert (taken.captions, taken.codes.flatten().tolist()) == (["one", "two", "two"], [0, 2, 3])
    assert len(checked_by_itself(lesson({}), {"one": 5}, torch.empty(0))) == 0


@pytest.mark.parametrize(
    "verdict", [None, torch.zeros(2), torch.tensor([0.5, 1.1, 0]), torch.tensor([0, torch.nan, 0])]
)
def test_what_is_no_verdict(verdict: torch.Tensor | None) -> None:
    with pytest.raises(ProtocolError, match="of 3 samples how likely each is right, from 0 to 1"):
        checked(verdict, 3)
