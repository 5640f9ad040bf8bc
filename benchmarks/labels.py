"""Two edges of five digits each: is it better to share all but the heads, or nothing? `python -m benchmarks.labels`

The digits recipe with 300 training images, few enough for sharing to matter, through the real `inproc` engine: once
with the cloud's average of everything but the heads after every round, once with each edge alone. What is compared are
the saved models, each edge's on the test images of its own digits. Each seed is a split, a partition and a start of its
own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import circumstances, cpu_pressure, write_result
from ecogen import config as recipes
from ecogen.engines.launch import launch
from ecogen.engines.saving import FACTS

BASE = [
    "data.train=300",
    "data.test=450",
    "data.labels_of_edges.edge-0=[0, 1, 2, 3, 4]",
    "data.labels_of_edges.edge-1=[5, 6, 7, 8, 9]",
    "topology.clusters_per_edge=2",
    "topology.devices_per_cluster=1",
    "tuning.rounds=6",
    "evaluation.requests=0",
    "evaluation.inversion=false",
]
CASES = {"shared but for the heads": ["tuning.cloud_every=1"], "each edge alone": ["tuning.cloud_every=0"]}


async def tune(recipe: recipes.Recipe, folder: Path) -> dict[str, float]:
    """Accuracy of each edge's saved model."""
    async with launch(recipe) as federation:
        async for _ in federation.tune():
            pass
        await federation.save(folder)
    facts = json.loads((folder / FACTS).read_text())
    counts, accuracies = facts["num_evaluated"], facts["saved_accuracy"]
    mean = sum(counts[edge] * accuracies[edge] for edge in counts) / sum(counts.values())
    return {"mean": mean, **accuracies}


def carry_out(seed: int, overrides: list[str], base: list[str]) -> dict[str, float]:
    """One seed of one case."""
    with tempfile.TemporaryDirectory(prefix="ecogen-labels-") as folder:
        recipe = recipes.load("digits", [*BASE, *base, f"seed={seed}", *overrides])
        return asyncio.run(tune(recipe, Path(folder)))


def main(seeds: int = 5, first_seed: int = 0, base: tuple[str, ...] = ()) -> dict[str, Any]:
    """Measure, write benchmarks/results/labels.json, and return it. A busy machine changes nothing but the time."""
    pressure, began_cpu_s = cpu_pressure(), time.process_time()
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    for seed in range(first_seed, first_seed + seeds):
        for name, overrides in CASES.items():
            scores[name].append(carry_out(seed, overrides, list(base)))
        print(f"seed {seed}: " + ", ".join(f"{name} {own[-1]['mean']:.4f}" for name, own in scores.items()), flush=True)
    shared, alone = ([run["mean"] for run in own] for own in scores.values())
    gains = [one - other for one, other in zip(shared, alone, strict=True)]
    result = circumstances(("torch", "transformers", "peft")) | {
        "cpu_pressure_percent": pressure,
        "cpu_s": round(time.process_time() - began_cpu_s, 1),
        "overrides": [*BASE, *base],
        "seeds": list(range(first_seed, first_seed + seeds)),
        "test_accuracy": {name: summary([run["mean"] for run in own]) for name, own in scores.items()},
        "by_edge": scores,
        "gain_of_sharing": summary(gains) | {"wins": sum(g > 0 for g in gains), "losses": sum(g < 0 for g in gains)},
    }
    write_result("labels", result)
    return result


def summary(values: list[float]) -> dict[str, Any]:
    """Mean, deviation, and all."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {
        "mean": round(statistics.mean(values), 4),
        "sd": round(deviation, 4),
        "seeds": [round(v, 4) for v in values],
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    text = [f"{name}: {row['mean']:.4f} (sd {row['sd']:.4f})" for name, row in result["test_accuracy"].items()]
    gain = result["gain_of_sharing"]
    text.append(
        f"gain of sharing: {gain['mean']:+.4f} (sd {gain['sd']:.4f}), {gain['wins']} won, {gain['losses']} lost"
    )
    return [*text, f"CPU {result['cpu_s']:.0f} s"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the recipe")
    options = parser.parse_args()
    print("\n".join(lines(main(options.seeds, options.first_seed, tuple(options.set)))))
