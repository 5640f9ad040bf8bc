"""What differential privacy of clusters costs: `python -m benchmarks.private [--seeds 5]`.

The built-in recipe `private` through the real `inproc` engine; the same without noise and clipping; and the same noise
and data with six clusters, where privacy leaves nothing. Each seed is a split and a partition; the noise, and who takes
part where there is noise, are never the same twice.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from benchmarks.common import circumstances, cpu_pressure, write_result
from ecogen import config as recipes
from ecogen.config.nodes import cluster_counts
from ecogen.engines.launch import launch
from ecogen.records import RoundRecord

CASES = {
    "240 clusters, private": [],
    "240 clusters, neither clipped nor noised": ["privacy.noise_multiplier=0"],
    "6 clusters, private": ["topology.clusters_per_edge=6"],
}
GOAL_EPSILON, GOAL_CLUSTERS = 10.0, 200


@dataclass(frozen=True)
class Run:
    """One run: test accuracy by round, epsilon in the end, and what it took."""

    accuracies: list[float]
    epsilon: float | None
    num_clusters: int
    wall_s: float
    cpu_s: float
    peak_memory_mib: int


async def tune(recipe: recipes.Recipe) -> list[RoundRecord]:
    """All rounds of a federation."""
    async with launch(recipe) as federation:
        return [record async for record in federation.tune()]


def carry_out(seed: int, overrides: list[str]) -> Run:
    """One seed of one case."""
    recipe = recipes.load("private", [f"seed={seed}", *overrides])
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    records = asyncio.run(tune(recipe))
    took = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    accuracies = [record.accuracy for record in records if record.accuracy is not None]
    memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return Run(accuracies, records[-1].epsilon, sum(cluster_counts(recipe.topology)), *took, memory_mib)


def summary(runs: list[Run]) -> dict[str, Any]:
    """Means and deviations over seeds."""
    lasts = [run.accuracies[-1] for run in runs]
    return {
        "clusters": runs[0].num_clusters,
        "epsilon": None if runs[0].epsilon is None else round(runs[0].epsilon, 4),
        "last_mean": round(statistics.mean(lasts), 4),
        "last_sd": round(statistics.stdev(lasts), 4) if len(lasts) > 1 else 0.0,
        "last": [round(value, 4) for value in lasts],
        "by_round": [round(statistics.mean(row), 4) for row in zip(*(run.accuracies for run in runs), strict=True)],
        "wall_s": round(statistics.mean(run.wall_s for run in runs), 1),
        "cpu_s": round(statistics.mean(run.cpu_s for run in runs), 1),
        "peak_memory_mib": max(run.peak_memory_mib for run in runs),
    }


def main(seeds: int = 5, first_seed: int = 0, at_once: int = 1) -> dict[str, Any]:
    """Measure, write benchmarks/results/private.json after each seed, and return it.

    A busy machine changes nothing but the time.
    """
    pressure = cpu_pressure()
    runs: dict[str, list[Run]] = {name: [] for name in CASES}
    result: dict[str, Any] = {}
    with ProcessPoolExecutor(at_once, get_context("spawn"), max_tasks_per_child=1) as pool:
        numbers = range(first_seed, first_seed + seeds)
        started = {(seed, name): pool.submit(carry_out, seed, CASES[name]) for seed in numbers for name in CASES}
        for seed in numbers:
            for name in CASES:
                run = started[seed, name].result()
                runs[name].append(run)
                print(f"seed {seed}, {name}: {run.accuracies[-1]:.4f}, CPU {run.cpu_s:.0f} s", flush=True)
            result = conclude(runs, list(range(first_seed, seed + 1))) | {"cpu_pressure_percent": pressure}
            write_result("private", result | {"at_once": at_once})
    return result


def conclude(runs: dict[str, list[Run]], seeds: list[int]) -> dict[str, Any]:
    """The figures of some seeds."""
    private, plain = (runs[name] for name in list(CASES)[:2])
    lost = [p.accuracies[-1] - q.accuracies[-1] for p, q in zip(plain, private, strict=True)]
    return circumstances(("torch", "transformers", "peft", "opacus")) | {
        "seeds": seeds,
        "test_accuracy": {name: summary(own) for name, own in runs.items()},
        "lost_to_privacy": {"mean": round(statistics.mean(lost), 4), "seeds": [round(value, 4) for value in lost]},
        "goals": {
            "at least 200 clusters": private[0].num_clusters >= GOAL_CLUSTERS,
            "epsilon at most 10": all(run.epsilon is not None and run.epsilon <= GOAL_EPSILON for run in private),
        },
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    text = [
        f"{name}: {row['last_mean']:.4f} (sd {row['last_sd']:.4f})"
        + (f", epsilon {row['epsilon']:.2f}" if row["epsilon"] else "")
        + f"; {row['wall_s']:.0f} s, CPU {row['cpu_s']:.0f} s, {row['peak_memory_mib']} MiB a run"
        for name, row in result["test_accuracy"].items()
    ]
    text.append(f"lost to privacy: {result['lost_to_privacy']['mean']:.4f}, {len(result['seeds'])} seeds")
    return [*text, *(f"{'reached' if met else 'MISSED'}: {goal}" for goal, met in result["goals"].items())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time, each a process")
    options = parser.parse_args()
    print("\n".join(lines(main(options.seeds, options.first_seed, options.at_once))))
