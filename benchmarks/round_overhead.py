"""What a round costs beside its work, here and in NVIDIA FLARE: `python -m benchmarks.round_overhead`.

Four clients get 1 MiB of tunables, do nothing, and send 1 MiB back; the aggregator averages, commits and goes on. Ours
are real node processes with mutual TLS on loopback: a cloud, an edge, four clusters of one device each. FLARE runs in
its simulator (a process a client too, no TLS), installed by pip into an environment of its own. All take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.blank import save_blank
from benchmarks.common import Spread, circumstances, peer_environment, wait_until_quiet, write_result
from ecogen import config as recipes
from ecogen.engines.launch import launch
from ecogen.records import RoundRecord

NUM_CLIENTS = 4
TARGET_S, TARGET_RATIO = 0.020, 5.0
FLARE = "nvflare==2.9.0"
WARM_UP = 5

OVERRIDES = [
    "engine=local",
    "topology.sites={}",
    "topology.edges=1",
    f"topology.clusters_per_edge={NUM_CLIENTS}",
    "topology.devices_per_cluster=1",
    "tunables.prompts=64",  # 4 blocks x 128 hidden x (64 prompts + 4 x 112 LoRA) = 1 MiB, and a head of 5 KB
    "tunables.lora_rank=112",
    "tuning.local_epochs=0",
    "evaluation.split=none",
    "evaluation.requests=0",
]


@dataclass(frozen=True)
class Run:
    """One run of many rounds, warm-up left out.

    Attributes:
        periods_s: from the end of each round to the end of the next: everything is in it, disk and publishing too.
        walls_s: what each round's own record says, from the first order to the average; only ours have one.
        tunable_bytes: what travelled each way.
    """

    periods_s: list[float]
    walls_s: list[float]
    tunable_bytes: int


def run_ours(cloud_every: int, rounds: int) -> Run:
    """Rounds of our `local` engine."""
    with tempfile.TemporaryDirectory(prefix="ecogen-rounds-") as directory:
        recipe = recipes.load(
            "digits", [*OVERRIDES, f"tuning.rounds={rounds + WARM_UP}", f"tuning.cloud_every={cloud_every}"]
        )
        source = save_blank(recipe.model, Path(directory) / "model")
        recipe = replace(recipe, model=replace(recipe.model, source=str(source)))
        return asyncio.run(_run_federation(recipe, Path(directory) / "run"))


async def _run_federation(recipe: recipes.Recipe, folder: Path) -> Run:
    async with launch(recipe, folder=folder) as federation:
        records = [record async for record in federation.tune()]
        tunables = await federation.tunables_of("edge-0")
    ours = [record for record in records if record.node_id == "edge-0"][WARM_UP - 1 :]
    if any(len(record.members) != NUM_CLIENTS for record in ours):
        raise RuntimeError("a cluster was lost: the machine is too busy to measure on")
    return Run(_periods([record.time_s for record in ours]), _walls(ours[1:]), sum(t.nbytes for t in tunables.values()))


def run_flare(
    python: Path,
    rounds: int,
    *,
    interval_s: float | None = None,
    check_s: float | None = None,
    poll_s: float | None = None,
) -> Run:
    """Rounds of FLARE's simulator; None leaves a setting at FLARE's default.

    Args:
        interval_s: setting `task_request_interval`, how long a client waits between tasks.
        check_s: setting `task_check_period` of the workflow.
        poll_s: what no setting reaches, patched: see `flare_job`.
    """
    with tempfile.TemporaryDirectory(prefix="flare-rounds-") as directory:
        folder = Path(directory)
        times = folder / "times.json"
        _write_job(folder / "job", times, rounds + WARM_UP, interval_s, check_s, poll_s)
        command = [python.with_name("nvflare"), "simulator", folder / "job", "-w", folder / "work"]
        numbers = [str(NUM_CLIENTS), "-t", str(NUM_CLIENTS)]
        done = subprocess.run([*map(str, command), "-n", *numbers], capture_output=True, text=True, cwd=folder)
        if not times.exists():
            raise RuntimeError(f"FLARE wrote no times; the end of its log:\n{(done.stdout + done.stderr)[-3000:]}")
        return Run(_periods(json.loads(times.read_text())[WARM_UP - 1 :]), [], 2**20)


def _write_job(
    folder: Path, times: Path, rounds: int, interval_s: float | None, check_s: float | None, poll_s: float | None
) -> None:
    """A job folder as FLARE wants it."""
    settings: dict[str, Any] = {"times": str(times), "num_clients": NUM_CLIENTS, "num_rounds": rounds, "poll_s": poll_s}
    settings |= {} if check_s is None else {"task_check_period": check_s}
    server: dict[str, Any] = {"format_version": 2, "components": []}
    server |= {} if interval_s is None else {"server": {"task_request_interval": interval_s}}
    server["workflows"] = [{"id": "rounds", "path": "flare_job.TimedFedAvg", "args": settings}]
    echo = {"path": "flare_job.Echo", "args": {"poll_s": poll_s}}
    client = {"format_version": 2, "executors": [{"tasks": ["train"], "executor": echo}], "components": []}
    application = folder / "app"
    for name, content in (("server", server), ("client", client)):
        path = application / "config" / f"config_fed_{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    (application / "custom").mkdir()
    shutil.copy(Path(__file__).with_name("flare_job.py"), application / "custom")
    meta = {"name": "rounds", "resource_spec": {}, "min_clients": NUM_CLIENTS, "deploy_map": {"app": ["@ALL"]}}
    (folder / "meta.json").write_text(json.dumps(meta))


def _periods(ends_s: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(ends_s)]


def _walls(records: list[RoundRecord]) -> list[float]:
    return [record.wall_s for record in records]


def contenders(rounds: int, flare_rounds: int) -> dict[str, Callable[[], Run]]:
    """What takes turns."""
    python = peer_environment("nvflare", [FLARE, "numpy"])
    fast = {"interval_s": 0.01, "check_s": 0.005}
    return {
        "ecogen, mTLS, edge alone": lambda: run_ours(0, rounds),
        "ecogen, mTLS, cloud every round": lambda: run_ours(1, rounds),
        "flare simulator, default settings": lambda: run_flare(python, max(5, flare_rounds // 3)),
        "flare simulator, fastest settings": lambda: run_flare(python, flare_rounds, **fast),
        "flare simulator, fastest, constants patched": lambda: run_flare(python, flare_rounds, **fast, poll_s=0.005),
    }


def measure(repeats: int, rounds: int, flare_rounds: int) -> dict[str, list[Run]]:
    """The runs of each contender, interleaved."""
    todo = contenders(rounds, flare_rounds)
    runs: dict[str, list[Run]] = {name: [] for name in todo}
    for _ in range(repeats):
        for name, run in todo.items():
            runs[name].append(run())
            print(f"{name:50s} {1e3 * statistics.median(runs[name][-1].periods_s):9.1f} ms a round", flush=True)
    return runs


def figures(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Spreads over all rounds of all runs, the median of each run, and the ratios of runs that stood side by side."""
    table: dict[str, Any] = {}
    for name, own in runs.items():
        table[name] = {
            "tunable_bytes_each_way": own[0].tunable_bytes,
            "round_to_round_ms": _spread([1e3 * period for run in own for period in run.periods_s]),
            "median_of_each_run_ms": [round(1e3 * statistics.median(run.periods_s), 2) for run in own],
        }
        if own[0].walls_s:
            table[name]["record_wall_ms"] = _spread([1e3 * wall for run in own for wall in run.walls_s])
    ours, *_ = runs.values()
    ratios = {name: _ratio(own, ours) for name, own in runs.items() if name.startswith("flare")}
    return {"rounds": table, "flare_over_ecogen_edge_alone": ratios}


