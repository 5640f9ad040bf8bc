"""How soon a cluster's tuning is accurate, against plain split learning: `python -m benchmarks.time_to_accuracy`.

One edge, five clusters of three devices with 200 of scikit-learn's digits each, all nodes in one process, which two
cores keep busy: no microbatches, and nothing rounded. Plain split learning computes all tokens, sends them up and all
gradients down to the start device, anew in every epoch. Ours computes and sends what is frozen once (a few views an
image), CLS only in the last block, and no gradient below the tunables. Both choose where their tunables begin, and ours
its number of views, on validation digits of ten other seeds: what arrives with most of them, and of these the soonest.
Both are then run in turn for each seed; the clock, begun with the first order, stops at the first round that is as
accurate as the target.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from benchmarks.common import circumstances, wait_until_quiet, write_result
from benchmarks.curve import tuned
from ecogen.config import Recipe, load_study

TARGET = 0.97
GOAL_RATIO = 1.5
BASE = [
    "topology.clusters_per_edge=5",
    "data.train=1000",
    "data.validation=347",
    "data.partition.across_edges=iid",
    "data.partition.within_edge=iid",
    "tuning.rounds=15",
    "tuning.local_epochs=1",  # so that the time is known to an epoch
    "tuning.learning_rate_decay=0.9",
    "tuning.microbatches=1",
]
PLAIN = [["wire.tokens=all", "wire.gradients_to=start", f"tunables.first_block={first}"] for first in (1, 2, 3)]
OURS = [
    [f"tuning.augmentation_views={views}", f"tunables.first_block={first}"] for first in (2, 3) for views in (1, 2, 3)
]
KINDS = {"plain split learning": PLAIN, "ours": OURS}
CHOOSING_SEEDS = range(100, 110)


def run(changes: list[str], seed: int, split: str) -> dict[str, Any]:
    """One run: seconds to the target, None where it never was as accurate, and its best accuracy."""
    curve = tuned(_as_in_traffic([*BASE, *changes, f"seed={seed}", f"evaluation.split={split}"]), until=TARGET)
    return {"time_s": curve.time_to(TARGET), "rounds": len(curve.times_s), "best": round(max(curve.accuracies), 4)}


def _as_in_traffic(overrides: list[str]) -> Recipe:
    """The recipe of that study whose cases change nothing of it."""
    study = load_study("traffic", overrides)
    assert study is not None
    return next(row.recipe for row in study.rows if not row.case.change)


def choose(candidates: list[list[str]]) -> tuple[list[str], dict[str, Any]]:
    """The changes that arrive with most seeds on validation digits, of these the soonest; and all that was run."""
    rows = {}
    for changes in candidates:
        rows[" ".join(changes)] = [run(changes, seed, "validation") for seed in CHOOSING_SEEDS]
        print(changes, rows[" ".join(changes)], flush=True)

    def misses_and_mean_s(changes: list[str]) -> tuple[int, float]:
        times_s = [row["time_s"] for row in rows[" ".join(changes)]]
        arrived_s = [time_s for time_s in times_s if time_s is not None]
        return len(times_s) - len(arrived_s), statistics.mean(arrived_s or [0.0])

    return min(candidates, key=misses_and_mean_s), rows


def main(seeds: int = 5) -> dict[str, Any]:
    """Measure, write benchmarks/results/time_to_accuracy.json, and return it."""
    quiet, began_s = wait_until_quiet(), time.perf_counter()
    chosen = {name: choose(candidates) for name, candidates in KINDS.items()}
    rows = []
    for seed in range(seeds):
        rows.append({name: run(changes, seed, "test") for name, (changes, _) in chosen.items()})
        print(seed, rows[-1], flush=True)
    pairs = [(row["plain split learning"]["time_s"], row["ours"]["time_s"]) for row in rows]
    ratios = [plain / ours for plain, ours in pairs if plain and ours]
    result = circumstances(("torch", "transformers", "peft")) | {
        "others_before": quiet,
        "wall_s": round(time.perf_counter() - began_s, 1),
        "target": TARGET,
        "chosen": {name: changes for name, (changes, _) in chosen.items()},
        "validation": {name: tried for name, (_, tried) in chosen.items()},
        "rows": rows,
        "reached": {name: sum(row[name]["time_s"] is not None for row in rows) for name in KINDS},
        "times_shorter": {"median": statistics.median(ratios), "least": min(ratios)} if ratios else None,
    }
    is_met = len(ratios) == len(rows) and statistics.median(ratios) >= GOAL_RATIO
    result["goals"] = {f"median time to {TARGET} at least {GOAL_RATIO} times shorter, in every seed reached": is_met}
    write_result("time_to_accuracy", result)
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    times, reached, seeds = result["times_shorter"], result["reached"], len(result["rows"])
    text = [f"{name}: {', '.join(changes)}" for name, changes in result["chosen"].items()]
    text += [f"{name}: {count} of {seeds} seeds reached {result['target']}" for name, count in reached.items()]
    if times:
        text.append(f"time to it {times['median']:.2f} times shorter in the median, at least {times['least']:.2f}")
    return [*text, *(f"{'reached' if met else 'MISSED'}: {goal}" for goal, met in result["goals"].items())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    print("\n".join(lines(main(parser.parse_args().seeds))))
