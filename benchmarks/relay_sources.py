"""The recipe `pairs` on other pictures: `python -m benchmarks.relay_sources [--seeds 1] [--case NAME ...]`.

MNIST's digits, divided over two edges as the recipe divides scikit-learn's; and an edge with all of MNIST's digits
beside one with emoji, of which each has a caption of its own. Both are read below `ECOGEN_DATA` (`mnist/mnist.npz`,
`emoji/captions.jsonl`); skipped where they are not. The settings are the recipe's, chosen on scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from benchmarks.common import circumstances, skip, wait_until_quiet, write_result
from ecogen import config as recipes
from ecogen.engines import session
from ecogen.engines.saving import FACTS
from ecogen.errors import EcoGenError
from ecogen.reports.summary import RunFacts

CASES = {
    "mnist": ["data.sources.edge-0.name=mnist", "data.sources.edge-1.name=mnist"],
    "mnist and emoji": [
        'data.sources={edge-0={name="mnist"},edge-1={name="emoji"}}',
        "data.validation=16",
        "data.test=30",
    ],
}
MEASURES = ("recognised", "caption_accuracy", "copies")


def carry_out(seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """One run: figures of each edge, and its lessons."""
    recipe = recipes.load("pairs", [f"seed={seed}", "evaluation.requests=0", "evaluation.crossings=0", *overrides])
    with tempfile.TemporaryDirectory(prefix="ecogen-sources-") as temporary:
        folder = Path(temporary) / "pairs"
        summary = asyncio.run(session.run(recipe, folder, resume=False, screen=Console(stderr=True)))
        facts = msgspec.json.decode((folder / FACTS).read_bytes(), type=RunFacts)
    relay = summary["relay"]
    assert relay is not None
    return {
        "perplexity": {edge: [of["delivered"], of["tuned"]] for edge, of in (summary["perplexity"] or {}).items()},
        "edges": {edge: {name: getattr(of, name) for name in MEASURES} for edge, of in facts.drawings.items()},
        "lessons": [
            {name: one[name] for name in ("node_id", "accepted", "reason", "num_samples", "new", "known")}
            for way in ("up", "down")
            for one in relay[way]
        ],
        "wall_s": summary["wall_s"],
    }


def main(seeds: int = 1, names: Sequence[str] = ()) -> dict[str, Any]:
    """Measure, write benchmarks/results/relay_sources.json after each run, and return it."""
    quiet, runs = wait_until_quiet(), dict[str, list[dict[str, Any]]]()
    result: dict[str, Any] = {}
    for name in names or CASES:
        for seed in range(seeds):
            try:
                runs.setdefault(name, []).append(carry_out(seed, CASES[name]))
            except EcoGenError as problem:
                skip(str(problem))
            result = circumstances(("torch", "transformers")) | {"others_before": quiet, "seeds": seeds, "cases": runs}
            write_result("relay_sources", result)
    return result


def lines(result: Mapping[str, Any]) -> list[str]:
    """Each case's means over seeds, for people."""
    return [line(name, edge, runs) for name, runs in result["cases"].items() for edge in runs[0]["edges"]]


def line(name: str, edge: str, runs: Sequence[Mapping[str, Any]]) -> str:
    figures = {
        measure: [run["edges"][edge][measure] for run in runs if run["edges"][edge][measure] is not None]
        for measure in MEASURES
    }
    told = [f"{measure} {statistics.fmean(values):.3f}" for measure, values in figures.items() if values]
    before, after = (statistics.fmean(run["perplexity"][edge][place] for run in runs) for place in (0, 1))
    return f"{name}, {edge}: perplexity {before:.1f} to {after:.1f}, {', '.join(told)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--case", dest="names", action="append", default=[], choices=[*CASES])
    options = parser.parse_args()
    print("\n".join(lines(main(options.seeds, options.names))))
