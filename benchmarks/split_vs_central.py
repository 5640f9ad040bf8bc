"""How fast a cluster tunes, against one process with the whole model: `python -m benchmarks.split_vs_central`.

The same model, tunables, numeric type, data, global batches of 64, optimizer and clipping, on two cores. Central tuning
is the fastest of four: a plain loop with two torch threads, or two data-parallel processes of one thread each, which
average their gradients by torch.distributed; and either with whole batches or with their gradients summed up over 16
examples at a time, since what fits the caches is faster. A cluster of S = 2 devices cuts each batch into
M microbatches: it could reach M / (M + S - 1) of two cores' work. All contenders take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch.multiprocessing.spawn import spawn

from benchmarks.blank import save_blank
from benchmarks.common import Spread, circumstances, median_of_worker, wait_until_quiet, write_result
from ecogen import config as recipes
from ecogen.engines.launch import launch
from ecogen.models.adapters import classification_config, load_whole
from ecogen.models.checkpoint import open_foundation
from ecogen.models.tunables import named_tunables
from ecogen.models.vit import whole_segment
from ecogen.records import RoundRecord
from ecogen.tuning.data import load_splits

MODELS = {  # and as many examples as take each about a second an epoch
    "128 wide, 4 blocks, 17 tokens": ["data.train=768"],
    "256 wide, 8 blocks, 50 tokens": [
        "data.train=192",
        "model.hidden_size=256",
        "model.num_blocks=8",
        "model.num_heads=8",
        "model.intermediate_size=1024",
        "model.patch_size=4",
    ],
    "192 wide, 12 blocks, 197 tokens (as DeiT-Ti)": [
        "data.train=128",
        "model.hidden_size=192",
        "model.num_blocks=12",
        "model.num_heads=3",
        "model.intermediate_size=768",
        "model.image_size=224",
        "model.patch_size=16",
    ],
}
BATCH, STAGES, CORES = 64, 2, 2
MICROBATCHES = (4, 8)
AT_ONCE = 16
WARM_UP = 1
GOAL = 0.97
"""Of the pipeline's bound."""

COMMON = [
    "topology.sites={}",
    "topology.edges=1",
    "topology.clusters_per_edge=1",
    "tuning.local_epochs=1",
    "tuning.augmentation=0",
    f"tuning.batch_size={BATCH}",
    f"topology.devices_per_cluster={STAGES}",
    "tuning.cloud_every=0",
    "evaluation.split=none",
    "evaluation.requests=0",
]


