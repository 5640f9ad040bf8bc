"""How fast a cluster tunes a language model, against `peft` with the whole of it: `python -m benchmarks.split_lora`.

A Llama with random weights (speed does not depend on them) learns passages of 128 tokens by LoRA of rank 8 in all
linear layers of its blocks: float32, batches of 16, AdamW, clipping, no gradient checkpointing, the same start, data
and order everywhere, on two cores. Central tuning is an ordinary `PeftModel`, the fastest of four: a process with two
torch threads, or two data-parallel processes of one thread each, which sum up their gradients; and either with whole
batches or 4 passages at a time. A cluster of S = 2 devices, processes of one thread each with gRPC and mutual TLS
between them, cuts each batch into M microbatches: it could reach M / (M + S - 1) of two cores' work. All contenders
take turns, and what they learn is compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.common import Spread, circumstances, median_of_worker, wait_until_quiet, write_result
from benchmarks.serving import SIZES
from ecogen import config as recipes
from ecogen.engines.launch import launch
from ecogen.models.adapters import load_whole
from ecogen.models.checkpoint import load_tensors, open_foundation, save_tensors
from ecogen.models.tokenizer import load_tokenizer
from ecogen.models.tunables import get_tunables, named_tunables, set_tunables
from ecogen.tuning.device import LocalData
from ecogen.tuning.documentation import cloud_topics
from ecogen.tuning.passages import Batch
from ecogen.tuning.text import read_text
from ecogen.tuning.vocabulary import train_tokenizer

MODELS = {  # sizes, and as many passages as take some seconds an epoch
    "34 M parameters": (SIZES, 64),
    "9 M parameters": (SIZES | {"hidden_size": 256, "intermediate_size": 704, "vocab_size": 4096}, 128),
}
BATCH, TOKENS, RANK, STAGES, CORES = 16, 128, 8, 2, 2
MICROBATCHES = (4, 8, 16)
LABELS = {"start": "head at the start", "end": "head at the end"}
AT_ONCE = 4
WARM_UP = 1
GOAL, STRETCH = 0.97, 0.92
"""Of the pipeline's bound; of central tuning outright."""

SAME = 1e-3
"""How far tunables may be apart in the end, relative to how far they went: float32 sums in another order."""

COMMON = [
    "engine=local",
    "topology.sites={}",
    "topology.edges=1",
    "topology.clusters_per_edge=1",
    f"topology.devices_per_cluster={STAGES}",
    f"model.num_blocks={SIZES['num_hidden_layers']}",
    f"model.context_length={TOKENS}",
    f"tunables.lora_rank={RANK}",
    f"tunables.lora_alpha={2 * RANK}",
    "tuning.local_epochs=1",
    "tuning.learning_rate_decay=1",
    "tuning.epsilon=0.01",  # with 1e-8 rounding alone leads central runs apart, and tunables could not be compared
    f"tuning.batch_size={BATCH}",
    "tuning.cloud_every=0",
    "evaluation.split=none",
    "evaluation.requests=0",
]


@dataclass(frozen=True)
class Run:
    """What a process of its own is to measure.

    Attributes:
        kind: "split", "central" or "data-parallel".
        at_once: of central tuning, the passages whose gradients are computed together.
    """

    kind: str
    overrides: Sequence[str]
    at_once: int = BATCH
    threads: int = 1

    @property
    def recipe(self) -> recipes.Recipe:
        return recipes.load("text", list(self.overrides))


def save_model(folder: Path, sizes: dict[str, int]) -> Path:
    """A Llama that has learnt nothing, with a tokenizer of the documentation's topics."""
    tokenizer = train_tokenizer(cloud_topics(), sizes["vocab_size"])
    tokenizer.save_pretrained(folder)
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False, **marks)).save_pretrained(folder)
    return folder


def data_of(recipe: recipes.Recipe) -> LocalData:
    """What the cluster's owner has, all of it."""
    tokenizer = load_tokenizer(Path(recipe.model.source))
    splits = read_text(recipe.data, ["edge-0"], "edge-0", tokenizer, recipe.model.context_length, recipe.seed)
    return LocalData(splits.train, recipe.seed, cluster_index=0)


def peft_model(recipe: recipes.Recipe) -> peft.PeftModel:
    """The whole model with LoRA as a user of `peft` makes it, and a cluster's starting values."""
    spec, foundation = recipe.tunables, open_foundation(Path(recipe.model.source))
    start = get_tunables(load_whole(foundation, foundation.config, spec, recipe.seed))
    lora = peft.LoraConfig(r=spec.lora_rank, lora_alpha=spec.lora_alpha, target_modules="all-linear")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(recipe.model.source), lora)
    set_tunables(model.get_base_model(), start)
    return model.train()


