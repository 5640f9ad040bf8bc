"""What differential privacy of pairs costs an edge's generator: `python -m benchmarks.relay_privacy [--seeds 5]`.

The first edge of the recipe `pairs`, without lessons: as the recipe has it; with the sizes of the private runs, but
neither clipped nor noised; and with DP-SGD at two epsilons. What its model draws and says of real test pairs, how well
its members are told, and what a round takes. Each seed is another division of the pairs; noise and draws are never the
same twice. Sizes and rates were chosen on validation pairs; see docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from benchmarks.common import circumstances, wait_until_quiet, write_result
from ecogen import config as recipes
from ecogen.engines import session
from ecogen.engines.saving import FACTS, load_records
from ecogen.measurements import Drawings
from ecogen.records import RoundRecord
from ecogen.reports.summary import RunFacts, Summary

ALONE = [
    "topology.edges=1",
    "topology.sites={}",
    'data.sources={"edge-0"={name="digits",labels=[0,1,2,3,4]}}',
    "relay.every=0",
    "evaluation.requests=0",
]
SIZES = [
    "tuning.batch_size=350",
    "tuning.local_epochs=2",
    "tuning.learning_rate=0.03",
    "tuning.clip_norm=0",
    "tunables.lora_rank=1",
    "tunables.lora_alpha=2.0",
]
PRIVATE = [*SIZES, "privacy.unit=example", "privacy.delta=1e-4", "privacy.clip_norm=0.4"]
CASES = {
    "not private": [],
    "not private, sizes of the private": SIZES,
    "epsilon 8": [*PRIVATE, "privacy.noise_multiplier=1.3"],
    "epsilon 2": [*PRIVATE, "privacy.noise_multiplier=3.7"],
}
EPSILONS = {"epsilon 8": 8.0, "epsilon 2": 2.0}
MEASURES = ("recognised", "caption_accuracy", "frechet", "copies", "members_by_model", "members_by_drawings")


@dataclass(frozen=True)
class Run:
    """One run of one case: each edge's figures, and what its rounds took."""

    drawings: dict[str, Drawings]
    summary: Summary
    rounds: Sequence[RoundRecord]

    @property
    def round_s(self) -> float:
        return statistics.median(record.wall_s for record in self.rounds)

    @property
    def round_cpu_s(self) -> float:
        """Of an edge and its devices."""
        return statistics.median(sum(usage.cpu_s for usage in record.usages) for record in self.rounds)


def carry_out(seed: int, overrides: Sequence[str]) -> Run:
    """One seed of one case."""
    recipe = recipes.load("pairs", [f"seed={seed}", *ALONE, *overrides])
    with tempfile.TemporaryDirectory(prefix="ecogen-private-") as temporary:
        folder = Path(temporary) / "pairs"
        summary = asyncio.run(session.run(recipe, folder, resume=False, screen=Console(stderr=True)))
        facts = msgspec.json.decode((folder / FACTS).read_bytes(), type=RunFacts)
        records = [record for record in load_records(folder) if isinstance(record, RoundRecord)]
    return Run(dict(facts.drawings), summary, [record for record in records if record.node_id in facts.drawings])


def summary_of(runs: Sequence[Run]) -> dict[str, Any]:
    """Means over seeds, by edge and of both."""
    epsilons = [run.summary["privacy"] for run in runs]
    spent = [privacy["epsilon"] for privacy in epsilons if privacy is not None]
    edges = list(runs[0].drawings)
    return {
        "epsilon": round(max(spent), 4) if spent else None,
        "figures": {
            name: {edge: means([getattr(run.drawings[edge], name) for run in runs]) for edge in edges}
            | {"all": means([getattr(run.drawings[edge], name) for run in runs for edge in edges])}
            for name in MEASURES
        },
        "rounds": runs[0].summary["rounds"],
        "round_s": means([run.round_s for run in runs]),
        "round_cpu_s": means([run.round_cpu_s for run in runs]),
        "energy_j": means([float(run.summary["energy_j"]["mid"]) for run in runs]),
    }


def means(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": round(statistics.fmean(values), 4), "seeds": [round(value, 4) for value in values]}


def main(seeds: int = 5, first_seed: int = 0) -> dict[str, Any]:
    """Measure, write benchmarks/results/relay_privacy.json after each seed, and return it."""
    quiet = wait_until_quiet()
    runs: dict[str, list[Run]] = {name: [] for name in CASES}
    result: dict[str, Any] = {}
    for seed in range(first_seed, first_seed + seeds):
        for name, overrides in CASES.items():
            runs[name].append(carry_out(seed, overrides))
            print(f"seed {seed}, {line(name, summary_of(runs[name][-1:]))}", flush=True)
        result = circumstances(("torch", "transformers", "peft", "opacus")) | {
            "others_before": quiet,
            "seeds": list(range(first_seed, seed + 1)),
            "cases": {name: summary_of(own) for name, own in runs.items()},
        }
        result["goals"] = {
            f"{name} is kept": result["cases"][name]["epsilon"] <= most for name, most in EPSILONS.items()
        }
        write_result("relay_privacy", result)
    return result


def line(name: str, row: dict[str, Any]) -> str:
    """A case's figures for people."""
    found = {measure: row["figures"][measure]["all"]["mean"] for measure in MEASURES}
    spent = "" if row["epsilon"] is None else f" (spent {row['epsilon']:.2f})"
    return (
        f"{name}{spent}: recognised {found['recognised']:.3f}, captions right {found['caption_accuracy']:.3f}, "
        f"members told {found['members_by_model']:.3f} by the model, {found['members_by_drawings']:.3f} by drawings; "
        f"{row['round_s']['mean']:.1f} s and {row['round_cpu_s']['mean']:.1f} CPU s a round, "
        f"{row['energy_j']['mean']:.0f} J a run"
    )


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    told = [line(name, row) for name, row in result["cases"].items()]
    return [*told, *(f"{'reached' if met else 'MISSED'}: {goal}" for goal, met in result["goals"].items())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    print("\n".join(lines(main(options.seeds, options.first_seed))))
