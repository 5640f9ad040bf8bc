"""A study's figures are those of its runs, and its page says where it loses."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean, stdev
from typing import Any
from xml.etree import ElementTree

import pytest

from ecogen.config import Case, Recipe, Reference, Row, Study, Sweep, TopologyRecipe
from ecogen.reports.console import show_study
from ecogen.reports.study import StudySummary, summarise_study
from ecogen.reports.study_page import render_study

LAST = {1: [0.90, 0.92, 0.91], 3: [0.95, 0.93, 0.97]}
SEEDS = (0, 1, 2)


def study_of(*rows: tuple[str, int, str]) -> Study:
    cases = [
        Row(
            Case(name, part=part, reference=Reference(0.8, 0.9) if part == "table" else None, beside=part == "table"),
            Recipe(topology=TopologyRecipe(edges=1, clusters_per_edge=clusters)),
        )
        for name, clusters, part in rows
    ]
    return Study("pair", Sweep(tuple(row.case for row in cases), SEEDS, "somebody"), tuple(cases))


def run_of(first: float, last: float) -> Any:
    """As much of a run's summary as a study reads."""
    sent = {"cloud_edge": 1, "edge_end": 20, "d2d": 300}
    accuracy = {"first": first, "last": last, "per_round": [first, last]}
    energy_j = {"low": 1.0, "mid": 2.0, "high": 3.0}
    spent = [{"energy_j": {k: n * j for k, j in energy_j.items()}, "sent_bytes": 10 * n, "wall_s": n} for n in (1, 2)]
    return {
        "accuracy": accuracy,
        "spent": spent,
        "tunable_fraction": 0.02,
        "lora_error": None,
        "traffic_bytes": sent,
        "flops": 3e9,
        "energy_j": {"mid": 7.0},
        "wall_s": 3.0,
    }


STUDY = study_of(("one <b>", 1, "table"), ("three", 3, "table"), ("head", 3, "ablations"))
RUNS = {
    (row.case.name, seed): run_of(LAST[row.num_clusters][seed] - 0.1, LAST[row.num_clusters][seed])
    for row in STUDY.rows
    for seed in SEEDS
}
BESIDE = {key: {"1-NN": 0.94, "SVM": 0.99} for key in RUNS if key[0] != "head"}


@pytest.fixture
def summary() -> StudySummary:
    return summarise_study(STUDY, RUNS, BESIDE)


def test_means_and_deviations_are_over_seeds(summary: StudySummary) -> None:
    one, three = summary["table"]
    assert (one["clusters"], three["clusters"], one["seeds"]) == (1, 3, 3)
    assert one["last_mean"] == pytest.approx(fmean(LAST[1]))
    assert three["last_sd"] == pytest.approx(stdev(LAST[3]))
    assert one["first_mean"] == pytest.approx(fmean(LAST[1]) - 0.1)
    assert one["reference"] == {"first": 0.8, "last": 0.9}
    assert one["beside"]["SVM"] == {"mean": pytest.approx(0.99), "sd": pytest.approx(0)}
    assert (one["sent_bytes"], one["d2d_bytes"]) == (321, 300)
    assert [row["name"] for row in summary["parts"]["ablations"]] == ["head"]


def test_the_trend_is_the_gain_its_error_and_the_rank_correlation(summary: StudySummary) -> None:
    trend = summary["trend"]
    assert trend is not None
    assert trend["gain"] == pytest.approx(0.04)
    assert trend["standard_error"] == pytest.approx((stdev(LAST[1]) ** 2 / 3 + stdev(LAST[3]) ** 2 / 3) ** 0.5)
    assert trend["spearman_by_seed"] == [1.0, 1.0, 1.0]
    assert trend["spearman"] == pytest.approx(0.8783, abs=1e-4)  # scipy.stats.spearmanr of the same pairs


def test_ties_share_their_rank() -> None:
    same = {key: run_of(0.5, 0.9) for key in RUNS}
    trend = summarise_study(STUDY, same, {})["trend"]
    assert trend is not None
    assert trend["spearman"] == 0


def test_a_study_that_was_cut_short_shows_what_is_there() -> None:
    done = {key: run for key, run in RUNS.items() if key == ("three", 1)}
    summary = summarise_study(STUDY, done, {})
    assert (summary["runs_done"], summary["runs_planned"]) == (1, 9)
    assert [(row["name"], row["seeds"], row["last_sd"]) for row in summary["table"]] == [("three", 1, 0.0)]
    assert summary["trend"] is None
    assert "This study was cut short" in render_study(summary)
    assert "no run has finished yet" in render_study(summarise_study(STUDY, {}, {}))


def test_a_column_of_loras_error_is_there_where_a_run_has_one() -> None:
    some = {key: run | {"lora_error": 0.25} for key, run in RUNS.items() if key[0] == "head"}
    summary = summarise_study(STUDY, RUNS | some, {})
    assert summary["parts"]["ablations"][0]["lora_error"] == 0.25
    assert render_study(summary).count("LoRA error") == 1
    assert "LoRA error" not in render_study(summarise_study(STUDY, RUNS, {}))


def test_there_is_no_trend_until_every_seed_has_run() -> None:
    done = {key: run for key, run in RUNS.items() if key != ("three", 0)}
    assert summarise_study(STUDY, done, {})["trend"] is None


def test_the_greenest_is_who_reached_the_accuracy_with_least_energy() -> None:
    study = study_of(("quick", 3, "kinds"), ("slow", 3, "kinds"), ("never", 3, "kinds"))
    reached = {"quick": (0.9, 0.92), "slow": (0.8, 0.93), "never": (0.5, 0.6)}
    runs = {(name, seed): run_of(*reached[name]) for name in reached for seed in SEEDS}
    runs["slow", 0]["spent"][1]["energy_j"]["mid"] = 9.0
    summary = summarise_study(replace(study, sweep=replace(study.sweep, target=0.9)), runs, {})
    quick, slow, never = (row["to_target"] for row in summary["parts"]["kinds"])
    assert quick == {"rounds": 1, "energy_j": {"low": 1, "mid": 2, "high": 3}, "sent_bytes": 10, "wall_s": 1}
    assert slow is not None
    assert (slow["rounds"], slow["energy_j"]["mid"]) == (2, pytest.approx((9 + 4 + 4) / 3))
    assert never is None
    assert summary["greenest"] == {"kinds": {"target": 0.9, "case": "quick"}}
    page = "".join(ElementTree.fromstring(render_study(summary)).itertext())
    assert "Kinds: to 90.0 %, the greenest first" in page
    higher = summarise_study(study, runs, {})
    assert higher["greenest"]["kinds"] == {"target": pytest.approx(0.99 * 0.93), "case": "slow"}


def test_rows_of_other_numbers_of_clusters_are_not_compared_by_energy(summary: StudySummary) -> None:
    assert summary["greenest"] == {}


def test_the_page_is_well_formed_loads_nothing_and_says_where_we_lose(summary: StudySummary) -> None:
    page = render_study(summary)
    text = "".join(ElementTree.fromstring(page).itertext())
    assert "http" not in page
    assert "<b>" not in page
    assert "1-NN (94.0 %) beats one <b> (91.0 %)" in text
    assert "SVM (99.0 %) beats three (95.0 %)" in text
    assert "1-NN (94.0 %) beats three" not in text
    assert "somebody, last" in text


def test_the_terminal_shows_every_part(summary: StudySummary) -> None:
    assert len(show_study(summary)) == 2
