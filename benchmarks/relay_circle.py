"""The circle: `python -m benchmarks.relay_circle [--seeds 5] [--cycles 3] [--workers 2] [--set KEY=VALUE ...]`.

Two edges tune the generator of `ecogen run pairs` on their own handwritten digits, 0 to 4 and 5 to 9, and in each cycle
exchange lessons with the cloud: tune, up, down. Beside it stand, with the same data, rounds and seeds:

- no relay: each edge stays alone, and the cloud what it was;
- real data: lessons are the edges' real training pairs instead of drawings, as if data might travel (an upper bound);
- relay and averaging: edges send their tunables along, and the cloud begins to learn on the way to their mean;
- averaging only: the cloud averages the edges' tunables where the relay would exchange lessons.

Rounds of tuning are as many everywhere; a lesson is more steps besides, which edges that stay alone do not take.

After each cycle the models of the edges and of the cloud draw and describe both domains, judged as a run judges them:
by a classifier of real images, and on test pairs that nobody tunes on. All are also asked to read letters.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.common import RESULTS, circumstances, wait_until_quiet, write_result
from benchmarks.relay_circle_page import circle_page
from ecogen import config as recipes
from ecogen.config import Recipe
from ecogen.engines.inproc import launch_inproc
from ecogen.models.adapters import load_whole
from ecogen.models.pair_model import PairModel
from ecogen.models.tunables import get_tunables
from ecogen.records import Record, RelayRecord
from ecogen.relay.assessment import Assessor
from ecogen.relay.cloud_learner import Exchange, Learner
from ecogen.relay.cloud_state import RelayState
from ecogen.relay.edge import Asked, EdgeRelay
from ecogen.relay.generator import Generator, keyed
from ecogen.relay.samples import Samples, balanced
from ecogen.relay.teacher import Lesson
from ecogen.runtime.stage import Stage
from ecogen.storage import write_atomically
from ecogen.tuning.edge_state import EdgeState
from ecogen.tuning.foundation import obtain_foundation
from ecogen.tuning.pair_data import PairSplits
from ecogen.tuning.pretrain_pairs import glyph_captions, glyph_views
from ecogen.tuning.rounds import EdgeRounds

EDGES = ("edge-0", "edge-1")
CLOUD = "cloud"
EVERY = 2
DRAWINGS = 100
JUDGED = ("recognised", "caption_accuracy")
GLYPHS = 400

SMALL = [
    "engine=inproc",
    "topology.devices_per_cluster=1",
    "data.train=300",
    f"relay.every={EVERY}",
    "relay.samples=800",
    "relay.steps=400",
    "evaluation.split=none",
    "evaluation.requests=0",
    "evaluation.crossings=0",
]
"""One device a cluster, since a chain computes what the whole model does; less data, so that more would be of use."""

VARIANTS: dict[str, list[str]] = {
    "relay": [],
    "no relay": ["relay.every=0"],
    "real data": [],
    "relay and averaging": ["relay.tunables=true"],
    "averaging only": ["relay.every=0", f"tuning.cloud_every={EVERY}"],
}

Models = dict[tuple[int, str], Mapping[str, Tensor]]
"""Tunables by cycle, from 1 on, and node."""


@dataclass
class Seen:
    """What a variant left."""

    models: Models = field(default_factory=dict)
    records: Sequence[Record] = ()


def recipe_of(variant: str, seed: int, cycles: int, overrides: Sequence[str]) -> Recipe:
    """The recipe of one run."""
    more = [f"seed={seed}", f"tuning.rounds={cycles * EVERY}", *VARIANTS[variant]]
    return recipes.load("pairs", [*SMALL, *overrides, *more])


@contextmanager
def watched(seen: Seen) -> Iterator[None]:
    """Keep the models as they are when each cycle has ended."""
    commit, learn = EdgeRounds._commit, Learner.learn

    async def _commit(self: EdgeRounds, state: EdgeState) -> None:
        await commit(self, state)
        if state.next_round and state.next_round % EVERY == 0:  # the last commit of a cycle is what it ends with
            seen.models[state.next_round // EVERY, self._node_id] = dict(state.tunables)

    def _learn(self: Learner, before: RelayState, asked: Exchange, *rest: Any) -> RelayState:
        state = learn(self, before, asked, *rest)
        seen.models[asked.cycle + 1, CLOUD] = dict(state.tunables)
        return state

    with patch.object(EdgeRounds, "_commit", _commit), patch.object(Learner, "learn", _learn):
        yield


@contextmanager
def real_lessons(splits: Mapping[str, PairSplits]) -> Iterator[None]:
    """Lessons are the edges' training pairs."""

    def of_edge(self: EdgeRelay, asked: Asked, _: Mapping[str, Tensor]) -> Lesson:
        return real_lesson(self._generator, self._spec.samples, [self._node_id], splits, asked.cycle)

    def of_cloud(self: Learner, asked: Exchange, _: RelayState, __: Sequence[Samples]) -> Lesson:
        return real_lesson(self.generator, self.spec.samples, EDGES, splits, asked.cycle)

    with patch.object(EdgeRelay, "_teach", of_edge), patch.object(Learner, "_drawn", of_cloud):
        yield


