"""The knowledge relay in the summary and in the report's tables."""

from __future__ import annotations

import re
from typing import cast, get_args
from xml.etree import ElementTree

import msgspec
import pytest
from rich.console import Console, RenderableType

from ecogen.accounting.ledger import settle
from ecogen.config import Recipe, build_topology, load
from ecogen.measurements import Quality, VersionQuality
from ecogen.records import Record, RelayRecord, RoundRecord, Taught
from ecogen.reports.console import lesson_line, show_summary
from ecogen.reports.html import render_report
from ecogen.reports.relay import Relay, VersionScore, relay_of
from ecogen.reports.relay_plot import Measure, by_lesson
from ecogen.reports.relay_tables import lessons_table
from ecogen.reports.summary import RunFacts, summarise
from ecogen.reports.timeline import timeline
from ecogen.reports.wording import DASH
from ecogen.topology import Topology
from tests.reports.conftest import RunOfRecords, placements_of


def lesson(node_id: str, num_disputed: int) -> RelayRecord:
    up = node_id == "cloud"
    return RelayRecord(
        node_id,
        0,
        "up" if up else "down",
        ("edge-0", "edge-1") if up else ("cloud",),
        accepted=True,
        version=1,
        num_drawn=1800,
        num_samples=1200,
        sample_bytes=9000,
        scores=(Taught("edge-0", 9.0, 8.0, is_new=True),),
        wall_s=1.0,
        usages=(),
        num_disputed=num_disputed,
    )


def shown(part: RenderableType) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(part)
    return capture.get()


def test_a_lesson_is_a_line() -> None:
    accepted = lesson("cloud", 0)
    told = "lesson 1 cloud accepted, version 1 perplexity edge-0 9.00 → 8.00 1.0 s"
    assert " ".join(shown(lesson_line(accepted)).split()) == told
    refused = msgspec.structs.replace(accepted, accepted=False, reason="it would lose a glyph [a]")
    said = "lesson 1 cloud refused: it would lose a glyph [a] 1.0 s"
    assert " ".join(shown(lesson_line(refused)).split()) == said


def version(number: int, domain: str, recognised: float | None, captions: float) -> VersionQuality:
    cycle = number - 1 if number else None
    return VersionQuality("cloud", number, "after", cycle, domain, Quality(recognised, None, captions))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load("pairs")


@pytest.fixture(scope="module")
def topology(recipe: Recipe) -> Topology:
    return build_topology(recipe.topology)


@pytest.fixture(scope="module")
def records(recipe: Recipe, topology: Topology) -> list[Record]:
    """A run's, with a lesson that was accepted and one that was refused."""
    refused = msgspec.structs.replace(lesson("edge-0", 0), accepted=False)
    return [*RunOfRecords(recipe, topology).records(), lesson("cloud", 0), refused]


@pytest.fixture(scope="module")
def facts(topology: Topology) -> RunFacts:
    by_version = (version(0, "edge-0", 0.1, 0.0), version(0, "edge-1", None, 0.0), version(1, "edge-0", 0.9, 0.8))
    placements = placements_of(topology)
    return RunFacts(80, 2000, 90.0, "inproc", "a host", placements=placements, by_version=by_version, data_bytes=5000)


@pytest.fixture(scope="module")
def page(recipe: Recipe, topology: Topology, records: list[Record], facts: RunFacts) -> str:
    return render_report(records, settle(records, topology), recipe, topology, facts)


def test_the_summary_tells_what_lessons_gave_the_cloud(
    recipe: Recipe, topology: Topology, records: list[Record], facts: RunFacts
) -> None:
    text = shown(show_summary(summarise(records, settle(records, topology), recipe, topology, facts)))
    assert re.search(r"lessons +1 of 2 +accepted; 18 kB sent for them, and the pairs are 5 kB", text)
    assert re.search(r"cloud on edge-0 +10\.0 % → 90\.0 % +recognised, .*; captions right 0\.0 % → 80\.0 %", text)
    assert re.search(rf"cloud on edge-1 +{DASH} → {DASH} +recognised, .*; captions right 0\.0 % → 0\.0 %", text)


def test_the_report_has_a_section_of_lessons_and_of_drawings_with_plots(page: str) -> None:
    root = ElementTree.fromstring(page)
    sections = [section.get("id") for section in root.iter("section")]
    assert sections[:4] == ["accuracy", "relay", "traffic", "energy"]
    links = [link.get("href") for link in root.iter("a")]
    assert links[:3] == ["#accuracy", "#relay", "#traffic"]
    told = [svg.get("aria-label") for svg in root.iter("svg")]
    assert {"Drawings recognised by lesson", "Captions right by lesson"} <= set(told)
    assert "a hatched one is a lesson" in page
    assert "between cloud and edges, of the relay, pictures that generators drew" in page


def test_lessons_stand_in_the_timeline(records: list[Record], topology: Topology) -> None:
    lessons = [record for record in records if isinstance(record, RelayRecord)]
    rounds = [record for record in records if isinstance(record, RoundRecord) and record.node_id != "cloud"]
    last = max(record.time_s for record in rounds)
    taken = [msgspec.structs.replace(lesson, time_s=last) for lesson in lessons]
    assert "cloud" not in timeline([*rounds, *lessons], topology), "they carry no time"
    told = timeline([*rounds, *taken], topology)
    assert "cloud" in told
    assert "url(#timeline-" in told, "hatched"


@pytest.mark.parametrize("measure", get_args(Measure))
def test_a_plot_names_each_model_and_what_it_is_asked(measure: Measure) -> None:
    def score(node_id: str, what: str, cycle: int | None, value: float | None, domain: str = "edge-0") -> VersionScore:
        return cast(VersionScore, {"node_id": node_id, "what": what, "cycle": cycle, "domain": domain, measure: value})

    versions = [
        score("cloud", "delivered", None, 0.1),
        score("cloud", "after", 0, 0.8),
        score("edge-0", "before", 0, 0.9),
        score("edge-0", "after", 0, 0.95),
        score("edge-1", "before", 0, 0.0),
        score("cloud", "delivered", None, None, "edge-1"),
    ]
    text = by_lesson(cast(Relay, {"versions": versions}), measure)
    names = ("cloud on edge-0", ">edge-0<", "edge-1 on edge-0")
    assert all(name in text for name in names)
    assert "cloud on edge-1" not in text, "of which nothing was measured"


def test_what_was_disputed_is_told() -> None:
    relay = relay_of([lesson("cloud", 34), lesson("edge-0", 5)], build_topology(load("pairs").topology), 0)
    assert relay is not None
    assert [one["num_disputed"] for one in [*relay["up"], *relay["down"]]] == [34, 5]
    table = lessons_table(relay)
    place = [column.name for column in table.columns].index("disputed")
    assert [row[place] for row in table.rows] == ["34", "5"]
    assert (table.columns[place - 1].name, table.columns[place].unit) == ("handed on", "of these")
