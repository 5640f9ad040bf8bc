"""The comparison with transformers can fail, and lets nothing through but near ties."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.greedy import RECORDED, Greedy, agree_and_record, summary, tokens_of

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.00005, 0.0], [3.0, 0.0, 1.0]])
WANTED = Greedy([0, 1, 0], LOGITS)


@pytest.mark.parametrize(
    ("answer", "place", "num_ties"),
    [([0, 1, 0], 3, 0), ([0, 0, 2], 1, 1)],
    ids=["the same", "the second best at a tie, and what comes of it"],
)
def test_what_agrees(answer: list[int], place: int, num_ties: int) -> None:
    recorded: list[tuple[str, object]] = []
    agree = agree_and_record(lambda name, value: recorded.append((name, value)))
    assert agree(answer, WANTED) == place
    assert recorded == [(RECORDED, num_ties)]


@pytest.mark.parametrize(
    ("answer", "said"),
    [([1, 1, 0], "logits are 1 apart"), ([0, 2, 0], "is not"), ([0, 1], None), ([0, 1, 0, 0], None)],
    ids=["no tie", "the third best", "too short", "too long"],
)
def test_what_does_not(answer: list[int], said: str | None) -> None:
    with pytest.raises(AssertionError, match=said):
        agree_and_record(lambda *_: None)(answer, WANTED)


def spelled(tokens: Sequence[int]) -> str:
    """The last one's character has no end."""
    return "".join("ab\ufffd"[token] for token in tokens)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("aba", [0, 1, 0]), ("aba\ufffd", [0, 1, 0]), ("aabb", [0, 0])],
    ids=["the same", "a character more that is incomplete", "the second best at a tie, and what comes of it"],
)
def test_a_text_that_agrees(text: str, tokens: list[int]) -> None:
    assert tokens_of(text, WANTED, spelled) == tokens


@pytest.mark.parametrize("text", ["bba", "ab", "abab", ""], ids=["no tie", "too short", "too long", "nothing"])
def test_a_text_that_does_not(text: str) -> None:
    with pytest.raises(AssertionError, match="is not 'aba'"):
        tokens_of(text, WANTED, spelled)


def test_the_summary() -> None:
    assert summary([0, 1, 0]) == "3 greedy answers compared with transformers', 1 differ at a near tie"
