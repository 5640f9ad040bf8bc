"""The report of a language model: perplexity by edge, before and after, wherever images have an accuracy."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from rich.console import Console, RenderableType

from ecogen.accounting.ledger import settle
from ecogen.config import Recipe, build_topology, load
from ecogen.records import PhaseRecord, Record, RoundRecord
from ecogen.reports.console import delivered_line, round_line, show_summary
from ecogen.reports.html import render_report
from ecogen.reports.summary import RunFacts, Summary, summarise
from ecogen.reports.tables import rounds_table
from tests.reports.conftest import RunOfRecords, placements_of

DELIVERED, SAVED = {"edge-0": 40.0, "edge-1": 30.0}, {"edge-0": 21.0, "edge-1": 19.5}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load("text", ["tuning.rounds=4"])


@pytest.fixture(scope="module")
def records(recipe: Recipe) -> list[Record]:
    """As of images, with a perplexity in place of each accuracy, and what the edges were delivered."""
    made = RunOfRecords(recipe, build_topology(recipe.topology)).records()

    def told() -> Iterator[Record]:
        for edge, perplexity in DELIVERED.items():
            yield PhaseRecord(edge, "evaluation", 0.1, (), perplexity=perplexity)
        for record in made:
            if isinstance(record, RoundRecord):
                record = msgspec.structs.replace(record, accuracy=None, perplexity=30.0 - 2 * record.round_index)
            yield record

    return list(told())


@pytest.fixture(scope="module")
def facts(recipe: Recipe) -> RunFacts:
    placements = placements_of(build_topology(recipe.topology))
    return RunFacts(80_000, 2_000_000, 90.0, "inproc", "a host", placements=placements, saved_perplexity=SAVED)


@pytest.fixture(scope="module")
def summary(recipe: Recipe, records: list[Record], facts: RunFacts) -> Summary:
    topology = build_topology(recipe.topology)
    return summarise(records, settle(records, topology), recipe, topology, facts)


def shown(renderable: RenderableType) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_the_summary_has_delivered_tuned_and_saved_by_edge(summary: Summary) -> None:
    per_round = [30.0, 28.0, 26.0, 24.0]
    assert summary["perplexity"] == {
        edge: {"delivered": DELIVERED[edge], "tuned": 24.0, "saved": SAVED[edge], "per_round": per_round}
        for edge in DELIVERED
    }
    assert summary["accuracy"]["last"] is None


def test_of_images_there_is_no_perplexity(recipe: Recipe, facts: RunFacts) -> None:
    images = load("digits")
    topology = build_topology(images.topology)
    assert summarise([], settle([], topology), images, topology, facts)["perplexity"] is None


def test_the_terminal_shows_it(summary: Summary, records: list[Record]) -> None:
    first = next(record for record in records if isinstance(record, PhaseRecord))
    assert shown(delivered_line(first)) == "edge-0    perplexity 40.00 delivered\n"
    line = shown(round_line(next(record for record in records if isinstance(record, RoundRecord)), 4))
    assert line.startswith("round 1/4  edge-0    perplexity   30.00  loss")
    text = shown(show_summary(summary))
    assert "perplexity edge-0   40.00 → 24.00" in text
    assert "the saved average 19.50" in text
    assert "accuracy" not in text


def test_the_page_shows_it(recipe: Recipe, records: list[Record], facts: RunFacts) -> None:
    topology = build_topology(recipe.topology)
    page = render_report(records, settle(records, topology), recipe, topology, facts)
    assert '<h2 id="accuracy-title">Perplexity</h2>' in page
    assert "35.00 → 24.00" in page  # the mean of what two edges were delivered
    assert "Perplexity on held-out text" in page
    assert "dashed: of the delivered model" in page
    assert "<strong>Not sent:</strong> text. It stayed on the device that owns it" in page
    privacy = page[page.index('id="privacy"') : page.index('id="reproduce"')]
    assert "images" not in privacy


def test_the_table_of_rounds_has_perplexities(recipe: Recipe, records: list[Record]) -> None:
    table = rounds_table(records, build_topology(recipe.topology))
    assert {column.unit for column in table.columns[1:4]} == {"perplexity"}
    assert table.rows[-1][1:4] == ("24.00", "24.00", "24.00")