def central_rates(run: Run, folder: Path, rank: int = 0, replicas: int = 1) -> list[float]:
    """Tokens a second of each epoch, of one process with the whole model, or of one of several replicas."""
    torch.set_num_threads(run.threads)
    recipe = run.recipe
    tuning, data, model = recipe.tuning, data_of(recipe), peft_model(recipe)
    parameters = [parameter for _, parameter in named_tunables(model.get_base_model())]
    rates = []
    for epoch in range(tuning.rounds):
        began_s = time.perf_counter()
        optimizer = torch.optim.AdamW(
            parameters, lr=tuning.learning_rate, weight_decay=tuning.weight_decay, eps=tuning.epsilon, fused=True
        )
        for batch in data.batches(tuning, epoch, 0):
            back_propagate(model, batch, range(rank, len(batch), replicas), run.at_once)
            if replicas > 1:
                sum_gradients(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, tuning.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        rates.append(data.examples.labels.numel() / (time.perf_counter() - began_s))
    if rank == 0:
        save_tensors(folder / "tunables.safetensors", get_tunables(model.get_base_model()))
    return rates[WARM_UP:]


def back_propagate(model: peft.PeftModel, batch: Batch, own: Sequence[int], at_once: int) -> None:
    """Gradients of some passages' share of the batch's mean cross-entropy."""
    counted = int((batch.labels >= 0).sum())
    for begin in range(0, len(own), at_once):
        part = batch[own[begin : begin + at_once]]
        logits = model(input_ids=part.inputs, use_cache=False).logits
        (cross_entropy(logits.flatten(0, 1), part.labels.flatten(), reduction="sum") / counted).backward()


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Over all replicas, all at once, as one vector."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def replica(rank: int, run: Run, folder: Path) -> None:
    """One of two data-parallel processes; the first writes its rates."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=CORES)
    rates = central_rates(run, folder, rank, CORES)
    torch.distributed.destroy_process_group()
    if rank == 0:
        (folder / "rates.json").write_text(json.dumps(rates))


def data_parallel_rates(run: Run, folder: Path) -> list[float]:
    """As `central_rates`, of two processes with half of each batch."""
    spawn(replica, (run, folder), CORES)
    rates: list[float] = json.loads((folder / "rates.json").read_text())
    return rates


async def split_rates(run: Run, folder: Path) -> list[float]:
    """Tokens a second of each round, of a cluster: orders, averaging and answers are in it, the commit is not."""
    async with launch(run.recipe, folder=folder / "run") as federation:
        records = [record async for record in federation.tune()]
        save_tensors(folder / "tunables.safetensors", await federation.tunables())
    return [record.num_examples * TOKENS / record.wall_s for record in records][WARM_UP:]


def work(run: Run, folder: Path) -> list[float]:
    """What a process of its own measures."""
    match run.kind:
        case "split":
            return asyncio.run(split_rates(run, folder))
        case "data-parallel":
            return data_parallel_rates(run, folder)
    return central_rates(run, folder)


def measured(run: Run, folder: Path) -> float:
    """The median rate of one run."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(asdict(run)))
    return median_of_worker("benchmarks.split_lora", str(folder), CORES)


def runs_of(model: str, folder: Path, rounds: int, microbatches: Sequence[int]) -> dict[str, Run]:
    """All contenders with one model, which is written to a folder, by name."""
    sizes, passages = MODELS[model]
    own = [f"model.source={save_model(folder, sizes)}", f"data.train={passages}", f"tuning.rounds={rounds + WARM_UP}"]
    return contenders([*COMMON, *own], microbatches)


def contenders(common: Sequence[str], microbatches: Sequence[int]) -> dict[str, Run]:
    """By name."""
    runs = {}
    for at_once, how in ((BATCH, "whole batches"), (AT_ONCE, f"{AT_ONCE} at a time")):
        runs[f"one thread, {how}"] = Run("central", common, at_once)
        runs[f"central, {CORES} threads, {how}"] = Run("central", common, at_once, CORES)
        runs[f"central, {CORES} data-parallel processes, {how}"] = Run("data-parallel", common, at_once)
    for count in microbatches:
        for place, where in LABELS.items():
            own = [f"tuning.microbatches={count}", f"placement.labels={place}"]
            runs[f"split, M = {count}, {where}"] = Run("split", [*common, *own])
    return runs


def turn(runs: dict[str, Run], folder: Path) -> tuple[dict[str, float], float]:
    """Tokens a second of each, and how far the tunables of any two may be apart at most, by how far they went."""
    rates = {name: measured(run, folder / str(number)) for number, (name, run) in enumerate(runs.items())}
    ends = [load_tensors(folder / str(number) / "tunables.safetensors") for number in range(len(runs))]
    model = peft_model(next(iter(runs.values())).recipe)
    start = get_tunables(model.get_base_model())
    went = _distance(start, ends[0])
    return rates, max(_distance(ends[0], end) for end in ends) / went


def _distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    return sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ours) ** 0.5


