"""Truths about the JSON object of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import fmean

import msgspec
import pytest

from ecogen.accounting.ledger import Ledger, settle
from ecogen.config import Recipe, build_topology
from ecogen.records import EventRecord, Record, RequestRecord, RoundRecord
from ecogen.reports.summary import RunFacts, Summary, accuracy, summarise
from ecogen.reports.tables import rounds_table
from ecogen.topology import Topology
from tests.reports.conftest import LOST, recipe_with, records_of

KINDS = ("backbone", "tunables", "activations", "gradients", "samples", "scores", "control")
LINKS = ("cloud_edge", "edge_end", "d2d")


@pytest.fixture(scope="module")
def summary(records: list[Record], ledger: Ledger, recipe: Recipe, topology: Topology, facts: RunFacts) -> Summary:
    return summarise(records, ledger, recipe, topology, facts)


def of_edges(records: list[Record], topology: Topology) -> list[float]:
    """Mean accuracy over edges of each round."""
    rounds = [r for r in records if isinstance(r, RoundRecord) and r.node_id in topology.edge_ids]
    return [fmean(r.accuracy or 0 for r in rounds if r.round_index == index) for index in range(8)]


def of_cloud(records: list[Record], topology: Topology) -> dict[int, float | None]:
    rounds = [r for r in records if isinstance(r, RoundRecord) and r.node_id == topology.cloud_id]
    return {r.round_index: r.accuracy for r in rounds}


def test_the_summary_is_json_with_every_promised_key(summary: Summary) -> None:
    read = json.loads(json.dumps(summary))
    assert read == summary
    assert set(read["traffic_bytes"]) == {*KINDS, *LINKS, "framing"}
    assert set(read["energy_j"]) == {"low", "mid", "high", "method"}
    assert set(read["latency_s"]) == {"t_ul", "t_inference", "t_dl", "total"}


def test_traffic_by_kind_and_by_link_sum_to_the_ledger(summary: Summary, ledger: Ledger) -> None:
    sent = sum(line.payload_bytes + line.header_bytes for line in ledger.traffic())
    assert sum(summary["traffic_bytes"][kind] for kind in KINDS) == sent
    assert sum(summary["traffic_bytes"][link] for link in LINKS) == sent
    assert summary["traffic_bytes"]["framing"] == ledger.framing_bytes


def test_energy_and_emissions_are_the_ledgers(summary: Summary, ledger: Ledger) -> None:
    assert summary["energy_j"]["mid"] == ledger.total.energy_j.mid
    assert summary["energy_j"]["method"] == ledger.method
    assert summary["emissions_g"] == summary["emissions_g_bounds"]["mid"] == ledger.total.emissions_g.mid


def test_what_rounds_took_adds_up_to_the_ledgers_rounds(summary: Summary, ledger: Ledger) -> None:
    bills = list(ledger.by_round().values())
    assert len(summary["spent"]) == summary["rounds"]
    for key in ("low", "mid", "high"):
        assert summary["spent"][-1]["energy_j"][key] == pytest.approx(sum(getattr(b.energy_j, key) for b in bills))
    sent = sum(entry.sent_bytes for entry in ledger.entries if entry.round_index is not None)
    assert summary["spent"][-1]["sent_bytes"] == sent
    assert [spent["wall_s"] for spent in summary["spent"]] == sorted(spent["wall_s"] for spent in summary["spent"])


def test_the_summary_reads_the_facts(summary: Summary, facts: RunFacts) -> None:
    assert summary["tunable_fraction"] == 21_642 / 801_546
    assert (summary["wall_s"], summary["engine"]) == (facts.wall_s, "inproc")
    assert (summary["name"], summary["seed"]) == ("digits", 0)


def test_loras_error_is_the_mean_over_rounds_and_a_column_of_the_rounds(
    recipe: Recipe, topology: Topology, facts: RunFacts, records: list[Record], summary: Summary
) -> None:
    assert summary["lora_error"] is None
    assert not any(column.name == "LoRA error" for column in rounds_table(records, topology).columns)
    some = [msgspec.structs.replace(r, lora_error=0.25) if isinstance(r, RoundRecord) else r for r in records]
    assert summarise(some, settle(some, topology), recipe, topology, facts)["lora_error"] == 0.25
    table = rounds_table(some, topology)
    place = [column.name for column in table.columns].index("LoRA error")
    assert {row[place] for row in table.rows} == {"25.0 %"}


def test_flops_are_those_of_all_usages(summary: Summary, records: list[Record]) -> None:
    usages = [usage for record in records if not isinstance(record, EventRecord) for usage in record.usages]
    assert summary["flops"] == sum(usage.flops for usage in usages)


def test_what_was_recovered_is_told_by_attacker_and_depth(summary: Summary) -> None:
    assert summary["inversion"] is not None
    assert list(summary["inversion"]) == ["least squares", "trained decoder"]
    assert list(summary["inversion"]["least squares"]) == ["0", "1", "2"]
    told = summary["inversion"]["trained decoder"]["1"]
    assert told == pytest.approx({"psnr_db": 25.8, "baseline_psnr_db": 11.2, "ssim": 0.63, "label_accuracy": 0.73})


def test_without_an_attack_nothing_is_told_of_it(recipe: Recipe, topology: Topology, facts: RunFacts) -> None:
    assert summarise([], settle([], topology), recipe, topology, replace(facts, inversion=()))["inversion"] is None


def test_events_tell_who_was_lost_and_came_back(summary: Summary) -> None:
    told = [(event["event"], event["node_id"], event["round_index"]) for event in summary["events"]]
    assert ("lost", LOST, 3) in told
    assert ("rejoined", LOST, 4) in told


def test_every_round_is_the_clouds_where_it_averages_always(records: list[Record], topology: Topology) -> None:
    told = accuracy(records, topology)
    assert told["per_round"] == list(of_cloud(records, topology).values())
    assert (told["first"], told["last"]) == (told["per_round"][0], told["per_round"][-1])


def test_every_other_round_is_the_clouds_with_cloud_every_2() -> None:
    recipe = recipe_with(cloud_every=2)
    topology, records = build_topology(recipe.topology), records_of(recipe)
    per_round = accuracy(records, topology)["per_round"]
    assert per_round[1::2] == list(of_cloud(records, topology).values())
    assert per_round[0::2] == pytest.approx(of_edges(records, topology)[0::2])


def test_every_round_is_the_mean_of_the_edges_without_the_cloud() -> None:
    recipe = recipe_with(cloud_every=0)
    topology, records = build_topology(recipe.topology), records_of(recipe)
    assert accuracy(records, topology)["per_round"] == pytest.approx(of_edges(records, topology))


def test_an_edges_accuracy_is_its_own_before_the_cloud(records: list[Record], topology: Topology) -> None:
    told = accuracy(records, topology)["per_edge"]
    own = [r.accuracy for r in records if isinstance(r, RoundRecord) and r.node_id == "edge-1"]
    assert told["edge-1"] == own
    assert all(len(values) == 8 for values in told.values())


def test_a_round_that_an_edge_missed_is_none_and_not_in_the_mean(topology: Topology) -> None:
    records = records_of(recipe_with(cloud_every=0))
    kept = [r for r in records if not (isinstance(r, RoundRecord) and r.node_id == "edge-0" and r.round_index == 2)]
    told = accuracy(kept, topology)
    assert told["per_edge"]["edge-0"][2] is None
    assert told["per_round"][2] == told["per_edge"]["edge-1"][2]


def test_a_run_that_evaluates_nothing_has_no_accuracy(records: list[Record], topology: Topology) -> None:
    blind = [msgspec.structs.replace(r, accuracy=None) if isinstance(r, RoundRecord) else r for r in records]
    told = accuracy(blind, topology)
    assert (told["first"], told["last"]) == (None, None)
    assert told["per_round"] == [None] * 8


def test_latency_is_the_median_over_requests(records: list[Record], summary: Summary) -> None:
    totals = sorted(r.latency_s for r in records if isinstance(r, RequestRecord))
    assert summary["latency_s"] is not None
    assert summary["latency_s"]["total"] == pytest.approx((totals[19] + totals[20]) / 2)


def test_a_run_cut_short_before_its_first_round(recipe: Recipe, topology: Topology, facts: RunFacts) -> None:
    told = summarise([], settle([], topology), recipe, topology, facts)
    assert (told["rounds"], told["rounds_planned"]) == (0, 8)
    assert told["accuracy"]["per_round"] == []
    assert told["latency_s"] is None
    assert told["events"] == []
    assert told["energy_j"]["mid"] == 0


def test_a_node_that_joined_is_an_event_too(recipe: Recipe, topology: Topology, facts: RunFacts) -> None:
    told = summarise([EventRecord("joined", "cloud")], settle([], topology), recipe, topology, facts)
    assert [event["event"] for event in told["events"]] == ["joined"]


def test_facts_survive_json(facts: RunFacts) -> None:
    assert msgspec.json.decode(msgspec.json.encode(facts), type=RunFacts) == facts


def test_a_model_without_parameters_has_no_tunable_fraction(facts: RunFacts) -> None:
    assert replace(facts, tunable_parameters=0, total_parameters=0).tunable_fraction == 0.0
