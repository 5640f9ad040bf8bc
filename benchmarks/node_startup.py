"""How long nodes take to start and how much memory they hold: `python -m benchmarks.node_startup`.

The demo itself, with its peak over all its processes; then its 21 nodes as processes (`local`), from launch until all
are ready, and idle. RSS counts a shared page in every process, PSS divides it among them: only PSS adds up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.blank import save_blank
from benchmarks.common import Spread, circumstances, wait_until_quiet, write_result
from ecogen import config as recipes
from ecogen.engines.federation import Federation
from ecogen.engines.local import LocalEngine
from ecogen.records import PhaseRecord
from ecogen.units import GIB

TARGET_GIB = 3.0
_SAMPLE_S = 0.25
_SETTLE_S = 3.0

IDLE = ["engine=local", "tuning.rounds=1", "tuning.local_epochs=0", "evaluation.split=none", "evaluation.requests=0"]


@dataclass(frozen=True)
class Memory:
    """What one process holds, in bytes."""

    rss: int = 0
    pss: int = 0

    @classmethod
    def of(cls, pid: int) -> Memory:
        """Of a process; nothing if it is gone."""
        fields: dict[str, int] = {}
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
                name, value, *_ = line.split()
                fields[name] = int(value) * 1024
        return cls(fields.get("Rss:", 0), fields.get("Pss:", 0))


async def start_and_idle(launched_s: float) -> dict[str, Any]:
    """Start all nodes twice: once for the whole time, once for each node's; look at the memory of the first, idle.

    Args:
        launched_s: when this process was launched, by `time.time`.
    """
    imported_s = time.time()
    with tempfile.TemporaryDirectory(prefix="ecogen-startup-") as directory:
        folder = Path(directory)
        recipe = recipes.load("digits", IDLE)
        recipe = replace(recipe, model=replace(recipe.model, source=str(save_blank(recipe.model, folder / "model"))))
        engine = LocalEngine(recipe, folder / "first")
        try:
            await engine.start()
            serving_s = time.time()
            ready_s = await _all_ready(Federation(recipe, engine, folder / "first"))
            await asyncio.sleep(_SETTLE_S)
            memory = _memory_by_tier(recipe, engine)
        finally:
            await engine.stop()
        return {
            "seconds_from_launch": {
                "imported": imported_s - launched_s,
                "all_serving": serving_s - launched_s,
                "all_ready": ready_s - launched_s,
            },
            "idle_memory_bytes": memory,
            "start_of_one_node_s": await _one_by_one(recipe, folder / "second"),
        }


async def _all_ready(federation: Federation) -> float:
    """When every node but the cloud has told that it holds what it needs."""
    expected, ready_s = set(federation.topology.nodes) - {federation.topology.cloud_id}, 0.0
    async for record in federation.watch():
        if isinstance(record, PhaseRecord) and record.phase == "delivery":
            expected.discard(record.node_id)
            if not expected and not ready_s:
                ready_s = time.time()
    return ready_s


async def _one_by_one(recipe: recipes.Recipe, folder: Path) -> dict[str, float]:
    """How long each tier's nodes take from fork to serving, one after the other, out of a warm fork server."""
    engine = LocalEngine(recipe, folder)
    times: dict[str, list[float]] = defaultdict(list)
    try:
        for node_id, node in recipes.build_topology(recipe.topology).nodes.items():
            began_s = time.perf_counter()
            await engine.start_node(node_id)
            times[node.tier.value].append(time.perf_counter() - began_s)
    finally:
        await engine.stop()
    return {tier: statistics.median(own) for tier, own in times.items()}


def _memory_by_tier(recipe: recipes.Recipe, engine: LocalEngine) -> dict[str, Any]:
    held: dict[str, list[Memory]] = defaultdict(list)
    for node_id, node in recipes.build_topology(recipe.topology).nodes.items():
        held[node.tier.value].append(Memory.of(engine.pid(node_id)))
    table: dict[str, Any] = {
        tier: {
            "nodes": len(own),
            "rss": statistics.median(memory.rss for memory in own),
            "pss": statistics.median(memory.pss for memory in own),
        }
        for tier, own in held.items()
    }
    launcher = Memory.of(os.getpid())
    others = [Memory.of(child.pid) for child in psutil.Process().children(recursive=True)]
    table["launcher"] = {"rss": launcher.rss, "pss": launcher.pss}
    table["all_processes_pss"] = launcher.pss + sum(memory.pss for memory in others)
    return table


