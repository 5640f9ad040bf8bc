"""Text-image generators of other pictures: `python -m benchmarks.relay_sources [--seeds 1] [--case NAME ...]`.

MNIST's digits, divided over two edges: the recipe `pairs-mnist`, and `pairs` as it is for scikit-learn's; and an edge
with all of MNIST's digits beside one with emoji, of which each has a caption of its own. Both are read below
`ECOGEN_DATA` (`mnist/mnist.npz`, `emoji/captions.jsonl`); skipped where they are not.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from benchmarks.common import circumstances, skip, wait_until_quiet, write_result
from ecogen import config as recipes
from ecogen.engines import session
from ecogen.engines.saving import FACTS
from ecogen.errors import EcoGenError
from ecogen.models.adapters import BACKBONE
from ecogen.models.image_tokenizer import load_image_tokenizer
from ecogen.relay.examination import assessor_of
from ecogen.reports.summary import RunFacts

CASES = {
    "mnist": ("pairs-mnist", []),
    "mnist, settings of pairs": ("pairs", ["data.sources.edge-0.name=mnist", "data.sources.edge-1.name=mnist"]),
    "mnist and emoji": (
        "pairs",
        ['data.sources={edge-0={name="mnist"},edge-1={name="emoji"}}', "data.validation=16", "data.test=30"],
    ),
}
EDGES = ("edge-0", "edge-1")
MEASURES = ("recognised", "real_recognised", "caption_accuracy", "copies", "frechet", "real_frechet")
GOAL_RECOGNISED = 0.9


def carry_out(seed: int, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """One run of a recipe: figures of each edge, and its lessons."""
    recipe = recipes.load(name, [f"seed={seed}", "evaluation.requests=0", "evaluation.crossings=0", *overrides])
    with tempfile.TemporaryDirectory(prefix="ecogen-sources-") as temporary:
        folder = Path(temporary) / recipe.name
        summary = asyncio.run(session.run(recipe, folder, resume=False, screen=Console(stderr=True)))
        facts = msgspec.json.decode((folder / FACTS).read_bytes(), type=RunFacts)
        shares = through_tokenizer(recipe, folder)
    relay = summary["relay"]
    assert relay is not None
    return {
        "seed": seed,
        "perplexity": {edge: [of["delivered"], of["tuned"]] for edge, of in (summary["perplexity"] or {}).items()},
        "edges": {
            edge: {name: getattr(of, name) for name in MEASURES} | {"through_tokenizer": shares.get(edge)}
            for edge, of in facts.drawings.items()
        },
        "lessons": [
            {name: one[name] for name in ("node_id", "accepted", "reason", "num_samples", "new", "known")}
            for way in ("up", "down")
            for one in relay[way]
        ],
        "wall_s": summary["wall_s"],
    }


def through_tokenizer(recipe: recipes.Recipe, folder: Path) -> dict[str, float]:
    """Of each edge's real test digits, encoded and decoded again, the share that the judge recognises."""
    images, assessor = load_image_tokenizer(folder / BACKBONE), assessor_of(recipe)
    tests = {edge: own.test for edge, own in assessor.splits.items() if assessor.knows_digits(edge)}
    return {
        edge: assessor.recognised(images.decode(images.encode(own.images)), own.captions) for edge, own in tests.items()
    }


def main(seeds: int = 1, names: Sequence[str] = (), at_once: int = 1) -> dict[str, Any]:
    """Measure, write benchmarks/results/relay_sources.json after each run, and return it.

    A busy machine changes nothing but the time.
    """
    quiet, runs = wait_until_quiet(), dict[str, list[dict[str, Any]]]()
    result: dict[str, Any] = {}
    with ProcessPoolExecutor(at_once, get_context("spawn"), max_tasks_per_child=1) as pool:
        asked = [(seed, name) for seed in range(seeds) for name in names or CASES]
        started = [(name, pool.submit(carry_out, seed, *CASES[name])) for seed, name in asked]
        for name, run in started:
            try:
                runs.setdefault(name, []).append(run.result())
            except EcoGenError as problem:
                pool.shutdown(cancel_futures=True)
                skip(str(problem))
            result = conclude(runs) | {"others_before": quiet, "at_once": at_once}
            write_result("relay_sources", result)
    return result


def conclude(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The figures of some runs, and whether at least `GOAL_RECOGNISED` of MNIST's drawings are recognised."""
    of_mnist = {edge: _values(runs["mnist"], edge, "recognised") for edge in EDGES} if "mnist" in runs else {}
    goals = {
        f"mnist: at least 90 % of the drawings of {edge} are recognised": statistics.fmean(values) >= GOAL_RECOGNISED
        for edge, values in of_mnist.items()
    }
    return circumstances(("torch", "transformers")) | {"cases": runs, "goals": goals}


def lines(result: Mapping[str, Any]) -> list[str]:
    """Each case's means over seeds, and least and most, for people."""
    text = [line(name, edge, runs) for name, runs in result["cases"].items() for edge in EDGES]
    return [*text, *(f"{'reached' if met else 'MISSED'}: {goal}" for goal, met in result["goals"].items())]


def line(name: str, edge: str, runs: Sequence[Mapping[str, Any]]) -> str:
    figures = {measure: _values(runs, edge, measure) for measure in (*MEASURES, "through_tokenizer")}
    told = [
        f"{measure} {statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
        for measure, values in figures.items()
        if values
    ]
    before, after = (statistics.fmean(run["perplexity"][edge][place] for run in runs) for place in (0, 1))
    return f"{name}, {edge}: perplexity {before:.1f} to {after:.1f}, {', '.join(told)}"


def _values(runs: Sequence[Mapping[str, Any]], edge: str, measure: str) -> list[float]:
    return [run["edges"][edge][measure] for run in runs if run["edges"][edge][measure] is not None]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--case", dest="names", action="append", default=[], choices=[*CASES])
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time, each a process")
    options = parser.parse_args()
    print("\n".join(lines(main(options.seeds, options.names, options.at_once))))
