"""What is drawn is distributed as the settings say."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ecogen.serving.sampling import Sampler, Sampling

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
DRAWS = 4000


def shares(sampling: Sampling, logits: Tensor = LOGITS) -> list[float]:
    """How often each token is drawn."""
    sampler, counts = Sampler(sampling), torch.zeros(len(logits))
    for _ in range(DRAWS):
        counts[sampler(logits).token] += 1
    return (counts / DRAWS).tolist()


def softmax(values: list[float]) -> list[float]:
    weights = [math.exp(value) for value in values]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (Sampling(seed=1), softmax([2, 1, 0, -1, -3])),
        (Sampling(seed=1, temperature=0.5), softmax([4, 2, 0, -2, -6])),
        (Sampling(seed=1, top_k=2), [*softmax([2, 1]), 0, 0, 0]),
        (Sampling(seed=1, top_p=0.7), [*softmax([2, 1]), 0, 0, 0]),  # the first has 0.64
        (Sampling(seed=1, top_p=0.6), [1, 0, 0, 0, 0]),
        (Sampling(seed=1, top_p=0.0), [1, 0, 0, 0, 0]),
        (Sampling(seed=1, temperature=2, top_k=3), [*softmax([1, 0.5, 0]), 0, 0]),
    ],
)
def test_shares(sampling: Sampling, wanted: list[float]) -> None:
    assert shares(sampling) == pytest.approx(wanted, abs=0.03)


def test_temperature_zero_takes_the_likeliest() -> None:
    assert shares(Sampling(temperature=0))[0] == 1


def test_a_seed_gives_the_same_tokens_and_none_gives_others() -> None:
    flat = torch.zeros(1000)
    assert len({Sampler(Sampling(seed=7))(flat).token for _ in range(5)}) == 1
    assert len({Sampler(Sampling())(flat).token for _ in range(20)}) > 10


def test_another_sampler_goes_on_where_one_was() -> None:
    flat, settings = torch.zeros(50), Sampling(seed=3, frequency_penalty=0.4)
    whole = Sampler(settings)
    tokens = [whole(flat).token for _ in range(9)]
    second = Sampler(settings, given=tokens[:4])
    assert [second(flat).token for _ in range(5)] == tokens[4:]


def test_penalties_count_what_was_given() -> None:
    """Greedily: a token falls by the presence penalty once, and by the frequency penalty each time."""
    logits = torch.tensor([1.0, 0.5, -9.0])
    often = Sampler(Sampling(temperature=0, frequency_penalty=0.3))
    assert [often(logits).token for _ in range(6)] == [0, 0, 1, 0, 1, 0]
    once = Sampler(Sampling(temperature=0, presence_penalty=0.8))
    assert [once(logits).token for _ in range(4)] == [0, 1, 0, 0]


@given(st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=9), st.integers(0, 12))
@settings(max_examples=50, deadline=None)
def test_log_probabilities_are_the_models_own(values: list[float], num_top: int) -> None:
    logits = torch.tensor(values)
    chosen = Sampler(Sampling(temperature=0.3, top_k=1, presence_penalty=1, num_top=num_top, seed=0))(logits)
    logprobs = logits.log_softmax(-1)
    assert chosen.logprob == pytest.approx(float(logprobs[chosen.token]))
    assert [value for _, value in chosen.top] == pytest.approx(logprobs.sort(descending=True)[0][:num_top].tolist())


def test_biases_move_and_ban_tokens() -> None:
    """Log-probabilities stay the model's own."""
    assert shares(Sampling(seed=1, logit_bias=((0, -100), (4, 3)))) == pytest.approx(
        [0, *softmax([1, 0, -1, 0])], abs=0.03
    )
    chosen = Sampler(Sampling(temperature=0, logit_bias=((4, 10.0),)))(LOGITS)
    assert (chosen.token, chosen.logprob) == (4, pytest.approx(float(LOGITS.log_softmax(-1)[4])))


def test_a_constraint_sees_every_token_and_is_stronger_than_a_bias() -> None:
    class Odd:
        taken: ClassVar[list[int]] = []

        def mask(self, logits: Tensor) -> Tensor:
            return logits.masked_fill(torch.arange(len(logits)) % 2 == 0, -torch.inf)

        def take(self, token: int) -> None:
            self.taken.append(token)

    sampler = Sampler(Sampling(grammar="odd", logit_bias=((0, 100),)), lambda grammar: {"odd": Odd()}[grammar])
    tokens = [sampler(LOGITS).token for _ in range(50)]
    assert set(tokens) == {1, 3}
    assert Odd.taken == tokens
