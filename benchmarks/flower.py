"""Tuning the same tunables federated, here and in Flower, end to end: `python -m benchmarks.flower`.

Four clients own the digits and each has the whole model; prompts, LoRA and head are tuned, averaged and tested for some
rounds. Model, tunables, partition, batches, augmentation, optimizer and evaluation are the same and from the same code
(`flower_job`), so the same seed must give nearly the same tunables everywhere: that is checked. Beside it, EcoGen with
each model split over three devices, which Flower has not. All take turns; each starts from nothing.

Flower runs `flwr run` on a SuperLink: in its simulation (Ray), and deployed with a SuperNode a client. Every process is
this machine's and talks on loopback. Joules are modelled for all by the same formula from the CPU seconds of all
processes; nothing here measures power.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import Spread, circumstances, peer_environment, pinned, wait_until_quiet, write_result
from benchmarks.cpu_clock import CpuClock, adopt_orphans
from benchmarks.flower_launch import Flower, run_app
from ecogen import config as recipes
from ecogen.accounting.bill import Bounds
from ecogen.accounting.constants import Constants
from ecogen.accounting.energy import cpu_energy, idle_energy
from ecogen.accounting.ledger import settle
from ecogen.engines.launch import launch
from ecogen.models.checkpoint import load_tensors, save_tensors
from ecogen.tuning.foundation import obtain_foundation

FLOWER = "flwr[simulation]==1.41.0"
# What EcoGen's functions for tuning import, in the project's versions where Flower's own pins allow them.
PACKAGES = ["transformers", "peft", "scikit-learn", "numpy", "safetensors", "msgspec", "pydantic", "matplotlib"]
CLIENTS = 4
SAME = 1e-3
"""How far tunables of the same seed may be apart, relative to their norm: float32 sums in another order."""

COMMON = [
    "topology.sites={}",
    "topology.edges=1",
    f"topology.clusters_per_edge={CLIENTS}",
    "tuning.cloud_every=0",
    "evaluation.split=test",
    "evaluation.requests=0",
    "evaluation.inversion=false",
]
WHOLE = ["topology.devices_per_cluster=1", "tuning.microbatches=1"]
SPLIT = ["topology.devices_per_cluster=3", "tuning.microbatches=2"]


@dataclass(frozen=True)
class Run:
    """One run of one contender.

    Attributes:
        wall_s: from its launch to the last evaluated round.
        first_s: from its launch to the first evaluated round.
        periods_s: from each evaluated round to the next.
        cpu_s: of all processes it started, to their end.
        sent_bytes: of tunables, between server and clients, both ways, with headers.
        other_bytes: of the rest that was counted: for EcoGen activations, gradients, the backbone's delivery, control.
        accuracies: on the test examples, after each round.
        tunables: the file of the last average.
    """

    wall_s: float
    first_s: float
    periods_s: list[float]
    cpu_s: float
    sent_bytes: int
    other_bytes: dict[str, int]
    accuracies: list[float]
    tunables: Path

    @classmethod
    def of(cls, began_s: float, cpu_s: float, report: dict[str, Any], tunables: Path) -> Run:
        """From what a contender reported, times in seconds since the epoch."""
        ends_s, traffic = report["ends_s"], report["other_bytes"]
        periods_s = [after - before for before, after in pairwise(ends_s)]
        first_s, wall_s = ends_s[0] - began_s, ends_s[-1] - began_s
        return cls(wall_s, first_s, periods_s, cpu_s, report["sent_bytes"], traffic, report["accuracies"], tunables)


def run_ecogen(recipe: recipes.Recipe, folder: Path) -> Run:
    """A federation, launched by a process of its own."""
    table = folder / "recipe.json"
    table.write_text(json.dumps(recipes.to_table(recipe)))
    began_s = time.time()
    with CpuClock.running() as clock:
        command = [sys.executable, "-m", "benchmarks.flower", "--worker", str(table)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Run.of(began_s, clock.cpu_s, json.loads(done.stdout.splitlines()[-1]), folder / "tunables.safetensors")


async def federate(recipe: recipes.Recipe, folder: Path) -> dict[str, Any]:
    """What that process does: all rounds; returns the report."""
    async with launch(recipe, folder=folder / "run") as federation:
        rounds = [record async for record in federation.tune()]
        save_tensors(folder / "tunables.safetensors", await federation.tunables())
    if any(len(record.members) != CLIENTS for record in rounds):
        raise RuntimeError("a cluster was lost: the machine is too busy to measure on")
    ledger = settle(federation.records, federation.topology)
    sent = {kind: count for kind, count in ledger.traffic_by_kind().items() if count}
    between = (line for line in ledger.traffic() if line.link_class == "edge_end" and line.kind == "tunables")
    tunables = sum(line.sent_bytes for line in between)
    return {
        "ends_s": [record.time_s for record in rounds],
        "accuracies": [record.accuracy for record in rounds],
        "sent_bytes": tunables,
        "other_bytes": sent | {"tunables": sent["tunables"] - tunables},
    }


def run_flower(flower: Flower, recipe: recipes.Recipe, folder: Path) -> Run:
    """Flower, launched with a SuperLink of its own."""
    table = folder / "recipe.json"
    table.write_text(json.dumps(recipes.to_table(recipe)))
    began_s = time.time()
    with CpuClock.running() as clock:
        settings = {"recipe": str(table), "out": str(folder)}
        rounds = run_app(flower, folder, CLIENTS, recipe.tuning.rounds, settings)
    report = {
        "ends_s": [line["time_s"] for line in rounds],
        "accuracies": [line["accuracy"] for line in rounds],
        "sent_bytes": rounds[-1]["message_bytes"],
        "other_bytes": {},
    }
    return Run.of(began_s, clock.cpu_s, report, folder / "tunables.safetensors")


# What takes turns.


def contenders(python: Path, source: Path, overrides: Sequence[str]) -> dict[str, Callable[[int, Path], Run]]:
    """By name, what runs with a seed in a folder."""

    def recipe(seed: int, *own: str) -> recipes.Recipe:
        loaded = recipes.load("digits", [*COMMON, *overrides, *own, f"seed={seed}"])
        return replace(loaded, model=replace(loaded.model, source=str(source)))

    def ecogen(*own: str) -> Callable[[int, Path], Run]:
        return lambda seed, folder: run_ecogen(recipe(seed, *own), folder)

    def flower(*, is_deployed: bool, is_fast: bool) -> Callable[[int, Path], Run]:
        return lambda seed, folder: run_flower(Flower(python, is_deployed, is_fast), recipe(seed, *WHOLE), folder)

    return {
        "ecogen inproc": ecogen("engine=inproc", *WHOLE),
        "ecogen local": ecogen("engine=local", *WHOLE),
        "ecogen local, models split over 3 devices": ecogen("engine=local", *SPLIT),
        "flower simulation, default": flower(is_deployed=False, is_fast=False),
        "flower simulation, fastest": flower(is_deployed=False, is_fast=True),
        "flower deployment, default": flower(is_deployed=True, is_fast=False),
        "flower deployment, fastest": flower(is_deployed=True, is_fast=True),
    }


def turn(todo: dict[str, Callable[[int, Path], Run]], seed: int) -> tuple[dict[str, Run], dict[str, float]]:
    """One run of each, and how far each one's tunables are from the first one's."""
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory(prefix="ecogen-flower-") as directory:
        for number, (name, run) in enumerate(todo.items()):
            folder = Path(directory) / str(number)
            folder.mkdir()
            runs[name] = run(seed, folder)
            own = runs[name]
            print(
                f"{name:42s} {own.wall_s:7.1f} s {statistics.median(own.periods_s):7.2f} s a round "
                f"{own.cpu_s:7.1f} CPU s, accuracy {own.accuracies[-1]:.4f}",
                flush=True,
            )
        first = next(iter(runs.values()))
        return runs, {name: distance(first.tunables, run.tunables) for name, run in runs.items()}


def distance(ours: Path, theirs: Path) -> float:
    """|ours - theirs| / |ours|, over all tunables."""
    mine, other = load_tensors(ours), load_tensors(theirs)
    difference = sum(float((mine[name] - other[name]).double().square().sum()) for name in mine)
    return float((difference / sum(float(value.double().square().sum()) for value in mine.values())) ** 0.5)


def energy(run: Run) -> Bounds:
    """Joules, modelled: CPU seconds at the profile's busy watts, all other seconds of all cores at its idle watts."""
    device, constants = recipes.DeviceProfile(), Constants()
    idle_s = (os.cpu_count() or 1) * run.wall_s - run.cpu_s
    return cpu_energy(run.cpu_s, device.busy_w, constants) + idle_energy(idle_s, device.idle_w, constants)


