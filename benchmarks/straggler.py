"""One device ten times slower: how soon FedBuff is as accurate as a synchronous edge: `python -m benchmarks.straggler`.

One edge, six clusters of two devices, on scikit-learn's digits. Each device computes at a fifth of a core's speed, the
second one of the first cluster at a fiftieth, by sleeping after each computation (`faults.slow`): two cores are enough
for all twelve, and what is waited for is the straggler and not a core. A synchronous round lasts as long as that
cluster; with `aggregation.buffer` the others go on. For each seed both are run in turn; the target is the accuracy of
the synchronous run's last round, and the clock, begun with the first order, stops at the first round that has it, in
both. Rounds, buffer, server rate and decay of FedBuff were chosen on validation digits of seeds 102 to 105.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from benchmarks.common import circumstances, wait_until_quiet, write_result
from benchmarks.curve import tuned
from ecogen import config as recipes

DEVICES = [f"edge-0.cluster-{cluster}.device-{device}" for cluster in range(6) for device in range(2)]
STRAGGLER = "edge-0.cluster-0.device-1"
EACH, TIMES_SLOWER = 5.0, 10.0  # a device is so many times slower than a core, and the straggler than a device
BASE: dict[str, Any] = {
    "name": "straggler",
    "data": {"train": 1200, "validation": 147, "test": 450, "partition": {"across_edges": "iid", "within_edge": "iid"}},
    "topology": {"edges": 1, "clusters_per_edge": 6, "devices_per_cluster": 2},
    "tuning": {
        "rounds": 8,
        "local_epochs": 1,
        "batch_size": 20,
        "learning_rate": 0.02,  # this and epsilon as table3 has them
        "learning_rate_decay": 0.8,
        "epsilon": 0.01,
        "cloud_every": 0,
    },
    "evaluation": {"requests": 0},
    "faults": {"slow": dict.fromkeys(DEVICES, EACH) | {STRAGGLER: EACH * TIMES_SLOWER}},
}
FEDBUFF: dict[str, Any] = {"aggregation": {"buffer": 5, "server_rate": 1.0}}
FEDBUFF["tuning"] = {**BASE["tuning"], "rounds": 24, "learning_rate_decay": 0.9}
NAMES = ("synchronous", "fedbuff")
GOAL_RATIO = 0.5


def compare(seed: int) -> dict[str, Any]:
    """Both runs of a seed, against the synchronous one's last accuracy."""
    synchronous, fedbuff = (tuned(recipes.from_table({**BASE, "seed": seed, **own})) for own in ({}, FEDBUFF))
    target = synchronous.accuracies[-1]
    row: dict[str, Any] = {"seed": seed, "target": round(target, 4)}
    for name, curve in zip(NAMES, (synchronous, fedbuff), strict=True):
        row[name] = {"time_s": curve.time_to(target), "whole_run_s": curve.times_s[-1]}
        row[name] |= {"accuracies": [round(accuracy, 4) for accuracy in curve.accuracies]}
    print({key: row[key] for key in ("seed", "target")}, *(row[name]["time_s"] for name in NAMES), flush=True)
    return row


def main(seeds: int = 5) -> dict[str, Any]:
    """Measure, write benchmarks/results/straggler.json, and return it."""
    quiet, began_s = wait_until_quiet(), time.perf_counter()
    rows = [compare(seed) for seed in range(seeds)]
    reached = [row for row in rows if row["fedbuff"]["time_s"] is not None]
    ratios = [row["fedbuff"]["time_s"] / row["synchronous"]["time_s"] for row in reached]
    result = circumstances(("torch", "transformers", "peft")) | {
        "others_before": quiet,
        "wall_s": round(time.perf_counter() - began_s, 1),
        "recipe": BASE,
        "fedbuff": FEDBUFF,
        "rows": rows,
        "last_mean": {name: round(statistics.mean(row[name]["accuracies"][-1] for row in rows), 4) for name in NAMES},
        "ratio_mean": round(statistics.mean(ratios), 3) if ratios else None,
        "ratio_worst": round(max(ratios), 3) if len(reached) == len(rows) else None,
        "reached": len(reached),
    }
    goal = f"mean time to the synchronous accuracy at most {GOAL_RATIO:g} of its time, in every seed reached"
    result["goals"] = {goal: len(reached) == len(rows) and result["ratio_mean"] <= GOAL_RATIO}
    write_result("straggler", result)
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    last = result["last_mean"]
    text = [
        f"time to the synchronous run's accuracy, FedBuff over synchronous: mean {result['ratio_mean']}, worst "
        f"{result['ratio_worst']}; reached in {result['reached']} of {len(result['rows'])} seeds",
        f"in the last round: synchronous {last['synchronous']:.4f}, FedBuff {last['fedbuff']:.4f}",
    ]
    return [*text, *(f"{'reached' if met else 'MISSED'}: {goal}" for goal, met in result["goals"].items())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    print("\n".join(lines(main(parser.parse_args().seeds))))