def compare(turns: list[dict[str, float]]) -> dict[str, Any]:
    """Rates, and ratios within each turn to the fastest central run, to the bound, and to twice one thread."""
    table: dict[str, Any] = {}

    def fastest(kind: str) -> list[float]:
        return [max(rate for name, rate in rates.items() if name.startswith(kind)) for rates in turns]

    def ratio(name: str, bases: list[float], factor: float) -> dict[str, float]:
        return Spread.of([rates[name] / (base * factor) for rates, base in zip(turns, bases, strict=True)]).to_dict(3)

    for name in turns[0]:
        row: dict[str, Any] = {"tokens_per_s": Spread.of([rates[name] for rates in turns]).to_dict(1)}
        if name.startswith("split"):
            microbatches = int(name.split()[3].rstrip(","))
            bound = microbatches / (microbatches + STAGES - 1)
            row["pipeline_bound"] = round(bound, 3)
            row["ratio_to_central"] = ratio(name, fastest("central"), 1)
            row["ratio_to_bound"] = ratio(name, fastest("central"), bound)
            row["ratio_to_bound_of_one_thread"] = ratio(name, fastest("one thread"), STAGES * bound)
        table[name] = row
    return table


def goals(figures: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Of each model, whether its fastest split reaches the pipeline's bound, and central tuning outright."""
    met = {}
    for model, table in figures.items():
        split = [name for name in table if name.startswith("split")]
        fastest = max(split, key=lambda name: table[name]["tokens_per_s"]["median"])
        of_bound, of_central = (table[fastest][key]["median"] for key in ("ratio_to_bound", "ratio_to_central"))
        met[f"{model}: {fastest}: at least {GOAL} of the pipeline's bound"] = of_bound >= GOAL
        met[f"{model}: {fastest}: at least {STRETCH} of central tuning"] = of_central >= STRETCH
    return met


def main(
    turns: int = 3, rounds: int = 2, models: Sequence[str] = tuple(MODELS), microbatches: Sequence[int] = MICROBATCHES
) -> dict[str, Any]:
    """Measure, and return what was written to benchmarks/results/split_lora.json, after every turn from the second."""
    others = wait_until_quiet()
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    apart = 0.0
    with tempfile.TemporaryDirectory(prefix="ecogen-split-lora-") as directory:
        folder = Path(directory)
        runs = {name: runs_of(name, folder / str(number), rounds, microbatches) for number, name in enumerate(models)}
        for index in range(turns):
            for number, name in enumerate(models):
                own, furthest = turn(runs[name], folder / f"{number}-{index}")
                rates[name].append(own)
                apart = max(apart, furthest)
                print(name, {key: round(rate) for key, rate in own.items()}, f"{furthest:.1e} apart", flush=True)
            if index:  # a spread takes two
                result = result_of(rates, apart, others)
                write_result("split_lora", result)
    return result


def result_of(
    rates: dict[str, list[dict[str, float]]], apart: float, others: dict[str, float | None]
) -> dict[str, Any]:
    """What the turns so far show.

    Args:
        rates: of each turn, by model.
        apart: the furthest that tunables of two contenders are.
        others: what else the machine did before.
    """
    figures = {name: compare(of_model) for name, of_model in rates.items()}
    return circumstances(("torch", "transformers", "peft", "grpcio")) | {
        "turns": min(map(len, rates.values())),
        "others_before": others,
        "models": {name: MODELS[name][0] for name in rates},
        "batch": f"{BATCH} passages of {TOKENS} tokens",
        "lora_rank": RANK,
        "stages": STAGES,
        "figures": figures,
        "same_work": {"furthest_apart": apart, "at_most": SAME, "reached": apart <= SAME},
        "goals": goals(figures),
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    text = [_line(model, name, row) for model, table in result["figures"].items() for name, row in table.items()]
    same = result["same_work"]
    checks = result["goals"] | {f"same tunables, {same['furthest_apart']:.1e} apart": same["reached"]}
    return [*text, *(f"{'reached' if met else 'MISSED'}: {goal}" for goal, met in checks.items())]


def _line(model: str, name: str, row: dict[str, Any]) -> str:
    text = f"{model}: {name}: {row['tokens_per_s']['median']:.0f} tokens/s"
    if "ratio_to_bound" not in row:
        return text
    central, of_bound, bound = row["ratio_to_central"], row["ratio_to_bound"], row["pipeline_bound"]
    return f"{text}, {central['median']:.2f} of central tuning, {of_bound['median']:.2f} of the bound ({bound:.2f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="measured a run, after one to warm up")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--microbatches", type=int, nargs="+", default=MICROBATCHES)
    parser.add_argument("--worker", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(Run(**json.loads((options.worker / "run.json").read_text())), options.worker)))
        sys.exit()
    if options.turns < 2:
        parser.error("--turns must be at least 2, for a spread")
    print("\n".join(lines(main(options.turns, options.rounds, options.models, options.microbatches))))
