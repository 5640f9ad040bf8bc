"""The knowledge relay in the summary and in the report's tables."""

from __future__ import annotations

import re

import msgspec
from rich.console import Console, RenderableType

from ecogen.accounting.ledger import settle
from ecogen.config import build_topology, load
from ecogen.measurements import Quality, VersionQuality
from ecogen.records import RelayRecord, Taught
from ecogen.reports.console import lesson_line, show_summary
from ecogen.reports.relay import relay_of
from ecogen.reports.relay_tables import lessons_table
from ecogen.reports.summary import RunFacts, summarise
from ecogen.reports.wording import DASH
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


def test_the_summary_tells_what_lessons_gave_the_cloud() -> None:
    by_version = (version(0, "edge-0", 0.1, 0.0), version(0, "edge-1", None, 0.0), version(1, "edge-0", 0.9, 0.8))
    recipe = load("pairs")
    topology = build_topology(recipe.topology)
    records = [
        *RunOfRecords(recipe, topology).records(),
        lesson("cloud", 0),
        msgspec.structs.replace(lesson("edge-0", 0), accepted=False),
    ]
    facts = RunFacts(
        80, 2000, 90.0, "inproc", "a host", placements=placements_of(topology), by_version=by_version, data_bytes=5000
    )
    text = shown(show_summary(summarise(records, settle(records, topology), recipe, topology, facts)))
    assert re.search(r"lessons +1 of 2 +accepted; 18 kB sent for them, and the pairs are 5 kB", text)
    assert re.search(r"cloud on edge-0 +10\.0 % → 90\.0 % +recognised, .*; captions right 0\.0 % → 80\.0 %", text)
    assert re.search(rf"cloud on edge-1 +{DASH} → {DASH} +recognised, .*; captions right 0\.0 % → 0\.0 %", text)


def test_what_was_disputed_is_told() -> None:
    relay = relay_of([lesson("cloud", 34), lesson("edge-0", 5)], build_topology(load("pairs").topology), 0)
    assert relay is not None
    assert [one["num_disputed"] for one in [*relay["up"], *relay["down"]]] == [34, 5]
    table = lessons_table(relay)
    place = [column.name for column in table.columns].index("disputed")
    assert [row[place] for row in table.rows] == ["34", "5"]
    assert (table.columns[place - 1].name, table.columns[place].unit) == ("handed on", "of these")
