"""Forming clusters: as good as trying everything on small pools, never below its bound, and its reasons are true."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings

from ecogen import planning
from ecogen.errors import PlacementError
from ecogen.planning.cover import Capacities, cover, least_time
from ecogen.planning.forming import form, form_most
from ecogen.planning.pool import Pool, Work
from ecogen.planning.reasons import left_out
from ecogen.planning.search import plan
from ecogen.topology import Link, Node
from tests.planning.pools import LINK, SHAPE, node, pool_of, pools


def everything(pool: Pool) -> frozenset[int]:
    return frozenset(range(len(pool.nodes)))


def slowest_of(pool: Pool, order: Sequence[Node]) -> float:
    """The slowest stage of devices in this order, as `plan` has it; infinite where they cannot hold the model."""
    work, size = pool.work, len(order)
    returns = work.labels == "start" and size > 1
    in_flight = min(work.microbatches, 2 * size + 1 if returns else size)
    settings = {"microbatch_size": work.microbatch_size, "microbatches": in_flight, "owners": work.owners}
    try:
        return plan(work.shape, order, work.link, work.labels, **settings).bottleneck_s
    except PlacementError:
        return float("inf")


def partitions(size: int, count: int) -> Iterator[list[frozenset[int]]]:
    """Every way to give devices to clusters, or to none."""
    for places in product(range(count + 1), repeat=size):
        yield [frozenset(i for i, place in enumerate(places) if place == cluster) for cluster in range(count)]


def best_of_all(pool: Pool, count: int) -> float:
    return min(max(pool.slowest_s(members) for members in clusters) for clusters in partitions(len(pool.nodes), count))


@settings(max_examples=40)
@given(pools(1, 4))
def test_a_cluster_is_as_fast_as_its_best_order(pool: Pool) -> None:
    best_s = min(slowest_of(pool, order) for order in permutations(pool.nodes))
    assert pool.slowest_s(everything(pool)) == pytest.approx(best_s)
    if np.isfinite(best_s):
        assert pool.plan(everything(pool)).bottleneck_s == pytest.approx(best_s)


@settings(max_examples=20)
@given(pools(6, 6))
def test_where_orders_are_too_many_exchanging_and_moving_finds_the_best_or_nearly(pool: Pool) -> None:
    every = np.array(list(permutations(range(6))))
    best_s = pool.slowest_of_orders(every).min()
    found_s, order = pool._climb(range(6))
    assert best_s <= found_s <= 1.2 * best_s
    if np.isfinite(found_s):
        assert slowest_of(pool, [pool.nodes[index] for index in order]) == pytest.approx(found_s)


@settings(max_examples=25)
@given(pools(2, 5))
def test_forming_is_within_a_quarter_of_the_best_and_not_below_its_bound(pool: Pool) -> None:
    for count in (1, 2):
        best_s, formed = best_of_all(pool, count), form(pool, count)
        if formed is None:
            assert not np.isfinite(best_s)
            continue
        assert formed.bound_s <= best_s * (1 + 1e-9)
        assert best_s * (1 - 1e-9) <= formed.slowest_s <= 1.25 * best_s
        assert not frozenset.intersection(*formed.clusters) or count == 1


def test_forming_finds_the_best_of_nearly_all_pools() -> None:
    """Six devices in two clusters: of all pools but one, the best there is."""
    draw, ratios = random.Random(0), []
    for _ in range(20):
        pool = random_pool(draw, 6)
        formed, best_s = form(pool, 2), best_of_all(pool, 2)
        if formed is not None:
            ratios.append(formed.slowest_s / best_s)
    assert len(ratios) >= 15
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) >= len(ratios) - 1


def random_pool(draw: random.Random, size: int) -> Pool:
    access = [Link("d2d", draw.uniform(0, 0.02), 10 ** draw.uniform(5.5, 8)) for _ in range(size)]
    return pool_of(*(node(i, draw.uniform(1, 20), 10 ** draw.uniform(8, 9.5), access[i]) for i in range(size)))


def test_without_the_solver_forming_is_nearly_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is for large pools: here on small ones, of which the best is known."""
    for module in (planning.cover, planning.forming):
        monkeypatch.setattr(module, "MOST_SOLVED", 0)
    monkeypatch.setattr(planning.cover, "_solve", None)  # is not to be called
    draw = random.Random(0)
    for _ in range(10):
        pool = random_pool(draw, 6)
        formed, best_s = form(pool, 2), best_of_all(pool, 2)
        assert formed is not None
        assert formed.bound_s <= best_s * (1 + 1e-9)
        assert best_s * (1 - 1e-9) <= formed.slowest_s <= 1.25 * best_s


def test_a_pool_of_two_hundred_is_formed_in_seconds() -> None:
    pool, began_s = random_pool(random.Random(1), 200), time.process_time()
    formed = form(pool, 30)
    assert formed is not None
    assert len(formed.clusters) == 30
    assert formed.bound_s <= formed.slowest_s
    assert time.process_time() - began_s < 20


