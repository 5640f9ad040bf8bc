"""What transformers' `generate` answers greedily, and whether another answers the same.

A difference is allowed only where the two best logits of transformers are nearly alike, and it is counted: pytest says
in the end how many there were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

NEAR = 1e-4
RECORDED = "greedy answers"
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Greedy:
    """An answer, and the logits [T, V] that its tokens are of."""

    tokens: list[int]
    logits: Tensor

    def __getitem__(self, kept: slice) -> Greedy:
        return Greedy(self.tokens[kept], self.logits[kept])


def alone(whole: PreTrainedModel, prompt: Sequence[int], max_new: int) -> Greedy:
    """What transformers answers, which knows the whole prompt at once."""
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    given = whole.generate(
        torch.tensor([list(prompt)]),
        max_new_tokens=max_new,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    return Greedy(given.sequences[0, len(prompt) :].tolist(), torch.cat(given.logits))


Agree = Callable[[Sequence[int], Greedy], int]
"""Asserts that an answer is as transformers'; returns how many tokens of it are, all but where they differ at a tie."""


def agree_and_record(record: Callable[[str, object], None]) -> Agree:
    """Compares answers.

    Args:
        record: pytest's `record_property`.
    """

    def agree(answer: Sequence[int], wanted: Greedy) -> int:
        place = first_difference(answer, wanted)
        record(RECORDED, int(place < len(wanted.tokens)))
        return place

    return agree


def first_difference(answer: Sequence[int], wanted: Greedy) -> int:
    """Where an answer leaves transformers', for its second best token; its length where it does not.

    Raises:
        AssertionError: if they differ where the best two are not nearly alike.
    """
    pairs = zip(answer, wanted.tokens, strict=False)
    place = next((at for at, (own, its) in enumerate(pairs) if own != its), len(answer))
    if place == len(answer):
        assert list(answer) == wanted.tokens
        return place
    (best, second), tokens = wanted.logits[place].float().topk(2)
    assert answer[place] == tokens[1], f"{list(answer)} is not {wanted.tokens}"
    assert best - second < NEAR, (
        f"{list(answer)} is not {wanted.tokens}: at {place}, logits are {best - second:g} apart"
    )
    return place


def tokens_of(text: str, wanted: Greedy, decode: Callable[[Sequence[int]], str]) -> list[int]:
    """The tokens of an answer of which the text is known: those wanted, or those to where it leaves them at a near tie.

    A character at its end may be incomplete, and is not compared.

    Raises:
        AssertionError: if it is neither.
    """

    def whole(tokens: Sequence[int]) -> str:
        return decode(tokens).rstrip(_INCOMPLETE)

    if text.rstrip(_INCOMPLETE) == whole(wanted.tokens):
        return wanted.tokens
    best = wanted.logits.float().topk(2)
    ties = (best.values[:, 0] - best.values[:, 1] < NEAR).nonzero().flatten().tolist()
    others = [[*wanted.tokens[:place], int(best.indices[place, 1])] for place in ties]
    left = next((other for other in others if text.startswith(whole(other))), None)
    assert left is not None, f"{text!r} is not {whole(wanted.tokens)!r}"
    return left


def summary(recorded: Sequence[object]) -> str:
    """How many answers were compared, and how many of them differ."""
    return (
        f"{len(recorded)} greedy answers compared with transformers', {sum(map(bool, recorded))} differ at a near tie"
    )
