"""How fast a cluster tunes, against one process with the whole model: `python -m benchmarks.split_vs_central`.

The same model, tunables, data, batches, optimizer and clipping. Central tuning is a plain loop over whole batches, with
one torch thread or one a core, whichever is faster. A cluster cuts each batch into M microbatches for its S devices:
with a core for each device it could reach M / (M + S - 1) of S cores' work, and with fewer cores that bound is not the
one that counts. Each run is a process of its own, pinned to its cores; all take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.blank import save_blank
from benchmarks.common import Spread, circumstances, wait_until_quiet, write_result
from ecogen import config as recipes
from ecogen.engines.launch import launch
from ecogen.models.adapters import classification_config, load_whole
from ecogen.models.checkpoint import open_foundation
from ecogen.models.tunables import named_tunables
from ecogen.models.vit import whole_segment
from ecogen.records import RoundRecord
from ecogen.tuning.data import load_splits

MODELS = {
    "the recipe's model": [],
    "256 x 8 blocks": [
        "model.hidden_size=256",
        "model.num_blocks=8",
        "model.num_heads=8",
        "model.intermediate_size=1024",
    ],
}
MICROBATCHES = 4
WARM_UP = 1

COMMON = [
    "topology.sites={}",
    "topology.edges=1",
    "topology.clusters_per_edge=1",
    "tuning.local_epochs=1",
    "tuning.batch_size=20",
    f"tuning.microbatches={MICROBATCHES}",
    "tuning.cloud_every=0",
    "evaluation.split=none",
    "evaluation.requests=0",
]


def central_rates(recipe: recipes.Recipe, threads: int) -> list[float]:
    """Samples a second of each epoch, of one process with the whole model."""
    torch.set_num_threads(threads)
    tuning = recipe.tuning
    foundation = open_foundation(Path(recipe.model.source))
    train = load_splits(recipe.data, recipe.model.image_size, recipe.seed).train
    config = classification_config(foundation, 10)
    model = load_whole(foundation, config, recipe.tunables, recipe.seed)
    parameters = [parameter for _, parameter in named_tunables(model)]
    rates = []
    for epoch in range(tuning.rounds):
        began_s = time.perf_counter()
        optimizer = torch.optim.AdamW(parameters, lr=tuning.learning_rate, weight_decay=tuning.weight_decay)
        order = np.random.default_rng([recipe.seed, epoch]).permutation(len(train))
        for begin in range(0, len(order), tuning.batch_size):
            batch = train[order[begin : begin + tuning.batch_size]]
            logits = model(batch.images, whole_segment(config))
            torch.nn.functional.cross_entropy(logits, batch.labels).backward()
            torch.nn.utils.clip_grad_norm_(parameters, tuning.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        rates.append(len(train) / (time.perf_counter() - began_s))
    return rates[WARM_UP:]


async def split_rates(recipe: recipes.Recipe, folder: Path) -> list[float]:
    """Samples a second of each round, of a cluster: orders, averaging and answers are in it, the commit is not."""
    async with launch(recipe, folder=folder) as federation:
        records: list[RoundRecord] = [record async for record in federation.tune()]
    return [record.num_examples / record.wall_s for record in records][WARM_UP:]


def work(table: dict[str, Any]) -> list[float]:
    """What a process of its own measures."""
    with tempfile.TemporaryDirectory(prefix="ecogen-split-") as directory:
        recipe = recipes.load("digits", table["overrides"])
        source = save_blank(recipe.model, Path(directory) / "model")
        recipe = replace(recipe, model=replace(recipe.model, source=str(source)))
        if table["threads"]:
            return central_rates(recipe, table["threads"])
        return asyncio.run(split_rates(recipe, Path(directory) / "run"))


def measured(overrides: list[str], cores: int, threads: int = 0) -> float:
    """The median rate of one run, pinned to the first `cores` cores; `threads` 0 means a cluster."""
    table = json.dumps({"overrides": overrides, "threads": threads})
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, sorted(allowed)[:cores])
        command = [sys.executable, "-m", "benchmarks.split_vs_central", "--worker", table]
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        os.sched_setaffinity(0, allowed)
    if done.returncode:
        raise RuntimeError(f"a run failed:\n{done.stderr[-3000:]}")
    return statistics.median(json.loads(done.stdout.splitlines()[-1]))


def turn(model: list[str], cores: int, sizes: tuple[int, ...], rounds: int, train: int) -> dict[str, float]:
    """One turn of all contenders: samples a second of each."""
    common = [*COMMON, *model, f"tuning.rounds={rounds + WARM_UP}", f"data.train={train}"]
    rates = {
        f"central, {threads} thread{'s' * (threads > 1)}": measured(common, cores, threads)
        for threads in sorted({1, cores})
    }
    for size in sizes:
        for engine in ("inproc", "local"):
            overrides = [*common, f"topology.devices_per_cluster={size}", f"engine={engine}"]
            rates[f"{engine}, {size} devices"] = measured(overrides, cores)
    return rates


def compare(turns: list[dict[str, float]], cores: int) -> dict[str, Any]:
    """Rates, and ratios within each turn to the faster central run."""
    table: dict[str, Any] = {}
    for name in turns[0]:
        row: dict[str, Any] = {"samples_per_s": Spread.of([rates[name] for rates in turns]).to_dict(1)}
        if "devices" in name:
            stages = int(name.split()[1])
            best = [max(rate for other, rate in rates.items() if other.startswith("central")) for rates in turns]
            row["ratio_to_central"] = Spread.of([r[name] / b for r, b in zip(turns, best, strict=True)]).to_dict(3)
            row["pipeline_bound"] = round(MICROBATCHES / (MICROBATCHES + stages - 1), 3)
            row["stages_per_core"] = round(stages / cores, 2)
        table[name] = row
    return table


def main(
    repeats: int = 3, rounds: int = 4, train: int = 400, sizes: tuple[int, ...] = (2, 3), *, patience_s: float = 60
) -> dict[str, Any]:
    """Measure, write benchmarks/results/split_vs_central.json, and return it."""
    others = wait_until_quiet(timeout_s=patience_s)
    cells = [(name, cores) for name in MODELS for cores in sorted({1, min(2, os.cpu_count() or 1)})]
    turns: dict[tuple[str, int], list[dict[str, float]]] = {cell: [] for cell in cells}
    for _ in range(repeats):
        for name, cores in cells:
            turns[name, cores].append(turn(MODELS[name], cores, sizes, rounds, train))
            print(name, cores, {key: round(rate) for key, rate in turns[name, cores][-1].items()}, flush=True)
    result = circumstances(("torch", "transformers", "grpcio")) | {
        "others_before": others,
        "microbatches": MICROBATCHES,
        "batch_size": 20,
        "figures": {f"{name}, cores: {cores}": compare(turns[name, cores], cores) for name, cores in cells},
    }
    write_result("split_vs_central", result)
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    text = []
    for cell, table in result["figures"].items():
        for name, row in table.items():
            if "ratio_to_central" in row:
                ratio, bound = row["ratio_to_central"]["median"], row["pipeline_bound"]
                text.append(f"{cell}: {name}: {ratio:.2f} of central tuning (bound of the pipeline: {bound:.2f})")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--worker", metavar="JSON", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(json.loads(options.worker))))
    else:
        print("\n".join(lines(main(options.repeats, options.rounds, options.train))))
