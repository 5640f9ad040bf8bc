"""Whether clusters formed of a pool are as much faster in a run as was planned: `python -m benchmarks.formed_runs`.

A pool of eight devices in one process: four compute at a quarter of a core's speed, four at a twelfth, by sleeping
after each computation (`faults.slow`), so together they use one core and a third of two. The plan is told those speeds,
with a core's measured first, on a cluster of one device. Three ways to divide the pool into two clusters of four are
run in turn: formed ones, where the solver chooses who, the order and the cuts; devices of both kinds dealt out in turn;
and each kind by itself. All have their best cuts for their order.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.common import Spread, circumstances, wait_until_quiet, write_result
from ecogen import config as recipes
from ecogen.engines.forming import announced_shape, formed
from ecogen.engines.launch import launch
from ecogen.placement import Segment
from ecogen.planning.clusters import plan_clusters
from ecogen.planning.cost import ModelShape, backward_flops, forward_flops

FAST, SLOW, EACH = 4.0, 12.0, 4  # times slower than a core, and devices of each kind
ROUNDS, WARM_UP, PER_CLUSTER = 2, 1, 64
MODEL: dict[str, Any] = {
    "source": "untrained",
    "hidden_size": 256,
    "num_blocks": 8,
    "num_heads": 8,
    "intermediate_size": 1024,
    "patch_size": 4,
}
DEVICES = [f"edge-0.device-{index}" for index in range(2 * EACH)]
DIVISIONS: dict[str, Mapping[str, tuple[str, ...]]] = {
    "formed": {},
    "in turn": {f"edge-0.cluster-{index}": tuple(DEVICES[index::2]) for index in range(2)},
    "one kind each": {f"edge-0.cluster-{index}": tuple(DEVICES[EACH * index :][:EACH]) for index in range(2)},
}


def recipe_of(topology: Mapping[str, Any], clusters: int, slow: Mapping[str, float]) -> recipes.Recipe:
    """A run of so many clusters with equally many examples."""
    return recipes.from_table(
        {
            "name": "formed",
            "model": MODEL,
            "data": {
                "train": PER_CLUSTER * clusters,
                "partition": {"across_edges": "iid", "within_edge": "iid"},
            },
            "topology": {"edges": 1, "d2d": {"rtt_ms": 0.1, "mbit_per_s": 10_000}, **topology},
            "tuning": {
                "rounds": ROUNDS + WARM_UP,
                "local_epochs": 1,
                "batch_size": 32,
                "microbatches": 4,
                "augmentation": 0.0,
                "cloud_every": 0,
            },
            "evaluation": {"split": "none", "requests": 0},
            "faults": {"slow": slow},
        }
    )


async def round_s(recipe: recipes.Recipe) -> float:
    """The median of a run's rounds."""
    async with launch(recipe) as federation:
        records = [record async for record in federation.tune()]
    return statistics.median([record.wall_s for record in records][WARM_UP:])


def core_gflops() -> float:
    """What one core computes of this model's tuning, of a cluster of one device."""
    recipe = recipe_of({"clusters_per_edge": 1, "devices_per_cluster": 1}, 1, {})
    shape = announced_shape(recipe)
    flops = _flops(shape) * PER_CLUSTER
    return flops / asyncio.run(round_s(recipe)) / 1e9


def _flops(shape: ModelShape) -> float:
    """Of an example, forward and backward."""
    whole = Segment(0, shape.num_blocks, has_embedding=True, has_head=True)
    return forward_flops(shape, whole, 1) + backward_flops(shape, whole, 1)


def division(name: str, gflops: float) -> recipes.Recipe:
    """A run of the pool divided so."""
    slow = dict(zip(DEVICES, [FAST] * EACH + [SLOW] * EACH, strict=True))
    pool = [{"count": EACH, "gflops": gflops / times} for times in (FAST, SLOW)]
    return formed(recipe_of({"clusters_per_edge": 2, "pool": pool, "clusters": DIVISIONS[name]}, 2, slow))


def predicted_s(recipe: recipes.Recipe) -> float:
    """Seconds of a round: of the slowest cluster, whose batches follow each other, each through a pipeline."""
    tuning, plans = recipe.tuning, plan_clusters(recipe, announced_shape(recipe)).values()
    batches = PER_CLUSTER / tuning.batch_size
    return max(batches * (plan.traverse_s + (tuning.microbatches - 1) * plan.bottleneck_s) for plan in plans)


def main(repeats: int = 3) -> dict[str, Any]:
    """Measure, write benchmarks/results/formed_runs.json, and return it."""
    quiet = wait_until_quiet()
    gflops = core_gflops()
    runs = {name: division(name, gflops) for name in DIVISIONS}
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, recipe in runs.items():
            took[name].append(asyncio.run(round_s(recipe)))
        print({name: round(seconds[-1], 2) for name, seconds in took.items()}, flush=True)
    rows = {
        name: {
            "clusters": {cluster_id: list(ids) for cluster_id, ids in recipe.topology.clusters.items()},
            "cuts": {c: list(plan.cuts) for c, plan in plan_clusters(recipe, announced_shape(recipe)).items()},
            "predicted_s": round(predicted_s(recipe), 3),
            "measured_s": Spread.of(took[name]).to_dict(3),
            "times_as_long_as_formed": {
                "predicted": round(predicted_s(recipe) / predicted_s(runs["formed"]), 3),
                "measured": Spread.of([s / f for s, f in zip(took[name], took["formed"], strict=True)]).to_dict(3),
            },
        }
        for name, recipe in runs.items()
    }
    result = circumstances(("torch", "transformers", "scipy")) | {"others_before": quiet, "core_gflops": gflops}
    result["rows"] = rows
    write_result("formed_runs", result)
    return result


def lines(result: Mapping[str, Any]) -> list[str]:
    """The figures for people."""
    return [
        f"{name}: a round predicted {row['predicted_s']:.2f} s, measured {row['measured_s']['median']:.2f} s; "
        f"{row['times_as_long_as_formed']['predicted']:.2f} times as long as formed predicted, "
        f"{row['times_as_long_as_formed']['measured']['median']:.2f} measured"
        for name, row in result["rows"].items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    print("\n".join(lines(main(parser.parse_args().repeats))))
