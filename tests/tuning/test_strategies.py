"""Each strategy equals its published formula, written here once more by hand on small cases."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, EntryPoints
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import trim_mean
from torch import Tensor

from ecogen.config import Aggregation
from ecogen.errors import AggregationError, ConfigError
from ecogen.tuning import strategies
from ecogen.tuning.aggregate import Update, aggregate
from ecogen.tuning.strategies import STRATEGIES, strategy_of
from tests.tuning.edges import Edge, EdgeState, tunables

NAMES = tuple(name for name in STRATEGIES if name != "scaffold")  # which is in test_scaffold.py
Tunables = dict[str, Tensor]


def updates_of(count: int, seed: int = 0, *, size: int = 7) -> list[Update]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Update(
            f"c{i}", {"a": torch.randn(size, generator=generator), "b": torch.randn(2, 3, generator=generator)}, 10 + i
        )
        for i in range(count)
    ]


def flat(tensors: Mapping[str, Tensor]) -> np.ndarray:
    return torch.cat([tensors[name].double().flatten() for name in ("a", "b")]).numpy()


def after(spec: Aggregation, updates: Sequence[Update], before: Tunables | None = None) -> Tunables:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in updates[0].tunables.items()}
    return strategy_of(spec)(before or zeros, updates, {}, spec)[0]


@pytest.mark.parametrize("name", ["fedavg", "median", "trimmed_mean", "multi_krum"])
@given(st.integers(1, 6), st.integers(0, 100))
def test_equal_updates_change_nothing(name: str, count: int, seed: int) -> None:
    (one,) = updates_of(1, seed)
    same = [Update(f"c{i}", one.tunables, 3 + i) for i in range(count)]
    result = after(Aggregation(strategy=name, faulty=2), same)
    assert all(torch.equal(result[key], one.tunables[key]) for key in one.tunables)


@pytest.mark.parametrize("name", NAMES)
def test_types_and_names_stay_and_updates_are_left_alone(name: str) -> None:
    updates = updates_of(5)
    copies = [{key: tensor.clone() for key, tensor in update.tunables.items()} for update in updates]
    result = after(Aggregation(strategy=name), updates)
    assert {key: (tensor.dtype, tensor.shape) for key, tensor in result.items()} == {
        key: (tensor.dtype, tensor.shape) for key, tensor in updates[0].tunables.items()
    }
    assert all(torch.equal(u.tunables[key], copy[key]) for u, copy in zip(updates, copies, strict=True) for key in copy)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_refused_by_name(name: str) -> None:
    updates = updates_of(5)
    updates[3].tunables["b"][1, 2] = torch.nan  # type: ignore[index]
    with pytest.raises(AggregationError, match="'c3' has a value that is not finite in 'b'"):
        after(Aggregation(strategy=name), updates)


def test_fedavg_is_the_weighted_mean() -> None:
    updates = updates_of(4)
    truth = np.average([flat(u.tunables) for u in updates], axis=0, weights=[u.num_examples for u in updates])
    np.testing.assert_allclose(flat(after(Aggregation(), updates)), truth, rtol=1e-6)


@given(st.integers(1, 7), st.integers(0, 100))
def test_the_median_is_numpys(count: int, seed: int) -> None:
    updates = updates_of(count, seed)
    truth = np.median([flat(u.tunables) for u in updates], axis=0)
    np.testing.assert_allclose(flat(after(Aggregation(strategy="median"), updates)), truth, rtol=1e-6)


@given(st.integers(5, 8), st.integers(0, 2), st.integers(0, 100))
def test_the_trimmed_mean_is_scipys(count: int, faulty: int, seed: int) -> None:
    updates = updates_of(count, seed)
    truth = trim_mean([flat(u.tunables) for u in updates], (faulty + 0.1) / count, axis=0)
    result = after(Aggregation(strategy="trimmed_mean", faulty=faulty), updates)
    np.testing.assert_allclose(flat(result), truth, rtol=1e-5, atol=1e-7)


@given(st.integers(5, 8), st.integers(0, 1), st.integers(0, 100))
def test_multi_krum_averages_those_with_the_smallest_scores(count: int, faulty: int, seed: int) -> None:
    updates = updates_of(count, seed)
    points = [flat(update.tunables) for update in updates]
    scores = [
        min(
            sum(((points[i] - points[j]) ** 2).sum() for j in near)
            for near in combinations([j for j in range(count) if j != i], count - faulty - 2)
        )
        for i in range(count)
    ]
    best = sorted(sorted(range(count), key=scores.__getitem__)[: count - faulty])
    truth = aggregate([updates[i] for i in best])
    result = after(Aggregation(strategy="multi_krum", faulty=faulty), updates)
    assert all(torch.equal(result[key], truth[key]) for key in truth)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_the_adaptive_ones_are_algorithm_2_over_rounds(name: str) -> None:
    spec = Aggregation(strategy=name, server_rate=0.3, beta_1=0.8, beta_2=0.95, tau=0.01)
    value, memory = {key: torch.ones_like(t) for key, t in updates_of(1)[0].tunables.items()}, {}
    w, m, v = flat(value), 0.0, spec.tau**2
    for seed in range(4):
        updates = updates_of(3, seed)
        value, memory = strategy_of(spec)(value, updates, memory, spec)
        change = np.average([flat(u.tunables) for u in updates], axis=0, weights=[10, 11, 12]) - w
        m = 0.8 * m + 0.2 * change
        v = 0.95 * v + 0.05 * change**2 if name == "fedadam" else v - 0.05 * change**2 * np.sign(v - change**2)
        w = w + 0.3 * m / (np.sqrt(v) + 0.01)
        np.testing.assert_allclose(flat(value), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "multi_krum"])
def test_one_update_of_six_that_is_anything_hardly_moves_the_robust_ones(name: str) -> None:
    honest = [Update(f"c{i}", {"w": torch.full((4,), 1 + 0.01 * i)}, 10) for i in range(5)]
    for wrong in (1e6, -1e6, 1.5):
        poisoned = [*honest, Update("c5", {"w": torch.full((4,), wrong)}, 10_000)]
        assert (after(Aggregation(strategy=name), poisoned)["w"] - 1.02).abs().max() < 0.05
    assert after(Aggregation(), [*honest, Update("c5", {"w": torch.full((4,), 1e6)}, 10_000)])["w"].min() > 1e5


def test_with_too_few_clusters_fewer_faulty_ones_are_tolerated(caplog: pytest.LogCaptureFixture) -> None:
    two = updates_of(2)
    with caplog.at_level(logging.WARNING):
        for name in ("trimmed_mean", "multi_krum"):
            assert after(Aggregation(strategy=name, faulty=2), two).keys() == {"a", "b"}
    assert "2 updates cannot tolerate 2 faulty ones; tolerating 0" in caplog.text


def test_an_unknown_strategy_is_refused_with_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"'fedadm' is no strategy; did you mean 'fedadam'\?"):
        strategy_of(Aggregation(strategy="fedadm"))


def test_a_package_may_offer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("mine", "ecogen.tuning.strategies:median", strategies.GROUP)
    monkeypatch.setattr(strategies, "entry_points", lambda group: EntryPoints([point]) if group == point.group else ())
    assert strategy_of(Aggregation(strategy="mine")) is strategies.median


async def test_an_edge_that_died_goes_on_with_what_the_strategy_remembered(edge: Edge) -> None:
    spec = Aggregation(strategy="fedyogi", server_rate=1.0)
    begin = EdgeState(tunables(0.0))
    await edge.rounds(begin, spec, rounds=3).run()
    undisturbed = EdgeState.load(edge.path)
    assert any(tensor.abs().sum() > 0 for tensor in undisturbed.memory.values())
    await edge.rounds(begin, spec, rounds=2).run()
    await edge.rounds(EdgeState.load(edge.path), spec, rounds=3).run()
    resumed = EdgeState.load(edge.path)
    for kept in ("tunables", "memory"):
        assert all(torch.equal(t, getattr(resumed, kept)[n]) for n, t in getattr(undisturbed, kept).items())