def central_rates(recipe: recipes.Recipe, at_once: int, threads: int, rank: int = 0, replicas: int = 1) -> list[float]:
    """Samples a second of each epoch, of one process with the whole model, or of one of several replicas.

    Args:
        at_once: examples whose gradients are computed together.
    """
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
            batch = order[begin : begin + tuning.batch_size][rank::replicas]
            for part in range(0, len(batch), at_once):
                examples = train[batch[part : part + at_once]]
                logits = model(examples.images, whole_segment(config))
                loss = torch.nn.functional.cross_entropy(logits, examples.labels, reduction="sum")
                (loss / len(batch)).backward()
            if replicas > 1:
                average_gradients(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, tuning.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        rates.append(len(train) / (time.perf_counter() - began_s))
    return rates[WARM_UP:]


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """All at once, as one vector."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    parts = (flat / torch.distributed.get_world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def replica(rank: int, recipe: recipes.Recipe, at_once: int, folder: Path) -> None:
    """One of two data-parallel processes; the first writes its rates."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=CORES)
    rates = central_rates(recipe, at_once, 1, rank, CORES)
    torch.distributed.destroy_process_group()
    if rank == 0:
        (folder / "rates.json").write_text(json.dumps(rates))


def data_parallel_rates(recipe: recipes.Recipe, at_once: int, folder: Path) -> list[float]:
    """As `central_rates`, of two processes with half of each batch."""
    folder.mkdir()
    spawn(replica, (recipe, at_once, folder), CORES)
    rates: list[float] = json.loads((folder / "rates.json").read_text())
    return rates


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
        match table["kind"]:
            case "split":
                return asyncio.run(split_rates(recipe, Path(directory) / "run"))
            case "data-parallel":
                return data_parallel_rates(recipe, table["at_once"], Path(directory) / "replicas")
        return central_rates(recipe, table["at_once"], CORES)


def measured(overrides: list[str], kind: str, at_once: int = BATCH) -> float:
    """The median rate of one run."""
    table = json.dumps({"overrides": overrides, "kind": kind, "at_once": at_once})
    return median_of_worker("benchmarks.split_vs_central", table, CORES)


def turn(model: list[str], rounds: int) -> dict[str, float]:
    """One turn of all contenders: samples a second of each."""
    common = [*COMMON, *model, f"tuning.rounds={rounds + WARM_UP}"]
    rates = {}
    for at_once, how in ((BATCH, "whole batches"), (AT_ONCE, f"{AT_ONCE} at a time")):
        rates[f"central, {CORES} threads, {how}"] = measured(common, "central", at_once)
        rates[f"central, {CORES} data-parallel processes, {how}"] = measured(common, "data-parallel", at_once)
    for microbatches in MICROBATCHES:
        for engine in ("local", "inproc"):
            overrides = [*common, f"tuning.microbatches={microbatches}", f"engine={engine}"]
            rates[f"split, M = {microbatches}, {engine}"] = measured(overrides, "split")
    return rates


def compare(turns: list[dict[str, float]]) -> dict[str, Any]:
    """Rates, and ratios within each turn to the fastest central run and to the bound."""
    table: dict[str, Any] = {}
    for name in turns[0]:
        row: dict[str, Any] = {"samples_per_s": Spread.of([rates[name] for rates in turns]).to_dict(1)}
        if name.startswith("split"):
            microbatches = int(name.split()[3].rstrip(","))
            best = [max(rate for other, rate in rates.items() if other.startswith("central")) for rates in turns]
            ratios = [rates[name] / rate for rates, rate in zip(turns, best, strict=True)]
            bound = microbatches / (microbatches + STAGES - 1)
            row["ratio_to_central"] = Spread.of(ratios).to_dict(3)
            row["pipeline_bound"] = round(bound, 3)
            row["ratio_to_bound"] = Spread.of([ratio / bound for ratio in ratios]).to_dict(3)
        table[name] = row
    return table


def main(repeats: int = 5, rounds: int = 2, *, patience_s: float = 60) -> dict[str, Any]:
    """Measure, write benchmarks/results/split_vs_central.json, and return it."""
    if repeats < 2:
        raise SystemExit(f"--repeats {repeats}: give 2 or more, for a spread")
    others = wait_until_quiet(timeout_s=patience_s)
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in MODELS}
    for _ in range(repeats):
        for name, model in MODELS.items():
            turns[name].append(turn(model, rounds))
            print(name, {key: round(rate) for key, rate in turns[name][-1].items()}, flush=True)
    result = circumstances(("torch", "transformers", "grpcio")) | {
        "others_before": others,
        "batch_size": BATCH,
        "stages": STAGES,
        "goal": f"samples a second at least {GOAL} of the pipeline's bound times central tuning",
        "figures": {name: compare(of_model) for name, of_model in turns.items()},
    }
    write_result("split_vs_central", result)
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    return [
        f"{model}: {name}: {row['ratio_to_central']['median']:.2f} of central tuning, "
        f"{row['ratio_to_bound']['median']:.2f} of the bound ({row['pipeline_bound']:.2f}); "
        f"{'reached' if row['ratio_to_bound']['median'] >= GOAL else 'MISSED'}: {GOAL}"
        for model, table in result["figures"].items()
        for name, row in table.items()
        if "ratio_to_bound" in row
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--worker", metavar="JSON", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(json.loads(options.worker))))
    else:
        print("\n".join(lines(main(options.repeats, options.rounds))))
