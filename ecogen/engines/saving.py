"""The run folder: what a run was asked, what it recorded, and what came out of it.

recipe.toml recipe.json   the resolved recipe
records.jsonl             every record, as the cloud kept it
facts.json summary.json   what the report needs besides the records, and the figures of `ecogen run --json`
backbone/                 the foundation model, as save_pretrained writes it
tunables.safetensors      everything that was tuned; what edges share, where they know different labels
edges/                    then each edge's whole model, by its id
adapter/                  the same as a PEFT directory, where there is LoRA or IA3; of a text model, all of it
report.html               made from the files above, again at any time
nodes/ certificates/      the nodes' disks and identities, for --resume
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ecogen import config as recipes
from ecogen.accounting.ledger import settle
from ecogen.engines.run_folder import (
    NODES,
    RECIPE,
    SUMMARY,
    check_ended,
    check_same,
    earlier_s,
    load_recipe,
    write_recipe,
)
from ecogen.errors import RunError
from ecogen.measurements import VersionQuality
from ecogen.metering.hardware import describe_host
from ecogen.models.adapters import (
    BACKBONE,
    EDGES,
    classification_config,
    load_tuned,
    load_with,
    save_by_edge,
    save_text,
    save_tuned,
)
from ecogen.models.checkpoint import Foundation
from ecogen.models.pair_model import PairModel
from ecogen.models.profile import shape_of
from ecogen.placement import Segment
from ecogen.planning.clusters import place_clusters
from ecogen.planning.cost import num_adapter_parameters, num_parameters, num_tunables
from ecogen.records import Record, read_records, to_line
from ecogen.relay import versions
from ecogen.relay.assessment import Assessor
from ecogen.reports.html import write_report
from ecogen.reports.summary import RunFacts, Summary, summarise
from ecogen.storage import write_atomically
from ecogen.tuning.data import load_splits
from ecogen.tuning.inversion import attack_first_cut
from ecogen.tuning.labels import LabelSet, without_heads
from ecogen.tuning.pair_data import domain_at
from ecogen.tuning.passages import Passages, perplexity
from ecogen.tuning.probe import probe_foundation
from ecogen.tuning.task import task_of
from ecogen.tuning.text import is_here

RECORDS, FACTS, REPORT = "records.jsonl", "facts.json", "report.html"

_BATCH = 128

_JUDGED = 12
"""Versions of each node, the last ones: each takes seconds."""


def save_run(
    folder: Path,
    recipe: recipes.Recipe,
    records: Sequence[Record],
    foundation: Foundation,
    tunables: Mapping[str, Tensor],
    wall_s: float,
    engine: str,
    edges: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({}),
) -> Summary:
    """Write everything that outlives the federation; returns the summary.

    Args:
        edges: each edge's own tunables, where `keeps_edges`.
    """
    if (folder / RECIPE).exists():
        check_same(recipe, folder)
    write_recipe(folder, recipe)
    wall_s += earlier_s(folder, [record.time_s for record in records])
    labels = {edge_id: _labels(recipe, edge_id, own) for edge_id, own in edges.items()}
    if foundation.is_text:
        save_text(folder, foundation, {} if edges and not recipe.relay.is_on else tunables, recipe.tunables, edges)
    elif len(set(labels.values())) > 1:
        by_edge = {edge_id: (own, labels[edge_id]) for edge_id, own in edges.items()}
        shared = without_heads(tunables) if recipe.tuning.cloud_every else {}
        save_by_edge(folder, foundation, shared, by_edge, recipe.tunables)
        tunables = next(iter(edges.values()))
    else:
        known = next(iter(labels.values()), range(_num_labels(tunables)))
        save_tuned(folder, foundation, tunables, recipe.tunables, known)
    write_atomically(folder / RECORDS, b"".join(map(to_line, records)))
    facts = gather_facts(recipe, foundation, _num_labels(tunables), tunables, wall_s, engine)
    if len(set(labels.values())) > 1 and recipe.evaluation.split != "none":
        scores = {edge_id: _score(folder, recipe, edge_id, LabelSet(known)) for edge_id, known in labels.items()}
        counts = {edge_id: count for edge_id, (_, count) in scores.items()}
        accuracies = {edge_id: correct / count for edge_id, (correct, count) in scores.items() if count}
        facts = replace(facts, num_evaluated=counts, saved_accuracy=accuracies)
    if foundation.is_text:
        facts = _with_judgement(facts, folder, recipe, edges)
    write_atomically(folder / FACTS, msgspec.json.encode(facts))
    return rebuild_report(folder)


def judge_again(folder: Path) -> Summary:
    """Measure the saved language models anew, of which one was replaced, and make the report of it.

    Raises:
        RunError: if a file is missing or damaged.
        DataError: if the data is no more there.
    """
    recipe, facts = load_recipe(folder), _load_facts(folder)
    edges = [path.name for path in sorted((folder / EDGES).glob("*"))]
    write_atomically(folder / FACTS, msgspec.json.encode(_with_judgement(facts, folder, recipe, edges)))
    return rebuild_report(folder)


def _with_judgement(facts: RunFacts, folder: Path, recipe: recipes.Recipe, own: Collection[str]) -> RunFacts:
    """How well the saved language models do; `own` are the edges that have one each."""
    facts = replace(facts, saved_perplexity=_perplexities(folder, recipe, own))
    return replace(facts, **_judged(folder, recipe, own)) if recipe.data.is_pairs else facts


def keeps_edges(recipe: recipes.Recipe) -> bool:
    """Whether each edge's own model is kept: those with labels of their own, and language models that stay alone."""
    return bool(recipe.data.labels_of_edges) or (recipe.data.is_text and not recipe.tuning.cloud_every)