@settings(max_examples=15)
@given(pools(2, 6))
def test_the_bound_holds_whatever_the_clusters(pool: Pool) -> None:
    capacities = Capacities.of(pool)
    for count in (1, 2, 3):
        bound_s = least_time(capacities, count)
        some = list(partitions(len(pool.nodes), count))[:: max(1, len(pool.nodes) ** count // 40)]
        for clusters in some:
            slowest_s = max(pool.slowest_s(members) for members in clusters)
            assert not np.isfinite(slowest_s) or (bound_s is not None and slowest_s >= bound_s * (1 - 1e-9))


@settings(max_examples=15)
@given(pools(2, 8))
def test_the_solver_gives_each_cluster_enough(pool: Pool) -> None:
    capacities = Capacities.of(pool)
    for count in (1, 2):
        bound_s = least_time(capacities, count)
        clusters = None if bound_s is None else cover(capacities, count, bound_s)
        if clusters is None:
            continue
        first, other = capacities.blocks(bound_s or 0)
        assert sum(map(len, clusters)) == len(frozenset().union(*clusters))
        for members in map(list, clusters):
            assert max(first[i] + sum(other[j] for j in members if j != i) for i in members) >= pool.num_blocks


def test_alike_devices_are_divided_alike() -> None:
    formed = form(pool_of(*(node(index, 5) for index in range(6))), 2)
    assert formed is not None
    assert [len(members) for members in formed.clusters] == [3, 3]
    assert formed.idle_s == pytest.approx(sum(formed.slowest_s - s for p in formed.plans for s in p.stage_s))


def test_a_device_behind_a_slow_link_is_avoided() -> None:
    slow = Link("d2d", 0.05, 1e6)
    pool = pool_of(node(0, 5), node(1, 5, access=slow), node(2, 5), node(3, 5, access=slow), node(4, 5), node(5, 5))
    formed = form(pool, 1)
    assert formed is not None
    assert formed.clusters[0] <= {0, 2, 4, 5}


def test_what_makes_nothing_faster_is_left_out_and_it_says_why() -> None:
    """A crawling device, one that is too small, and one that would only wait."""
    fast = Link("d2d", 0.0, 1e12)
    pool = pool_of(node(0, 40, 1e9, fast), node(1, 40, 1e9, fast), node(2, 40, 1e5, fast), node(3, 0.3, 1e9, fast))
    formed = form(pool, 1)
    assert formed is not None
    assert formed.clusters == (frozenset({0, 1}),)
    slow, small = left_out(pool, formed.clusters, ["edge-0.cluster-0"])
    assert (slow.node_id, small.node_id) == ("edge-0.device-2", "edge-0.device-3")
    times = pool.slowest_s(frozenset({0, 1, 2})) / formed.slowest_s
    assert times > 100
    assert slow.reason == f"too slow: in edge-0.cluster-0 the slowest stage would take {times:.3g} x as long"
    assert slow.slowest_s == pool.slowest_s(frozenset({0, 1, 2}))
    assert small.reason.startswith("cannot hold one block: that needs ")


def test_a_device_that_would_only_wait_is_not_needed() -> None:
    pool = pool_of(node(0, 40, 1e9), node(1, 40, 1e9, LINK), node(2, 40, 1e9), work=Work(SHAPE, Link("d2d", 0.0, 1e12)))
    formed = form(pool, 3)
    assert formed is not None
    assert [len(members) for members in formed.clusters] == [1, 1, 1]
    one = form(pool_of(*(node(index, 40) for index in range(7))), 1)
    assert one is not None
    unused = left_out(pool_of(*(node(index, 40) for index in range(7))), one.clusters, ["edge-0.cluster-0"])
    assert all(out.slowest_s is None or out.slowest_s >= one.slowest_s * (1 - 1e-9) for out in unused)
    assert len(unused) == 7 - len(one.clusters[0])


def test_as_many_clusters_as_tune_the_most_examples() -> None:
    pool = pool_of(*(node(index, 40, speed) for index, speed in enumerate((1e9, 1e9, 1e9, 2e8, 2e8))))
    formed = form_most(pool)
    assert formed is not None
    rates = {count: count / found.slowest_s for count in range(1, 6) if (found := form(pool, count)) is not None}
    assert len(formed.clusters) / formed.slowest_s == pytest.approx(max(rates.values()))


def test_a_pool_that_cannot_hold_the_model_forms_nothing() -> None:
    assert form(pool_of(node(0, 1.5), node(1, 1.5)), 1) is None
    assert form_most(pool_of(node(0, 0.1))) is None
    assert form(pool_of(node(0, 40)), 2) is None


def test_the_same_pool_forms_the_same_clusters() -> None:
    draw = random.Random(3)
    nodes = [node(index, draw.uniform(2, 9), 10 ** draw.uniform(8, 9)) for index in range(10)]
    first, second = (form(pool_of(*nodes), 3) for _ in range(2))
    assert first is not None
    assert first == second