def compare(turns: list[dict[str, Run]]) -> dict[str, Any]:
    """Figures of each, and ratios to EcoGen's processes within a turn."""
    table: dict[str, Any] = {}
    for name in turns[0]:
        own = [runs[name] for runs in turns]
        joules = [energy(run) for run in own]
        table[name] = {
            "wall_s": _spread([run.wall_s for run in own], 2),
            "to_first_round_s": _spread([run.first_s for run in own], 2),
            "round_s": _spread([statistics.median(run.periods_s) for run in own], 3),
            "cpu_s": _spread([run.cpu_s for run in own], 1),
            "tunable_bytes": own[0].sent_bytes,
            "other_bytes": own[0].other_bytes,
            "modelled_j": {
                bound: round(statistics.median(getattr(joule, bound) for joule in joules), 1)
                for bound in ("low", "mid", "high")
            },
            "accuracy": [round(run.accuracies[-1], 4) for run in own],
            "mean_accuracy": round(statistics.mean(run.accuracies[-1] for run in own), 4),
        }
        ours = [runs["ecogen local"] for runs in turns]
        table[name]["over_ecogen_local"] = {
            "wall": _ratio([run.wall_s for run in own], [run.wall_s for run in ours]),
            "cpu": _ratio([run.cpu_s for run in own], [run.cpu_s for run in ours]),
            "modelled_energy": _ratio([joule.mid for joule in joules], [energy(run).mid for run in ours]),
        }
    return table


