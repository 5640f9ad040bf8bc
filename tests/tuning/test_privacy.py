"""Privacy of clusters: what one cluster can change, the noise, who takes part, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ecogen.config import Privacy, from_table
from ecogen.errors import AggregationError, ConfigError
from ecogen.tuning.aggregate import Update
from ecogen.tuning.privacy import (
    ClusterPrivacy,
    clip,
    draw_by_seed,
    draw_secretly,
    epsilon,
    private_mean,
    secure_normal,
)

SHAPES = {"classifier.bias": (3,), "vit.layers.0.prompts": (2, 2)}
BEFORE = {name: torch.full(shape, 0.5) for name, shape in SHAPES.items()}
CLIP, EXPECTED = 0.7, 2.5

anything = st.floats(allow_nan=True, allow_infinity=True, width=32)
tensors = st.lists(anything, min_size=7, max_size=7).map(
    lambda numbers: {
        "classifier.bias": torch.tensor(numbers[:3]),
        "vit.layers.0.prompts": torch.tensor(numbers[3:]).view(2, 2),
    }
)


def no_noise(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64)


def mean_of(*updates: Mapping[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    given = {"clip_norm": CLIP, "noise_multiplier": 1.0, "expected": EXPECTED, "normal": no_noise} | changes
    named = [Update(f"cluster-{number}", tensors, 5) for number, tensors in enumerate(updates)]
    return private_mean(BEFORE, named, **given)


def moved(change: float) -> dict[str, Tensor]:
    return {name: tensor + change for name, tensor in BEFORE.items()}


def distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float((left[name].double() - right[name].double()).square().sum()) for name in SHAPES))


# What one cluster can change.


@settings(max_examples=50)
@given(tensors, tensors)
def test_without_one_cluster_the_sum_is_at_most_the_clip_norm_away(
    one: dict[str, Tensor], other: dict[str, Tensor]
) -> None:
    """Whatever is in its update: numbers of any size, and what is none. Replaced by another one, twice that."""
    rest = [moved(0.1), moved(-2.0)]
    without = mean_of(*rest)
    with_one, with_other = mean_of(*rest, one), mean_of(*rest, other)
    assert all(torch.isfinite(tensor).all() for tensor in with_one.values())
    assert distance(with_one, without) <= CLIP / EXPECTED + 1e-6  # float32 tunables
    assert distance(with_one, with_other) <= 2 * CLIP / EXPECTED + 1e-6


def test_the_bound_is_reached() -> None:
    assert distance(mean_of(moved(9.0)), BEFORE) == pytest.approx(CLIP / EXPECTED, rel=1e-6)


@settings(max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6), st.floats(1e-3, 1e3))
def test_clipping_shortens_what_is_too_long_and_leaves_the_rest(numbers: list[float], norm: float) -> None:
    change = torch.tensor(numbers, dtype=torch.float64)
    clipped, length = clip(change, norm), float(change.norm())
    if length <= norm:
        assert torch.equal(clipped, change)
    else:
        assert float(clipped.norm()) == pytest.approx(norm)
        assert torch.allclose(clipped / norm, change / length)


def test_the_mean_is_the_published_formula_on_a_small_case() -> None:
    """McMahan et al. 2018, Algorithm 1, equal weights: w + sum(d_k min(1, S / |d_k|)) / (q W) + N(0, (z S / q W)^2)."""
    small, large = 0.1, 2.0  # of 7 coordinates: the norms are 0.2646, kept, and 5.2915, clipped to 0.7
    noise = torch.arange(7, dtype=torch.float64)
    got = mean_of(moved(small), moved(large), noise_multiplier=0.5, normal=lambda count: noise)
    by_hand = 0.5 + (0.1 + 0.7 / math.sqrt(7)) / 2.5 + 0.5 * 0.7 / 2.5 * noise
    flat = torch.cat([got["classifier.bias"], got["vit.layers.0.prompts"].flatten()])
    assert torch.allclose(flat.double(), by_hand, atol=1e-6)


def test_missing_clusters_change_neither_noise_nor_denominator() -> None:
    def ones(count: int) -> Tensor:
        return torch.ones(count, dtype=torch.float64)

    alone, together = mean_of(moved(0.1), normal=ones), mean_of(moved(0.1), moved(0.0), moved(0.0), normal=ones)
    assert all(torch.equal(alone[name], together[name]) for name in SHAPES)
    nobody = mean_of(normal=ones)
    assert float(nobody["classifier.bias"][0]) == pytest.approx(0.5 + CLIP / EXPECTED)


def test_other_tunables_are_an_error_that_names_them() -> None:
    with pytest.raises(AggregationError, match=r"'cluster-1' is of other tunables: it differs at 'classifier.bias'"):
        mean_of(moved(0.1), {"vit.layers.0.prompts": torch.zeros(2, 2)})


# The noise.


def test_the_noise_has_the_deviation_that_was_asked_for() -> None:
    generator = torch.Generator().manual_seed(5)
    before = {"w": torch.zeros(40_000)}
    spec = Privacy(noise_multiplier=1.5, clip_norm=0.2)
    normal = lambda count: torch.randn(count, generator=generator, dtype=torch.float64)  # noqa: E731
    noise = ClusterPrivacy(spec, 0.25, 200, normal).update(before, []).tunables["w"]
    assert float(noise.std()) == pytest.approx(1.5 * 0.2 / 50, rel=0.02)
    assert abs(float(noise.mean())) < 4 * 1.5 * 0.2 / 50 / 200


def test_the_secure_source_is_standard_normal_and_never_the_same_twice() -> None:
    drawn = secure_normal(100_000).sort().values
    probabilities = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    gap = float((torch.special.ndtr(drawn) - probabilities).abs().max())
    assert gap < 2.7 / math.sqrt(100_000)  # Kolmogorov-Smirnov: more in one of a million draws
    assert not torch.equal(secure_normal(8), secure_normal(8))


# Who takes part.


def test_each_cluster_takes_part_with_the_rate_and_independently() -> None:
    names = [f"cluster-{number}" for number in range(2000)]
    for draw in (lambda: draw_secretly(names, 0.2), lambda: draw_by_seed(names, 0.2, [3, 1])):
        assert abs(len(draw()) - 400) < 5 * math.sqrt(2000 * 0.2 * 0.8)
    assert draw_by_seed(names, 0.2, [3, 1]) == draw_by_seed(names, 0.2, [3, 1])
    assert draw_by_seed(names, 0.2, [3, 1]) != draw_by_seed(names, 0.2, [3, 2])
    assert draw_secretly(names, 0.2) != draw_secretly(names, 0.2)


# What it costs.


def gaussian_delta(epsilon: float, mu: float) -> float:
    """The exact curve of the Gaussian mechanism (Balle and Wang 2018, theorem 8), which composes: mu = sqrt(T) / z."""

    def cumulative(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return cumulative(mu / 2 - epsilon / mu) - math.exp(epsilon) * cumulative(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize(("z", "rounds"), [(1.0, 1), (2.0, 10)])
def test_with_everybody_in_every_round_epsilon_is_the_exact_one_of_the_gaussian_mechanism(
    z: float, rounds: int
) -> None:
    spent = epsilon(z, 1.0, rounds, 1e-3)
    mu = math.sqrt(rounds) / z
    assert gaussian_delta(spent, mu) <= 1e-3 <= gaussian_delta(spent - 0.03, mu)


def test_epsilon_is_below_the_published_one_of_the_moments_accountant() -> None:
    """Abadi et al. 2016, https://arxiv.org/abs/1607.00133: 1.26 for q 0.01, sigma 4, 10,000 steps, delta 1e-5."""
    assert 0.9 < epsilon(4.0, 0.01, 10_000, 1e-5) < 1.26