def _spread(values: list[float]) -> dict[str, float]:
    ventiles = statistics.quantiles(values, n=20)
    return Spread.of(values).to_dict(2) | {"p5": round(ventiles[0], 2), "p95": round(ventiles[-1], 2)}


def _ratio(theirs: list[Run], ours: list[Run]) -> float:
    """The median over repeats of the ratio of medians."""
    medians = [
        (statistics.median(t.periods_s), statistics.median(o.periods_s)) for t, o in zip(theirs, ours, strict=True)
    ]
    return round(statistics.median(their / our for their, our in medians), 2)


def main(repeats: int = 3, rounds: int = 100, flare_rounds: int = 30, *, patience_s: float = 60) -> dict[str, Any]:
    """Measure, write benchmarks/results/round_overhead.json, and return it."""
    peer_environment("nvflare", [FLARE, "numpy"])
    others = wait_until_quiet(timeout_s=patience_s)
    measured = figures(measure(repeats, rounds, flare_rounds))
    ours = next(iter(measured["rounds"].values()))["round_to_round_ms"]["median"]
    result = circumstances(("torch", "grpcio", "msgspec")) | {
        "peer": FLARE,
        "others_before": others,
        "clients": NUM_CLIENTS,
        **measured,
        "targets": {
            "round_ms": {"at_most": 1e3 * TARGET_S, "reached": ours <= 1e3 * TARGET_S},
            "flare_ratio": {
                "at_least": TARGET_RATIO,
                "reached": {name: r >= TARGET_RATIO for name, r in measured["flare_over_ecogen_edge_alone"].items()},
            },
        },
    }
    write_result("round_overhead", result)
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    text = []
    for name, row in result["rounds"].items():
        wall = f", of which {row['record_wall_ms']['median']:.1f} in its record" if "record_wall_ms" in row else ""
        text.append(f"{name}: {row['round_to_round_ms']['median']:.1f} ms a round{wall}")
    for name, ratio in result["flare_over_ecogen_edge_alone"].items():
        text.append(f"{name}: {ratio:.1f} times as long as ecogen")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--flare-rounds", type=int, default=30)
    options = parser.parse_args()
    print("\n".join(lines(main(options.repeats, options.rounds, options.flare_rounds))))