def real_lesson(
    generator: Generator, number: int, edges: Sequence[str], splits: Mapping[str, PairSplits], cycle: int
) -> Lesson:
    """So many training pairs of these edges, balanced over captions."""
    parts = [splits[edge].train for edge in edges]
    captions = [caption for part in parts for caption in part.captions]
    codes = generator._model.images.encode(torch.cat([part.images for part in parts]))
    samples = Samples(codes, captions, {caption: captions.count(caption) for caption in set(captions)})
    chosen = balanced(samples, number, keyed([cycle]))
    return Lesson(chosen, len(chosen))


async def run(variant: str, recipe: Recipe, assessor: Assessor) -> Seen:
    """One federation, from its start to its end."""
    seen = Seen()
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="ecogen-circle-") as folder:
        stack.enter_context(watched(seen))
        if variant == "real data":
            stack.enter_context(real_lessons(assessor.splits))
        async with launch_inproc(recipe, Path(folder)) as federation:
            async for _ in federation.watch():
                pass
            seen.records = federation.records
    return seen


@dataclass(frozen=True)
class Jury:
    """Judges models, whatever federation they are of."""

    recipe: Recipe
    assessor: Assessor
    stage: Stage
    folder: Path
    first: Mapping[str, Tensor]

    @classmethod
    def of(cls, recipe: Recipe) -> Jury:
        """The jury of one seed."""
        foundation, _ = obtain_foundation(recipe, lambda *_: None)
        whole = load_whole(foundation, foundation.config, recipe.tunables, recipe.seed)
        stage = Stage(whole)
        return cls(recipe, Assessor.of(recipe, EDGES), stage, foundation.folder, get_tunables(whole))

    def scores(self, tunables: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
        """How a model draws and describes each edge's domain, and reads letters."""
        self.stage.begin(tunables)
        model = PairModel.of(self.stage.model.whole, self.folder)
        domains = {edge: asdict(self.assessor.quality(edge, model, DRAWINGS)) for edge in EDGES}
        return domains | {"letters": {"read": self._letters(model)}}

    def _letters(self, model: PairModel) -> float:
        """The share of glyphs whose character is named."""
        sizes, captions = self.recipe.model, glyph_captions()
        images, chosen = glyph_views(sizes.num_channels, sizes.image_size)(GLYPHS, torch.Generator().manual_seed(1))
        said = [text.split()[-1:] for text in model.describe(images)]
        return share(said, [captions[index].split()[-1:] for index in chosen.tolist()])


def share(ours: Sequence[object], theirs: Sequence[object]) -> float:
    return sum(one == other for one, other in zip(ours, theirs, strict=True)) / len(ours)


def measure(variant: str, seed: int, cycles: int, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each cycle, model, domain and measure of one run; cycle 0 is the model that was delivered."""
    recipe = recipe_of(variant, seed, cycles, overrides)
    began_s, jury = time.perf_counter(), Jury.of(recipe)
    seen = asyncio.run(run(variant, recipe, jury.assessor))
    rows = []
    for cycle in range(cycles + 1):
        for node in (*EDGES, CLOUD):
            if cycle == 0 and node != CLOUD:
                continue
            scores = jury.scores(model_of(seen, cycle, node, variant, jury.first))
            rows += [
                {"variant": variant, "seed": seed, "cycle": cycle, "node": node, "domain": domain, "measure": name}
                | {"value": value}
                for domain, of in scores.items()
                for name, value in of.items()
            ]
    told = [record for record in seen.records if isinstance(record, RelayRecord)]
    refused = [f"{one.node_id} in cycle {one.cycle + 1}: {one.reason}" for one in told if not one.accepted]
    print(f"{variant}, seed {seed}: {time.perf_counter() - began_s:.0f} s; refused: {refused or 'nothing'}", flush=True)
    return rows


def model_of(seen: Seen, cycle: int, node: str, variant: str, first: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A node's tunables after a cycle; with averaging the cloud has what all edges have."""
    if node == CLOUD and variant == "averaging only" and cycle:
        node = EDGES[0]
    is_first = cycle == 0 or (node == CLOUD and variant == "no relay")
    return first if is_first else seen.models[cycle, node]


def summed_up(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation, least and most over seeds, by variant, node, domain, measure and cycle."""
    values: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in rows:
        key = (row["variant"], row["node"], row["domain"], row["measure"], str(row["cycle"]))
        values[key].append(row["value"])
    table: dict[str, Any] = {}
    for path, of in values.items():
        place = table
        for name in path[:-1]:
            place = place.setdefault(name, {})
        spread = statistics.stdev(of) if len(of) > 1 else 0.0
        place[path[-1]] = {"mean": statistics.fmean(of), "deviation": spread, "least": min(of), "most": max(of)}
    return table


def goals(table: Mapping[str, Any], cycles: int) -> dict[str, bool]:
    """What the relay is for: the cloud better on every domain than before, and no worse than a point on letters."""
    cloud, last = table["relay"][CLOUD], str(cycles)
    better = {
        f"the cloud, {edge}, {name}": cloud[edge][name][last]["mean"] > cloud[edge][name]["0"]["mean"]
        for edge in EDGES
        for name in JUDGED
    }
    letters = cloud["letters"]["read"]
    return better | {"letters at most 1 point worse": letters[last]["mean"] >= letters["0"]["mean"] - 0.01}


def lines(result: Mapping[str, Any]) -> list[str]:
    """What the last cycle ended with, for people."""
    last = str(result["cycles"])
    found = []
    for variant, nodes in result["table"].items():
        for node, domains in nodes.items():
            told = [
                f"{domain} " + " / ".join(f"{100 * domains[domain][name][last]['mean']:.0f}" for name in JUDGED)
                for domain in EDGES
            ]
            found.append(f"{variant}, {node}: recognised / captions right, %: {', '.join(told)}")
    return found


def main(
    seeds: int = 5,
    cycles: int = 3,
    overrides: Sequence[str] = (),
    variants: Sequence[str] = (),
    workers: int = 2,
    kept: Path | None = None,
) -> None:
    """Measure, and write benchmarks/results/relay_circle.json and .html after every run.

    Args:
        workers: processes that measure side by side: figures are of quality, not of time.
        kept: a file of rows that were measured before, which is added to.
    """
    settings = {"cycles": cycles, "settings": [*SMALL, *overrides]}
    quiet, rows = wait_until_quiet(), list(read_rows(kept, settings)) if kept and kept.exists() else []
    done = {(row["variant"], row["seed"]) for row in rows}
    jobs = [(variant, seed) for seed in range(seeds) for variant in variants or VARIANTS if (variant, seed) not in done]
    result = result_of(rows, settings) | {"others_before": quiet}
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        measuring = [pool.submit(measure, *job, cycles, overrides) for job in jobs]
        for measured in as_completed(measuring):
            rows += measured.result()
            if kept:
                write_atomically(kept, "".join(json.dumps(row | settings) + "\n" for row in rows))
            result = result_of(rows, settings) | {"others_before": quiet}
            write_result("relay_circle", result)
            write_atomically(RESULTS / "relay_circle.html", circle_page(result))
    for line in lines(result):
        print(line)
    for goal, met in result["goals"].items():
        print(f"{'reached' if met else 'MISSED'}: {goal}")


def read_rows(path: Path, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows that were measured before.

    Raises:
        SystemExit: if any was with other settings.
    """
    for row in map(json.loads, path.read_text().splitlines()):
        if any(row.get(name) != value for name, value in settings.items()):
            raise SystemExit(f"{path} has rows of other settings than {settings}; give another file")
        yield row


def result_of(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is written."""
    table = summed_up(rows)
    return circumstances(("torch", "transformers")) | {
        "seeds": {variant: len({row["seed"] for row in rows if row["variant"] == variant}) for variant in table},
        **settings,
        "table": table,
        "goals": goals(table, settings["cycles"]) if "relay" in table else {},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--variant", dest="variants", action="append", default=[], choices=[*VARIANTS])
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    parser.add_argument("--rows", type=Path, help="where rows are kept, so that what was cut off can be gone on with")
    options = parser.parse_args()
    main(options.seeds, options.cycles, options.overrides, options.variants, options.workers, options.rows)