def test_epsilon_grows_with_rounds_and_is_nothing_before_the_first() -> None:
    spent = [epsilon(1.0, 0.2, rounds, 1e-3) for rounds in (0, 1, 3)]
    assert spent[0] == 0
    assert spent == sorted(set(spent))


# Recipes.


def private(**sections: Any) -> None:
    from_table({"privacy": {"noise_multiplier": 1.0}} | sections)


@pytest.mark.parametrize("strategy", ["median", "trimmed_mean", "multi_krum", "a_users_own"])
def test_strategies_that_want_each_update_are_refused(strategy: str) -> None:
    with pytest.raises(ConfigError, match=rf"aggregation.strategy: '{strategy}' wants each cluster's own update"):
        private(aggregation={"strategy": strategy})
    five = {"clusters_per_edge": 5}  # which a robust strategy needs
    from_table({"topology": five, "aggregation": {"strategy": strategy}})  # as long as nothing is private


def test_a_delta_that_means_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"privacy.delta: 0.5 is not below 1 / clusters of an edge = 0.333333"):
        private(privacy={"noise_multiplier": 1.0, "delta": 0.5})


@settings(max_examples=10)
@given(st.sampled_from(["fedavg", "fedadam", "fedyogi"]))
def test_strategies_that_need_only_the_mean_change_are_fine(strategy: str) -> None:
    private(aggregation={"strategy": strategy})
