"""How well the built-in digits recipe tunes, over seeds: `python -m benchmarks.accuracy`.

The recipe as it is, through the real `inproc` engine, and the same with only a head; with the training data divided
unevenly over the edges (Dirichlet 0.5), the federation and the same edges each alone; and, on the same images and
splits but with all training data in one place, nearest neighbour and a support vector machine. Each seed is a split, a
partition and a start of its own; comparisons are paired over seeds.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass
from typing import Any

from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

from benchmarks.common import circumstances, cpu_pressure, write_result
from ecogen import config as recipes
from ecogen.engines.launch import launch
from ecogen.models.adapters import classification_config, load_whole
from ecogen.models.tunables import named_tunables
from ecogen.records import RoundRecord
from ecogen.tuning.data import load_splits
from ecogen.tuning.foundation import obtain_foundation
from ecogen.tuning.probe import probe_foundation

GOAL_MEAN, GOAL_WORST, GOAL_PROBE = 0.97, 0.955, 0.10

UNEVEN = ["data.partition.across_edges=dirichlet", "data.partition.alpha=0.5"]
EDGES_ALONE = [*UNEVEN, "tuning.cloud_every=0"]
HEAD_ONLY = ["tunables.prompts=0", "tunables.lora_rank=0"]


@dataclass(frozen=True)
class Curve:
    """Test accuracy after the first and the last round of one aggregating node."""

    first: float
    last: float

    @classmethod
    def of(cls, records: list[RoundRecord], node_id: str) -> Curve:
        """Of the rounds of one node."""
        own = [r.accuracy for r in records if r.node_id == node_id and r.accuracy is not None]
        return cls(own[0], own[-1])


async def tune(recipe: recipes.Recipe) -> list[RoundRecord]:
    """All rounds of a federation."""
    async with launch(recipe) as federation:
        return [record async for record in federation.tune()]


def curves(seed: int, overrides: list[str], node_ids: list[str]) -> list[Curve]:
    """The curves of some nodes in one run of the recipe."""
    records = asyncio.run(tune(recipes.load("digits", [f"seed={seed}", "engine=inproc", *overrides])))
    return [Curve.of(records, node_id) for node_id in node_ids]


def classical(seed: int) -> dict[str, float]:
    """Test accuracy of classifiers on pixels, with all training data in one place."""
    recipe = recipes.load("digits", [f"seed={seed}"])
    splits = load_splits(recipe.data, recipe.model.image_size, seed)
    (train, labels), (test, truth) = (
        (s.images.flatten(1).numpy(), s.labels.numpy()) for s in (splits.train, splits.test)
    )
    contenders = {"1-NN": KNeighborsClassifier(1), "SVM (RBF, C=10)": SVC(C=10)}
    return {name: float(model.fit(train, labels).score(test, truth)) for name, model in contenders.items()}


def probes(seeds: list[int]) -> dict[str, list[float]]:
    """Validation accuracy of a linear probe with 200 labels on the foundation model, and on the same one untrained."""
    foundation, _ = obtain_foundation(recipes.load("digits"), lambda *_: None)
    found = [probe_foundation(foundation, recipes.load("digits", [f"seed={seed}"])) for seed in seeds]
    made = [probe for probe in found if probe is not None]
    return {"pre-trained": [probe.trained for probe in made], "untrained": [probe.untrained for probe in made]}


def fraction_tuned() -> dict[str, float]:
    """How much of the model trains and travels."""
    recipe = recipes.load("digits")
    foundation, _ = obtain_foundation(recipe, lambda *_: None)
    model = load_whole(foundation, classification_config(foundation, 10), recipe.tunables, recipe.seed)
    tuned = sum(parameter.numel() for _, parameter in named_tunables(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"tunable": tuned, "total": total, "fraction": round(tuned / total, 5)}


def measure(seeds: list[int], base: list[str]) -> dict[str, list[float]]:
    """Accuracies of all contenders, one a seed."""
    edge_ids = recipes.build_topology(recipes.load("digits", base).topology).edge_ids
    scores: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        scores.setdefault(name, []).append(value)

    for seed in seeds:
        began_s = time.perf_counter()
        [cloud] = curves(seed, base, ["cloud"])
        note("federated, first round", cloud.first)
        note("federated, last round", cloud.last)
        [uneven] = curves(seed, [*base, *UNEVEN], ["cloud"])
        note("federated, uneven edges, last round", uneven.last)
        for edge_id, edge in zip(edge_ids, curves(seed, [*base, *EDGES_ALONE], edge_ids), strict=True):
            note(f"{edge_id} alone, uneven edges, last round", edge.last)
        [head] = curves(seed, [*base, *HEAD_ONLY], ["cloud"])
        note("head only, last round", head.last)
        for name, score in classical(seed).items():
            note(name, score)
        own = {name: round(values[-1], 4) for name, values in scores.items()}
        print(f"seed {seed}, {time.perf_counter() - began_s:.0f} s: {own}", flush=True)
    return scores


def summary(values: list[float]) -> dict[str, Any]:
    """Mean, deviation, least, and all."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    numbers = {"mean": statistics.mean(values), "sd": deviation, "min": min(values)}
    return {name: round(number, 4) for name, number in numbers.items()} | {"seeds": [round(v, 4) for v in values]}


