from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from ecogen.relay.quality import copied_share, frechet_distance, nearest_distances, told_apart

SEEDS = st.integers(0, 2**31)


def some(seed: int, number: int, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, width, generator=generator) @ torch.randn(width, width, generator=generator)


@given(SEEDS, SEEDS)
@settings(max_examples=20, deadline=None)
def test_the_distance_is_frechets(one: int, other: int) -> None:
    ours, theirs = some(one, 40).numpy().astype(np.float64), some(other, 30).numpy().astype(np.float64) + 1
    covariances = np.cov(ours.T), np.cov(theirs.T)
    apart = ((ours.mean(0) - theirs.mean(0)) ** 2).sum()
    wanted = apart + np.trace(covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]).real)
    distance = frechet_distance(torch.from_numpy(ours), torch.from_numpy(theirs))
    assert distance == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert distance == pytest.approx(frechet_distance(torch.from_numpy(theirs), torch.from_numpy(ours)), rel=1e-6)


def test_of_the_same_it_is_nothing_and_grows_with_what_is_wrong() -> None:
    ours = some(0, 100)
    assert frechet_distance(ours, ours) < 1e-6
    distances = [frechet_distance(ours, ours + shift) for shift in (0.1, 1.0, 3.0)]
    assert distances == sorted(distances)
    assert frechet_distance(ours, ours * 0.3) > 0.1, "too little variety is far off too"


def test_few_images_have_a_distance() -> None:
    assert frechet_distance(some(0, 3), some(1, 3)) >= 0


def test_copies_are_found_and_others_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    learnt, held_out, fresh = (torch.rand(300, 1, 6, 6, generator=generator) for _ in range(3))
    copied = learnt[:50] + 0.01 * torch.rand(50, 1, 6, 6, generator=generator)
    assert copied_share(copied, learnt, held_out) == 1
    assert copied_share(fresh, learnt, held_out) < 0.05
    assert copied_share(torch.cat([copied, fresh[:50]]), learnt, held_out) == pytest.approx(0.5, abs=0.05)
    assert copied_share(held_out, learnt, held_out) == pytest.approx(0.01, abs=0.005)


def test_nearest_distances() -> None:
    ours, theirs = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert nearest_distances(ours, theirs).tolist() == pytest.approx([1.0, 0.0])


def test_who_is_told_apart() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0])
    assert told_apart(scores, scores - 5) == 1
    assert told_apart(scores - 5, scores) == 0
    assert told_apart(scores, scores) == 0.5
    assert told_apart(torch.tensor([1.0, 0.0]), torch.tensor([0.0])) == 0.75