def _ratio(theirs: list[float], ours: list[float]) -> float:
    """The median of the ratios within a turn."""
    return round(statistics.median(their / our for their, our in zip(theirs, ours, strict=True)), 2)


def _spread(values: list[float], digits: int) -> dict[str, float]:
    return Spread.of(values if len(values) > 1 else values * 2).to_dict(digits) | {"num_runs": len(values)}


def main(repeats: int = 3, rounds: int = 5, train: int = 1200, *, patience_s: float = 60) -> dict[str, Any]:
    """Measure, write benchmarks/results/flower.json, and return it."""
    adopt_orphans()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was started is ended
    python = peer_environment("flower", [FLOWER, *pinned(PACKAGES)], first=pinned(["torch"]))
    foundation, _ = obtain_foundation(recipes.load("digits"), lambda *_: None)
    todo = contenders(python, foundation.folder, [f"tuning.rounds={rounds}", f"data.train={train}"])
    others = wait_until_quiet(timeout_s=patience_s)
    turns, distances = [], []
    for seed in range(repeats):
        runs, apart = turn(todo, seed)
        turns.append(runs)
        distances.append({name: round(value, 6) for name, value in apart.items()})
    furthest = max(value for apart in distances for value in apart.values())
    result = circumstances(("torch", "transformers", "peft", "grpcio")) | {
        "peer": FLOWER,
        "others_before": others,
        "clients": CLIENTS,
        "rounds": rounds,
        "training_examples": train,
        "figures": compare(turns),
        "same_work": {"tunables_apart": distances, "at_most": SAME, "reached": furthest <= SAME},
    }
    write_result("flower", result)
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    text = [
        f"{name}: {row['wall_s']['median']:.1f} s, {row['round_s']['median']:.2f} s a round, "
        f"{row['cpu_s']['median']:.0f} CPU s, {row['modelled_j']['mid']:.0f} J modelled, "
        f"{row['tunable_bytes'] / 1e6:.2f} MB of tunables, accuracy {row['mean_accuracy']:.4f}; over ecogen local: "
        f"{row['over_ecogen_local']['wall']:.2f} of the time, {row['over_ecogen_local']['cpu']:.2f} of the CPU time"
        for name, row in result["figures"].items()
    ]
    same = result["same_work"]
    furthest = max(value for apart in same["tunables_apart"] for value in apart.values())
    return [*text, f"{'reached' if same['reached'] else 'MISSED'}: same seed, same tunables, {furthest:.4f} apart"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--worker", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2: a round's time is from one evaluated round to the next")
    if options.worker:
        own = recipes.from_table(json.loads(options.worker.read_text()), str(options.worker))
        print(json.dumps(asyncio.run(federate(own, options.worker.parent))))
    else:
        print("\n".join(lines(main(options.repeats, options.rounds, options.train))))
