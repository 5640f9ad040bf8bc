"""Averaging: by examples, whatever the order, and never of things that do not belong together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ecogen.errors import AggregationError
from ecogen.tuning.aggregate import Update, aggregate


def update(sender_id: str, num_examples: int, **tensors: Tensor) -> Update:
    return Update(sender_id, tensors, num_examples)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(sum), st.integers(0, 100))
def test_averaging_equal_updates_changes_nothing(weights: list[int], seed: int) -> None:
    value = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    averaged = aggregate([update(f"c{i}", weight, a=value) for i, weight in enumerate(weights)])
    assert torch.equal(averaged["a"], value)


def test_updates_are_weighted_by_the_examples_they_saw() -> None:
    one, other = update("a", 30, w=torch.tensor([1.0, 2.0])), update("b", 10, w=torch.tensor([5.0, -2.0]))
    assert aggregate([one, other])["w"].tolist() == [2.0, 1.0]
    assert aggregate([one, update("b", 0, w=torch.tensor([9.0, 9.0]))])["w"].tolist() == [1.0, 2.0]


@given(st.permutations(range(5)))
def test_it_does_not_matter_who_comes_first(order: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    updates = [update(f"c{i}", 7 * i + 3, w=torch.randn(50, generator=generator)) for i in range(5)]
    assert torch.equal(aggregate([updates[i] for i in order])["w"], aggregate(updates)["w"])


def test_the_type_of_the_tunables_stays() -> None:
    assert aggregate([update("a", 1, w=torch.ones(2, dtype=torch.bfloat16))])["w"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ([], "0 updates with 0 examples in all: nothing to average"),
        ([update("a", 0, w=torch.ones(1))], "1 updates with 0 examples in all: nothing to average"),
        ([update("a", 1, w=torch.ones(2)), update("b", 1, w=torch.ones(3))], "'b' and 'a' differ at 'w'"),
        ([update("a", 1, w=torch.ones(2)), update("b", 1, v=torch.ones(2))], "'b' and 'a' differ at 'v'"),
        ([update("a", 1, w=torch.ones(2)), update("b", 1)], "'b' and 'a' differ at 'w'"),
        ([update("a", 1, w=torch.tensor([1.0, float("nan")]))], "'a' has a value that is not finite in 'w'"),
        ([update("b", 1, w=torch.tensor([float("inf")]))], "'b' has a value that is not finite in 'w'"),
    ],
)
def test_what_cannot_be_averaged_is_refused_by_name(updates: list[Update], message: str) -> None:
    with pytest.raises(AggregationError, match=message):
        aggregate(updates)
