"""One device ten times slower: how soon FedBuff is as accurate as a synchronous edge: `python -m benchmarks.straggler`.

One edge, six clusters of two devices, on scikit-learn's digits. Each device computes at a third of a core's speed,
the second one of the first cluster at a thirtieth, by sleeping after each computation (`faults.slow`): two cores are
enough for all twelve, and what is waited for is the straggler and not a core. A synchronous round lasts as long as that
cluster; with `aggregation.buffer` the others go on. For each seed both are run in turn; the target is the accuracy of
the synchronous run's last round, and the clock, begun with the first order, stops at the first round that has it, in
both. What FedBuff is run with is chosen first, on validation digits and with other seeds, among the candidates below.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from benchmarks.common import circumstances, wait_until_quiet, write_result
from benchmarks.curve import Curve, tuned
from ecogen import config as recipes

DEVICES = [f"edge-0.cluster-{cluster}.device-{device}" for cluster in range(6) for device in range(2)]
STRAGGLER = "edge-0.cluster-0.device-1"
EACH, TIMES_SLOWER = 3.0, 10.0  # a device is so many times slower than a core, and the straggler than a device
BASE: dict[str, Any] = {
    "name": "straggler",
    "data": {"train": 600, "validation": 747, "test": 450, "partition": {"across_edges": "iid", "within_edge": "iid"}},
    "topology": {"edges": 1, "clusters_per_edge": 6, "devices_per_cluster": 2},
    "tuning": {
        "rounds": 8,
        "local_epochs": 2,
        "batch_size": 20,
        "learning_rate": 0.02,  # this and epsilon as table3 has them
        "learning_rate_decay": 0.8,
        "epsilon": 0.01,
        "cloud_every": 0,
    },
    "evaluation": {"requests": 0},
    "faults": {"slow": dict.fromkeys(DEVICES, EACH) | {STRAGGLER: EACH * TIMES_SLOWER}},
}
CANDIDATES = {
    f"buffer {size}, server rate {rate:g}": {"buffer": size, "rate": rate, "decay": decay}
    for size, rate, decay in ((3, 0.6, 0.9), (5, 0.6, 0.9), (5, 1.0, 0.85))
}
UPDATES_EACH = 3
"""FedBuff may use so many times the updates of the synchronous run, which ends it where it never arrives."""

CHOOSING_SEEDS = (100, 101)
GOAL_RATIO = 0.5


def run(seed: int, split: str, *, buffer: int = 0, decay: float = 0.0, rate: float = 0.0) -> Curve:
    """One federation; a buffer of 0 is synchronous."""
    table = {**BASE, "seed": seed, "evaluation": {**BASE["evaluation"], "split": split}}
    if buffer:
        rounds = BASE["tuning"]["rounds"] * BASE["topology"]["clusters_per_edge"] * UPDATES_EACH // buffer
        table["tuning"] = {**BASE["tuning"], "rounds": rounds, "learning_rate_decay": decay}
        table["aggregation"] = {"buffer": buffer, "server_rate": rate}
    return tuned(recipes.from_table(table))


def compare(seed: int, split: str, contenders: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The synchronous run and others of a seed, all against its last accuracy."""
    synchronous = run(seed, split)
    target = synchronous.accuracies[-1]
    row: dict[str, Any] = {"seed": seed, "target": round(target, 4), "synchronous_s": synchronous.time_to(target)}
    for name, settings in contenders.items():
        curve = run(seed, split, **settings)
        row[name] = {"time_s": curve.time_to(target), "last": round(curve.accuracies[-1], 4)}
        row[name]["whole_run_s"] = curve.times_s[-1]
    row["synchronous_whole_run_s"] = synchronous.times_s[-1]
    print(row, flush=True)
    return row


def choose() -> tuple[str, list[dict[str, Any]]]:
    """The candidate that was soonest on validation digits, and all that was run for it."""
    rows = [compare(seed, "validation", CANDIDATES) for seed in CHOOSING_SEEDS]

    def ratio(name: str) -> float:
        times = [(row[name]["time_s"] or float("inf")) / row["synchronous_s"] for row in rows]
        return statistics.mean(times)

    return min(CANDIDATES, key=ratio), rows


def main(seeds: int = 5) -> dict[str, Any]:
    """Measure, write benchmarks/results/straggler.json, and return it."""
    quiet, began_s = wait_until_quiet(), time.perf_counter()
    chosen, validation = choose()
    rows = [compare(seed, "test", {"fedbuff": CANDIDATES[chosen]}) for seed in range(seeds)]
    reached = [row for row in rows if row["fedbuff"]["time_s"] is not None]
    ratios = [row["fedbuff"]["time_s"] / row["synchronous_s"] for row in reached]
    result = circumstances(("torch", "transformers", "peft")) | {
        "others_before": quiet,
        "wall_s": round(time.perf_counter() - began_s, 1),
        "chosen": chosen,
        "validation": validation,
        "rows": rows,
        "target_mean": round(statistics.mean(row["target"] for row in rows), 4),
        "fedbuff_last_mean": round(statistics.mean(row["fedbuff"]["last"] for row in rows), 4),
        "ratio_mean": round(statistics.mean(ratios), 3) if ratios else None,
        "ratio_worst": round(max(ratios), 3) if len(reached) == len(rows) else None,
        "reached": len(reached),
    }
    result["goals"] = {
        f"mean time to the synchronous accuracy at most {GOAL_RATIO:g} of its time, in every seed reached": len(reached)
        == len(rows)
        and result["ratio_mean"] <= GOAL_RATIO
    }
    write_result("straggler", result)
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    text = [
        f"chosen on validation digits: {result['chosen']}",
        f"time to the synchronous run's accuracy, FedBuff over synchronous: mean {result['ratio_mean']}, worst "
        f"{result['ratio_worst']}; reached in {result['reached']} of {len(result['rows'])} seeds",
        f"synchronous {result['target_mean']:.4f}, FedBuff at the end of its run {result['fedbuff_last_mean']:.4f}",
    ]
    return [*text, *(f"{'reached' if met else 'MISSED'}: {goal}" for goal, met in result["goals"].items())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    print("\n".join(lines(main(parser.parse_args().seeds))))
