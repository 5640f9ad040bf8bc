"""Truths about report.html: one well-formed file that loads nothing, believes no name, and says what is missing."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from ecogen.accounting.ledger import Ledger, settle
from ecogen.config import Recipe, build_topology, load
from ecogen.errors import StorageError
from ecogen.records import EventRecord, Record, RoundRecord
from ecogen.reports.html import render_report, write_report
from ecogen.reports.summary import RunFacts
from ecogen.reports.timeline import timeline
from ecogen.topology import Cluster, Topology
from tests.reports.conftest import RunOfRecords, attack, placements_of, recipe_with

HOSTILE = "<script>alert('$x^$')</script>&\"\x00"
SECTIONS = ("accuracy", "traffic", "energy", "latency", "events", "topology", "privacy", "reproduce")


@pytest.fixture(scope="module")
def page(records: list[Record], ledger: Ledger, recipe: Recipe, topology: Topology, facts: RunFacts) -> str:
    return render_report(records, ledger, recipe, topology, facts)


def words(page: str) -> str:
    """The page as somebody reads it."""
    text = "".join(ElementTree.fromstring(page).find("body").itertext())  # type: ignore[union-attr]
    return re.sub(r"\s+", " ", text)


def test_the_page_is_well_formed_small_and_titled(page: str) -> None:
    root = ElementTree.fromstring(page)
    assert root.get("lang") == "en"
    assert "digits" in (root.findtext("head/title") or "")
    assert len(page.encode()) < 3_000_000


def test_the_page_loads_nothing(page: str) -> None:
    assert "http" not in page
    assert "@import" not in page
    assert not re.search(r"<(script|link|iframe|object|embed)\b|\bsrc=|\bon\w+=", page)
    assert all(target.startswith(("#", "data:image/png;")) for target in re.findall(r'href="([^"]*)"', page))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_every_id_is_unique_and_every_reference_leads_somewhere(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_every_section_is_there_and_every_figure_can_be_heard(page: str) -> None:
    root = ElementTree.fromstring(page)
    assert [section.get("id") for section in root.iter("section")] == list(SECTIONS)
    drawings = list(root.iter("svg"))
    assert len(drawings) == 11
    assert all(drawing.get("role") == "img" and drawing.get("aria-label") for drawing in drawings)


def test_every_table_has_heads_and_a_caption(page: str) -> None:
    for table in ElementTree.fromstring(page).iter("table"):
        heads = table.findall("thead/tr/th")
        assert table.findtext("caption")
        assert all(head.get("scope") == "col" for head in heads)
        assert all(len(row) == len(heads) for row in table.findall("tbody/tr"))


def test_figures_take_their_colours_from_the_page(page: str) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "var(--ink)" in drawings
    assert not re.search(r"(fill|stroke): #(?!000000|ffffff)", drawings)


def test_the_headline_says_what_was_modelled(page: str, ledger: Ledger) -> None:
    read = words(page)
    assert "93.1 % → 97.3 %" in read
    assert "21 642 of 801 546 parameters" in read
    assert ledger.method in read


def test_privacy_is_what_was_not_sent_with_the_attacks_figures(page: str) -> None:
    read = words(page)
    assert "Not sent: images and labels" in read
    assert "after 0 blocks: 31.8 dB" in read
    assert "with the mean image (trained decoder; SSIM 0.63 of 1); a classifier of real images reads 73.0 %" in read
    assert "the first cut came after 1 block." in read
    assert all(f"{figure:.1f}" in read for best in (27.4, 31.8) for figure in (best, best - 6, best - 12))


def test_a_perfect_copy_is_called_one(recipe: Recipe, topology: Topology, facts: RunFacts) -> None:
    exact = replace(facts, inversion=(attack("least squares", 60.0),))
    read = words(render_report([], settle([], topology), recipe, topology, exact))
    assert "after 0 blocks: the images themselves, pixel by pixel (least squares" in read
    assert "after 1 block: 54.0 dB" in read


def test_nothing_is_called_private_by_itself(page: str) -> None:
    assert words(page).lower().replace("privacy", "").count("privat") == 0


def test_what_is_missing_is_said(records: list[Record], ledger: Ledger, topology: Topology, facts: RunFacts) -> None:
    recipe = load("digits", ["placement.labels=end"])
    rounds = [record for record in records if isinstance(record, RoundRecord)]
    read = words(render_report(rounds, ledger, recipe, topology, bare(facts)))
    assert "cannot say how much the activations reveal" in read
    assert "Not sent: images. Labels travelled" in read
    assert "Nothing was lost" in read
    assert "No request was served" in read


def test_a_run_cut_short_says_so(recipe: Recipe, topology: Topology, facts: RunFacts) -> None:
    read = words(render_report([], settle([], topology), recipe, topology, bare(facts)))
    assert "cut short: 0 of 8 rounds have a record" in read
    assert "No round was finished" in read
    assert "No request was served" in read


def test_a_whole_run_is_not_said_to_be_cut_short(page: str) -> None:
    assert "cut short" not in words(page)


def test_events_without_rounds_still_make_a_report(
    records: list[Record], recipe: Recipe, topology: Topology, facts: RunFacts
) -> None:
    kept = [record for record in records if isinstance(record, EventRecord)]
    read = words(render_report(kept, settle(kept, topology), recipe, topology, bare(facts)))
    assert "no heartbeat for 5.0 s" in read


def test_records_without_time_are_drawn_by_round(records: list[Record], topology: Topology) -> None:
    assert "seconds since" in timeline(records, topology)
    timeless = [msgspec.structs.replace(record, time_s=0.0) for record in records]
    assert "seconds since" not in timeline(timeless, topology)


def test_an_event_far_outside_the_rounds_stays_on_the_timeline(records: list[Record], topology: Topology) -> None:
    late = EventRecord("lost", "edge-1", 7, time_s=records[-1].time_s + 1e6)
    early = EventRecord("lost", "edge-1", 0, time_s=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where something off the canvas spoils the layout
        timeline([*records, early, late], topology)


def test_hostile_names_are_only_words(facts: RunFacts) -> None:
    recipe = recipe_with(requests=1)
    topology = renamed(build_topology(recipe.topology))
    records = [*RunOfRecords(recipe, topology).records(), EventRecord("lost", HOSTILE, 3, HOSTILE)]
    hostile = replace(bare(facts), host=HOSTILE, versions={HOSTILE: HOSTILE}, placements=placements_of(topology))
    page = render_report(records, settle(records, topology), recipe, topology, hostile)
    assert "<script" not in page
    assert HOSTILE.rstrip("\x00") in words(page)


def renamed(topology: Topology) -> Topology:
    """The topology with every node and cluster under a hostile name."""
    nodes = {HOSTILE + name: replace(node, node_id=HOSTILE + name) for name, node in topology.nodes.items()}
    clusters = {
        HOSTILE + name: Cluster(HOSTILE + name, HOSTILE + c.edge_id, tuple(HOSTILE + node for node in c.node_ids))
        for name, c in topology.clusters.items()
    }
    return Topology(topology.sites, nodes, topology.links, clusters)


def bare(facts: RunFacts) -> RunFacts:
    """The facts of a run without closing measurements."""
    return replace(facts, inversion=(), probe=None, placements={})


def test_a_large_topology_is_condensed_and_says_so(facts: RunFacts) -> None:
    recipe = load("digits", ["topology.edges=12", "topology.clusters_per_edge=9", "topology.devices_per_cluster=8"])
    topology = build_topology(recipe.topology)
    page = render_report([], settle([], topology), recipe, topology, bare(facts))
    assert "4 of 12 edges, 6 of 9 clusters an edge, 6 of 8 devices a cluster" in words(page)
    assert len(page) < 1_000_000


def test_writing_replaces_the_whole_file(tmp_path: Path, recipe: Recipe, topology: Topology, facts: RunFacts) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(path, [], settle([], topology), recipe, topology, bare(facts))
    assert path.read_text(encoding="utf-8").endswith("</html>")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_folder_that_cannot_be_made_is_an_error_with_a_remedy(
    tmp_path: Path, recipe: Recipe, topology: Topology, facts: RunFacts
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*report\.html .*choose another folder"):
        write_report(tmp_path / "file" / "report.html", [], settle([], topology), recipe, topology, bare(facts))
