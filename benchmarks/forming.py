"""How fast clusters formed of random pools are, beside those of simpler rules: `python -m benchmarks.forming [POOLS]`.

Predicted seconds of the slowest stage of all clusters, by the same model for every rule. Each rule's clusters have
their best order and cuts, so only who is with whom differs; where they cannot hold the model, the rule has failed.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np

from benchmarks.common import circumstances, write_result
from ecogen.config import TunedBlock
from ecogen.planning.cost import ModelShape
from ecogen.planning.forming import dealt, form
from ecogen.planning.pool import Members, Pool, Work
from ecogen.topology import Device, Link, Node, Tier

SEED = 0
# ViT-Small's sizes (Dosovitskiy et al. 2021; Touvron et al. 2021): 22 M parameters in 12 blocks, on 16 x 16 patches.
SHAPE = ModelShape(12, 384, 1536, 197, 768, 10, tuned=(TunedBlock(8, 8, ("q_proj", "v_proj")),) * 12)
LINK = Link("d2d", rtt_s=0.004, bytes_per_s=37.5e6)
MICROBATCH, MICROBATCHES = 8, 4

Rule = Callable[[Pool, int, random.Random], Sequence[Members]]


def random_pool(draw: random.Random, size: int) -> Pool:
    """Devices from a small board to a workstation: 0.5 to 8 GiB, 5 to 500 GFLOP/s, Wi-Fi from 20 to 600 Mbit/s."""
    nodes = []
    for index in range(size):
        device = Device(int(2**30 * log_uniform(draw, 0.5, 8)), log_uniform(draw, 5e9, 5e11), 0.7, 2.3)
        access = Link("d2d", draw.uniform(0.002, 0.02), log_uniform(draw, 20, 600) * 1e6 / 8)
        nodes.append(Node(f"edge-0.device-{index}", Tier.END, "edge-0.field", device, access))
    return Pool(Work(SHAPE, LINK, microbatch_size=MICROBATCH, microbatches=MICROBATCHES), nodes)


def log_uniform(draw: random.Random, low: float, high: float) -> float:
    return float(low * (high / low) ** draw.random())


def at_random(pool: Pool, count: int, draw: random.Random) -> list[Members]:
    """All devices in a random order, dealt out in turn."""
    order = draw.sample(range(len(pool.nodes)), len(pool.nodes))
    return [frozenset(order[index::count][: pool.num_blocks]) for index in range(count)]


def fastest_dealt(pool: Pool, count: int, _: random.Random) -> list[Members]:
    """Round-robin by speed of so many of the fastest devices as do best: what a careful person would try."""
    order = sorted(range(len(pool.nodes)), key=lambda index: -pool.nodes[index].device.flops_per_s)
    tried = [_dealt(pool, count, order[:size]) for size in range(count, len(order) + 1)]
    return min(tried, key=lambda clusters: max(pool.slowest_s(members) for members in clusters))


def _dealt(pool: Pool, count: int, order: Sequence[int]) -> list[Members]:
    """There and back, as teams are chosen; no more devices a cluster than blocks."""
    turns = [order[begin : begin + count] for begin in range(0, len(order), count)][: pool.num_blocks]
    clusters: list[set[int]] = [set() for _ in range(count)]
    for number, turn in enumerate(turns):
        for cluster, index in zip(clusters[:: -1 if number % 2 else 1], turn, strict=False):
            cluster.add(index)
    return [frozenset(cluster) for cluster in clusters]


RULES: Mapping[str, Rule] = {
    "at random": at_random,
    "round-robin by speed": lambda pool, count, _: dealt(pool, count),
    "round-robin of the fastest": fastest_dealt,
}


def measure(number: int) -> dict[str, Any]:
    """One pool: seconds of each rule's slowest stage, infinite where it fails, and what forming took."""
    draw = random.Random(f"{SEED} {number}")
    size = draw.randint(12, 60)
    pool, count = random_pool(draw, size), max(1, size // draw.randint(4, 8))
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    formed = form(pool, count)
    took = {"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s}
    rules = {name: max(pool.slowest_s(members) for members in rule(pool, count, draw)) for name, rule in RULES.items()}
    found = {"forming": formed.slowest_s if formed else np.inf} | rules
    bound = formed.bound_s if formed else None
    used = sum(map(len, formed.clusters)) if formed else 0
    return {"devices": size, "clusters": count, "used": used, "bound_s": bound, "slowest_s": found} | took


def gap_of_small_pools(num_pools: int) -> dict[str, Any]:
    """Of pools of 4 to 7 devices: how often forming is the best of all partitions, and how far off at worst."""
    draw, ratios, missed = random.Random(SEED), [], 0
    for _ in range(num_pools):
        pool, count = random_pool(draw, draw.randint(4, 7)), draw.randint(1, 3)
        formed, best_s = form(pool, count), best_of_all(pool, count)
        if formed is not None:
            ratios.append(formed.slowest_s / best_s)
        elif np.isfinite(best_s):
            missed += 1
    optimal = sum(ratio < 1 + 1e-9 for ratio in ratios)
    return {"pools": num_pools, "formed": len(ratios), "missed": missed, "optimal": optimal, "worst": max(ratios)}


def best_of_all(pool: Pool, count: int) -> float:
    """The fastest slowest stage of every way to give devices to clusters, or to none."""
    best_s = np.inf
    for places in product(range(count + 1), repeat=len(pool.nodes)):
        clusters = [frozenset(i for i, place in enumerate(places) if place == number) for number in range(count)]
        best_s = min(best_s, max(pool.slowest_s(members) for members in clusters))
    return float(best_s)


def summarise(pools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over all pools: how many times as long each rule's slowest stage takes as forming's, and how often it fails."""
    formed = [pool for pool in pools if np.isfinite(pool["slowest_s"]["forming"])]
    rules = {}
    for name in RULES:
        ratios = [pool["slowest_s"][name] / pool["slowest_s"]["forming"] for pool in formed]
        held = sorted(ratio for ratio in ratios if np.isfinite(ratio))
        rules[name] = {"failed": len(ratios) - len(held), **_spread(held), "better": sum(r < 1 - 1e-9 for r in held)}
    bounds = [pool["slowest_s"]["forming"] / pool["bound_s"] for pool in formed]
    return {
        "pools": len(pools),
        "formed": len(formed),
        "times_as_long": rules,
        "over_bound": _spread(bounds),
        "left_out": statistics.fmean(1 - pool["used"] / pool["devices"] for pool in formed),
        "wall_s": _spread([pool["wall_s"] for pool in pools]),
        "cpu_s": _spread([pool["cpu_s"] for pool in pools]),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    names = ("least", "lower_quartile", "median", "upper_quartile", "most")
    return dict(zip(names, (min(values), *quartiles, max(values)), strict=True))


def lines(result: Mapping[str, Any]) -> list[str]:
    """The result in words."""
    large, small, said = result["large"], result["small"], []
    for name, rule in large["times_as_long"].items():
        median, most = rule.get("median", math.inf), rule.get("most", math.inf)
        said.append(
            f"{name}: slowest stage {median:.2f} x as long as that of formed clusters (median, most {most:.1f} x), "
            f"better in {rule['better']} of {large['formed']} pools, "
            f"cannot hold the model in {rule['failed']}"
        )
    bound, cpu_s = large["over_bound"], large["cpu_s"]
    said.append(f"formed clusters: {bound['median']:.2f} x the bound (median, most {bound['most']:.2f} x)")
    said.append(f"forming takes {cpu_s['median']:.1f} CPU s (median, most {cpu_s['most']:.1f})")
    said.append(
        f"of {small['formed']} pools of 4 to 7 devices, {small['optimal']} are formed the best way there is, "
        f"{small['worst']:.2f} x as long at worst; none formed although one could be: {small['missed']}"
    )
    return said


def main(num_pools: int) -> dict[str, Any]:
    """Measure, and write the result."""
    pools = [measure(number) for number in range(num_pools)]
    result = circumstances(["numpy", "scipy"]) | {
        "model": asdict(SHAPE),
        "large": summarise(pools),
        "small": gap_of_small_pools(num_pools),
    }
    write_result("forming", result)
    return result


if __name__ == "__main__":
    print("\n".join(lines(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200))))