def run_demo(engine: str, overrides: list[str]) -> dict[str, Any]:
    """Run the demo with an empty cache, pre-training and all; returns its peak memory and time."""
    with tempfile.TemporaryDirectory(prefix="ecogen-demo-") as directory:
        settings = [argument for override in overrides for argument in ("--set", override)]
        command = [sys.executable, "-m", "ecogen", "run", "digits", "--engine", engine, "--out", f"{directory}/run"]
        environment = os.environ | {"XDG_CACHE_HOME": f"{directory}/cache"}
        began_s = time.perf_counter()
        process = subprocess.Popen([*command, *settings], env=environment, stdout=subprocess.DEVNULL)
        peak, most = 0, 0
        try:
            while process.poll() is None:
                pss, count = _family(process.pid)
                peak, most = max(peak, pss), max(most, count)
                time.sleep(_SAMPLE_S)
        finally:
            process.kill()
        if process.returncode:
            raise RuntimeError(f"the demo failed with exit code {process.returncode}; see above")
    return {
        "wall_s": round(time.perf_counter() - began_s, 1),
        "processes": most,
        "peak_pss_bytes": peak,
        # Of the largest process that has ended so far: exact for inproc if it runs first.
        "ru_maxrss_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }


def _family(pid: int) -> tuple[int, int]:
    """PSS of a process and all it started, and how many they are."""
    try:
        pids = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        return 0, 0
    return sum(Memory.of(one).pss for one in pids), len(pids)


def _startup() -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.node_startup", "--worker", repr(time.time())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the nodes did not start:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main(repeats: int = 3, *, overrides: tuple[str, ...] = (), patience_s: float = 60) -> dict[str, Any]:
    """Measure, write benchmarks/results/node_startup.json, and return it."""
    demos = {engine: run_demo(engine, list(overrides)) for engine in ("inproc", "local")}
    del demos["local"]["ru_maxrss_bytes"]
    others = wait_until_quiet(timeout_s=patience_s)
    starts = [_startup() for _ in range(repeats)]
    peak = max(demo["peak_pss_bytes"] for demo in demos.values())
    result = circumstances(("torch", "transformers", "grpcio")) | {
        "others_before": others,
        "seconds_from_launch": _spreads(starts, "seconds_from_launch"),
        "start_of_one_node_s": _spreads(starts, "start_of_one_node_s"),
        "idle_memory_bytes": starts[-1]["idle_memory_bytes"],
        "demo": demos,
        "demo_overrides": list(overrides),
        "targets": {"demo_peak_gib": {"at_most": TARGET_GIB, "reached": peak <= TARGET_GIB * GIB}},
    }
    write_result("node_startup", result)
    return result


def _spreads(starts: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return {key: Spread.of([start[name][key] for start in starts]).to_dict(3) for key in starts[0][name]}


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    memory, seconds = result["idle_memory_bytes"], result["seconds_from_launch"]
    text = [f"21 nodes ready {seconds['all_ready']['median']:.1f} s after launch"]
    for tier, start in result["start_of_one_node_s"].items():
        own = memory[tier]
        text.append(
            f"{tier} node: serves {start['median']:.2f} s after its fork; idle, {own['rss'] / 2**20:.0f} MiB RSS, "
            f"{own['pss'] / 2**20:.0f} MiB PSS"
        )
    text.append(f"all idle processes: {memory['all_processes_pss'] / GIB:.2f} GiB PSS")
    for engine, demo in result["demo"].items():
        peak_gib = demo["peak_pss_bytes"] / GIB
        text.append(f"demo, {engine}: peak {peak_gib:.2f} GiB PSS over {demo['processes']} processes")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the demo's recipe")
    parser.add_argument("--worker", metavar="LAUNCHED_S", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(asyncio.run(start_and_idle(float(options.worker)))))
    else:
        print("\n".join(lines(main(options.repeats, overrides=tuple(options.set)))))
