"""A study as one JSON object: what each row of its table reached, over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import correlation, fmean, stdev
from typing import TypedDict

from ecogen.config import Row, Study
from ecogen.records import LINK_CLASSES
from ecogen.reports.summary import Summary

Scores = Mapping[str, float]
"""Accuracy by the name of a classifier."""


class Spread(TypedDict):
    """Mean and standard deviation over seeds."""

    mean: float
    sd: float


class ToTarget(TypedDict):
    """What a row took to reach the target, as means over its runs: up to the first round whose mean accuracy does."""

    rounds: int
    energy_j: dict[str, float]
    sent_bytes: float
    wall_s: float


class Greenest(TypedDict):
    """Of a part whose rows have as many clusters: the accuracy that they are compared at, and who reached it with the
    least energy; None where nobody did."""

    target: float
    case: str | None


class StudyRow(TypedDict):
    """One row: accuracies in [0, 1], over seeds; what a run took, as means."""

    name: str
    clusters: int
    first_mean: float
    first_sd: float
    last_mean: float
    last_sd: float
    seeds: int
    first: list[float]
    last: list[float]
    reference: dict[str, float] | None
    beside: dict[str, Spread]
    tunable_fraction: float
    lora_error: float | None
    sent_bytes: float
    d2d_bytes: float
    flops: float
    energy_j: float
    wall_s: float
    to_target: ToTarget | None


class Trend(TypedDict):
    """Whether more clusters do better, over the rows of the part `table`.

    Attributes:
        gain: mean last accuracy of the row with most clusters less that of the row with fewest.
        standard_error: of the gain, the two rows taken as independent.
        spearman: rank correlation of clusters and last accuracy, over all runs.
        spearman_by_seed: the same within each seed.
    """

    gain: float
    standard_error: float
    spearman: float
    spearman_by_seed: list[float]


class StudySummary(TypedDict):
    """The JSON object of a study.

    Attributes:
        table: the rows over the number of clusters.
        parts: the other rows, by the part of the table that they stand in.
        split: of the examples that accuracies are of.
        greenest: by part.
    """

    name: str
    seeds: list[int]
    source: str
    split: str
    runs_done: int
    runs_planned: int
    table: list[StudyRow]
    parts: dict[str, list[StudyRow]]
    trend: Trend | None
    greenest: dict[str, Greenest]


def summarise_study(
    study: Study, summaries: Mapping[tuple[str, int], Summary], beside: Mapping[tuple[str, int], Scores]
) -> StudySummary:
    """The JSON object of a study, however far it came.

    Args:
        summaries: by the name of a row's case and the seed, of the runs that have finished.
        beside: the same for classifiers that saw all training images of a run in one place.
    """
    parts: dict[str, list[StudyRow]] = {"table": []}
    for row in study.rows:
        done = [(row.case.name, seed) for seed in study.sweep.seeds if (row.case.name, seed) in summaries]
        if done:
            others = [beside[key] for key in done if key in beside]
            parts.setdefault(row.case.part, []).append(_row(row, [summaries[key] for key in done], others))
    runs_of = {
        row.case.name: [run for (name, _), run in summaries.items() if name == row.case.name] for row in study.rows
    }
    greenest = {
        part: _compare(rows, runs_of, study.sweep.target)
        for part, rows in parts.items()
        if len(rows) > 1 and len({row["clusters"] for row in rows}) == 1
    }
    table = parts.pop("table")
    return {
        "name": study.name,
        "seeds": list(study.sweep.seeds),
        "source": study.sweep.source,
        "split": study.rows[0].recipe.evaluation.split,
        "runs_done": len(summaries),
        "runs_planned": len(study.rows) * len(study.sweep.seeds),
        "table": table,
        "parts": parts,
        "trend": _trend(table, len(study.sweep.seeds)),
        "greenest": greenest,
    }


def _compare(rows: Sequence[StudyRow], runs_of: Mapping[str, Sequence[Summary]], asked: float | None) -> Greenest:
    """Write into each row what it took to reach the target; returns who took least."""
    target = 0.99 * max(row["last_mean"] for row in rows) if asked is None else asked
    for row in rows:
        row["to_target"] = _to_target(runs_of[row["name"]], target)
    reached = [row for row in rows if row["to_target"]]
    return {"target": target, "case": min(reached, key=energy_to_target)["name"] if reached else None}


def _to_target(runs: Sequence[Summary], target: float) -> ToTarget | None:
    """None where the mean accuracy of no round reaches it; runs that ended early count up to their last round."""
    for index in range(max(len(run["spent"]) for run in runs)):
        shares = [run["accuracy"]["per_round"][: index + 1] for run in runs]
        measured = [[share for share in own if share is not None] for own in shares]
        if all(measured) and fmean(own[-1] for own in measured) >= target:
            spent = [run["spent"][: index + 1][-1] for run in runs]
            energy_j = {key: fmean(one["energy_j"][key] for one in spent) for key in ("low", "mid", "high")}
            return {
                "rounds": index + 1,
                "energy_j": energy_j,
                "sent_bytes": fmean(one["sent_bytes"] for one in spent),
                "wall_s": fmean(one["wall_s"] for one in spent),
            }
    return None


def energy_to_target(row: StudyRow) -> float:
    """Of a row: joules, infinite where it never reached the target."""
    return row["to_target"]["energy_j"]["mid"] if row["to_target"] else math.inf


def _row(row: Row, runs: Sequence[Summary], beside: Sequence[Scores]) -> StudyRow:
    first = [_measured(run["accuracy"]["first"]) for run in runs]
    last = [_measured(run["accuracy"]["last"]) for run in runs]
    reference = row.case.reference
    errors = [error for run in runs if (error := run.get("lora_error")) is not None]
    return {
        "name": row.case.name,
        "clusters": row.num_clusters,
        "first_mean": fmean(first),
        "first_sd": _sd(first),
        "last_mean": fmean(last),
        "last_sd": _sd(last),
        "seeds": len(runs),
        "first": first,
        "last": last,
        "reference": {"first": reference.first, "last": reference.last} if reference else None,
        "beside": {name: _spread([scores[name] for scores in beside]) for name in (beside[0] if beside else ())},
        "tunable_fraction": fmean(run["tunable_fraction"] for run in runs),
        "lora_error": fmean(errors) if errors else None,
        "sent_bytes": fmean(sum(run["traffic_bytes"][link] for link in LINK_CLASSES) for run in runs),
        "d2d_bytes": fmean(run["traffic_bytes"]["d2d"] for run in runs),
        "flops": fmean(run["flops"] for run in runs),
        "energy_j": fmean(float(run["energy_j"]["mid"]) for run in runs),
        "wall_s": fmean(run["wall_s"] for run in runs),
        "to_target": None,
    }


def _measured(accuracy: float | None) -> float:
    assert accuracy is not None, "a study has no case without an evaluation"
    return accuracy


def _trend(rows: Sequence[StudyRow], num_seeds: int) -> Trend | None:
    """None where no number of clusters is compared with another, each by all seeds and by two or more."""
    ordered = sorted(rows, key=lambda row: row["clusters"])
    if len({row["clusters"] for row in rows}) < 2 or min(row["seeds"] for row in rows) < max(2, num_seeds):
        return None
    fewest, most = ordered[0], ordered[-1]
    variance = sum(row["last_sd"] ** 2 / row["seeds"] for row in (fewest, most))
    return {
        "gain": most["last_mean"] - fewest["last_mean"],
        "standard_error": math.sqrt(variance),
        "spearman": _spearman([(row["clusters"], last) for row in ordered for last in row["last"]]),
        "spearman_by_seed": [
            _spearman([(row["clusters"], row["last"][seed]) for row in ordered]) for seed in range(num_seeds)
        ],
    }


def _spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Rank correlation (Spearman 1904): Pearson's of the ranks; 0 where one side is all the same."""
    sides = [_ranks(side) for side in zip(*pairs, strict=True)]
    return correlation(*sides) if all(len(set(side)) > 1 for side in sides) else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    """The mean rank of each value among all, so that equal ones share theirs."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def _spread(values: Sequence[float]) -> Spread:
    return {"mean": fmean(values), "sd": _sd(values)}


def _sd(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