def _labels(recipe: recipes.Recipe, edge_id: str, tunables: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The labels that an edge knows: those of its own head."""
    return tuple(sorted(recipe.data.labels_of_edges.get(edge_id, range(_num_labels(tunables)))))


def _num_labels(tunables: Mapping[str, Tensor]) -> int:
    return int(tunables["classifier.bias"].shape[0]) if "classifier.bias" in tunables else 10


@torch.no_grad()
def _score(folder: Path, recipe: recipes.Recipe, edge_id: str, labels: LabelSet) -> tuple[int, int]:
    """How many examples of its labels an edge's saved model gets right, and of how many."""
    splits = load_splits(recipe.data, recipe.model.image_size, recipe.seed)
    examples = labels.keep(getattr(splits, recipe.evaluation.split))
    model = load_tuned(folder, edge=edge_id)
    right = 0
    for start in range(0, len(examples), _BATCH):
        logits = model(pixel_values=examples.images[start : start + _BATCH]).logits
        right += int((logits.argmax(-1) == examples.labels[start : start + _BATCH]).sum())
    return right, len(examples)


@torch.no_grad()
def _perplexities(folder: Path, recipe: recipes.Recipe, own: Collection[str]) -> dict[str, float]:
    """What the saved model reaches on each edge's held-out passages, as far as they are on this machine.

    Args:
        own: the edges that have a model of their own.
    """
    topology = recipes.build_topology(recipe.topology)
    task = task_of(recipe, topology, folder / BACKBONE)
    last = recipe.tuning.rounds - 1
    held_out = {
        edge_id: task.evaluated(edge_id, domain_at(recipe.data, edge_id, last))
        for edge_id in topology.edge_ids
        if is_here(recipe.data, edge_id)
    }
    return {
        edge: _perplexity(load_tuned(folder, edge=edge if edge in own else None), passages)
        for edge, passages in held_out.items()
        if isinstance(passages, Passages)
    }


def _judged(folder: Path, recipe: recipes.Recipe, own: Collection[str]) -> dict[str, Any]:
    """How well the saved models draw and describe what each edge knows, as fields of `RunFacts`."""
    assessor = Assessor.of(recipe, recipes.build_topology(recipe.topology).edge_ids)
    edges = list(assessor.splits)
    models = {edge: _pair_model(folder, edge if edge in own else None) for edge in edges}
    judged: dict[str, Any] = {"drawings": {edge: assessor.drawings(edge, model) for edge, model in models.items()}}
    if recipe.relay.is_on:
        cloud = _pair_model(folder, None)
        judged["cloud_drawings"] = {edge: assessor.drawings(edge, cloud) for edge in edges}
        judged["by_version"] = tuple(_by_version(folder, assessor))
    return judged | {"data_bytes": assessor.data_bytes}


def _by_version(folder: Path, assessor: Assessor) -> Iterator[VersionQuality]:
    """How the versions that are on this machine do, of each domain: the last ones of each node."""
    number = assessor.recipe.evaluation.drawings // 2
    for own in sorted((folder / NODES).glob(f"*/{versions.FOLDER}")):
        for version in [*versions.kept(own).values()][-_JUDGED:]:
            model = PairModel.of(load_with(folder, versions.load(own, version.number)), folder / BACKBONE)
            for edge in assessor.splits:
                quality = assessor.quality(edge, model, number)
                yield VersionQuality(own.parent.name, version.number, version.what, version.cycle, edge, quality)


def _pair_model(folder: Path, edge: str | None) -> PairModel:
    return PairModel.of(load_tuned(folder, edge=edge), folder / BACKBONE)


def _perplexity(model: PreTrainedModel, passages: Passages) -> float:
    total = sum(
        float(cross_entropy(model(row.tokens).logits[0], row.labels[0], reduction="sum"))
        for row in passages.split(len(passages))
    )
    return perplexity(total, passages)


def rebuild_report(folder: Path) -> Summary:
    """Write report.html and summary.json anew from the other files.

    Raises:
        RunError: if a file is missing or damaged.
    """
    recipe, records, facts = load_recipe(folder), load_records(folder), _load_facts(folder)
    topology = recipes.build_topology(recipe.topology)
    ledger = settle(records, topology)
    summary = summarise(records, ledger, recipe, topology, facts)
    write_atomically(folder / SUMMARY, json.dumps(summary, indent=2))
    write_report(folder / REPORT, records, ledger, recipe, topology, facts)
    return summary


def _load_facts(folder: Path) -> RunFacts:
    try:
        return msgspec.json.decode((folder / FACTS).read_bytes(), type=RunFacts)
    except (OSError, msgspec.MsgspecError) as problem:
        check_ended(folder)
        raise RunError(
            f"{folder / FACTS} cannot be read ({problem}); restore it, or carry the run out anew"
        ) from problem


def load_records(folder: Path) -> list[Record]:
    """The records of a run folder.

    Raises:
        RunError: if there are none, or the file is damaged.
    """
    try:
        lines = (folder / RECORDS).read_bytes().splitlines(keepends=True)
    except OSError as problem:
        check_ended(folder)
        raise RunError(f"{folder / RECORDS}: {problem.strerror}; restore it, or carry the run out anew") from problem
    return read_records(lines, str(folder / RECORDS))


def gather_facts(
    recipe: recipes.Recipe,
    foundation: Foundation,
    num_labels: int,
    tunables: Mapping[str, Tensor],
    wall_s: float,
    engine: str,
) -> RunFacts:
    """Sizes, host, placement, and the closing measurements that the recipe asks for."""
    config = foundation.config if foundation.is_text else classification_config(foundation, num_labels)
    shape = shape_of(config, recipe)
    whole = Segment(0, shape.num_blocks, has_embedding=True, has_head=True)
    attacks = attack_first_cut(foundation, recipe, tunables) if recipe.evaluation.inversion else ()
    probes = recipe.model.source == "pretrain" and not foundation.is_text
    return RunFacts(
        tunable_parameters=num_tunables(shape, whole),
        total_parameters=num_parameters(shape, whole) + num_adapter_parameters(shape, whole),
        wall_s=wall_s,
        engine=engine,
        host=describe_host_line(),
        versions=describe_host().versions,
        probe=probe_foundation(foundation, recipe) if probes else None,
        inversion=attacks,
        placements=place_clusters(recipe, shape),
    )


def describe_host_line() -> str:
    """The host in one line."""
    host = describe_host()
    return f"{host.cpu}, {host.num_cores} cores, {host.memory_bytes / 2**30:.0f} GiB, {host.system}"