def paired(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """How far we are above, seed by seed."""
    above = [our - their for our, their in zip(ours, theirs, strict=True)]
    return summary(above) | {"wins": sum(a > 0 for a in above), "of": len(above)}


def main(seeds: int = 5, base: tuple[str, ...] = (), *, first_seed: int = 0) -> dict[str, Any]:
    """Measure, write benchmarks/results/accuracy.json, and return it. A busy machine changes nothing but the time."""
    pressure, began_s = cpu_pressure(), time.perf_counter()
    parameters = fraction_tuned()  # pre-trains, where no run has done it yet
    numbers = list(range(first_seed, first_seed + seeds))
    scores = measure(numbers, list(base))
    ours = scores["federated, last round"]
    uneven = scores["federated, uneven edges, last round"]
    rivals = {
        name: paired(uneven if "alone" in name else ours, own)
        for name, own in scores.items()
        if not name.startswith("federated")
    }
    probed = probes(numbers)
    gain = paired(probed["pre-trained"], probed["untrained"])
    goals = {
        "linear probe above untrained": {"at_least": GOAL_PROBE, "reached": gain["min"] >= GOAL_PROBE},
        "mean of the last round": {"at_least": GOAL_MEAN, "reached": statistics.mean(ours) >= GOAL_MEAN},
        "worst last round": {"at_least": GOAL_WORST, "reached": min(ours) >= GOAL_WORST},
        "above each edge alone": {"reached": all(r["mean"] > 0 for n, r in rivals.items() if "alone" in n)},
        "above head only": {"reached": rivals["head only, last round"]["mean"] > 0},
    }
    result = circumstances(("torch", "transformers", "peft", "scikit-learn")) | {
        "cpu_pressure_percent": pressure,
        "wall_s": round(time.perf_counter() - began_s, 1),
        "overrides": list(base),
        "seeds": numbers,
        "parameters": parameters,
        "test_accuracy": {name: summary(values) for name, values in scores.items()},
        "federated_minus": rivals,
        "linear_probe": {name: summary(values) for name, values in probed.items()} | {"gain": gain},
        "goals": goals,
    }
    write_result("accuracy", result)
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    text = [
        f"{name}: mean {row['mean']:.4f}, sd {row['sd']:.4f}, least {row['min']:.4f}"
        for name, row in result["test_accuracy"].items()
    ]
    text += [f"linear probe, {name}: mean {row['mean']:.4f}" for name, row in result["linear_probe"].items()]
    text += [f"goal, {name}: {'reached' if goal['reached'] else 'MISSED'}" for name, goal in result["goals"].items()]
    return [*text, f"tunable: {result['parameters']['fraction']:.2%} of {result['parameters']['total']:,} parameters"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the recipe")
    options = parser.parse_args()
    print("\n".join(lines(main(options.seeds, tuple(options.set), first_seed=options.first_seed))))
