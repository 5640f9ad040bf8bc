"""What the terminal shows, read as plain text."""

from __future__ import annotations

import msgspec
from rich.console import Console, RenderableType

from ecogen.accounting.ledger import Ledger, settle
from ecogen.config import Recipe
from ecogen.records import Record, RequestRecord, RoundRecord
from ecogen.reports.console import NodeStatus, round_line, show_request, show_served, show_status, show_summary
from ecogen.reports.served import summarise_served
from ecogen.reports.summary import RunFacts, summarise
from ecogen.topology import Tier, Topology


def shown(renderable: RenderableType, width: int = 140) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_a_round_is_one_line(records: list[Record]) -> None:
    record = next(r for r in records if isinstance(r, RoundRecord) and r.missing)
    line = shown(round_line(record, 8))
    assert line.startswith("round 4/8  edge-0")
    assert "2 of 3 members" in line
    assert line.count("\n") == 1


def test_the_summary_names_energy_as_modelled_with_its_bounds(
    records: list[Record], ledger: Ledger, recipe: Recipe, topology: Topology, facts: RunFacts
) -> None:
    text = shown(show_summary(summarise(records, ledger, recipe, topology, facts)))
    assert "93.1 % → 97.3 %" in text
    assert "modelled" in text
    assert "edge-0.cluster-1.device-2" in text


def test_the_summary_of_nothing(recipe: Recipe, topology: Topology, facts: RunFacts) -> None:
    assert "0 of 8 rounds" in shown(show_summary(summarise([], settle([], topology), recipe, topology, facts)))


def test_a_prediction_shows_who_computed_and_what_crossed(records: list[Record], topology: Topology) -> None:
    request = next(record for record in records if isinstance(record, RequestRecord))
    text = shown(show_request(request, topology))
    assert text.count("device to device") == 3
    assert text.count("12\N{NARROW NO-BREAK SPACE}800") == 3


def test_markup_in_a_name_is_text(records: list[Record], topology: Topology) -> None:
    request = next(record for record in records if isinstance(record, RequestRecord))
    hop = msgspec.structs.replace(request.hops[0], segment="[red]x[/red]")
    text = shown(show_request(msgspec.structs.replace(request, hops=(hop,)), topology))
    assert "[red]x[/red]" in text


def test_a_long_name_is_folded_and_not_cut_off(records: list[Record], topology: Topology) -> None:
    request = next(record for record in records if isinstance(record, RequestRecord))
    text = shown(show_request(request, topology), width=60)
    assert "…" not in text
    names = "".join(line[:20] for line in text.splitlines()).replace(" ", "")
    assert request.hops[0].node_id[:12] in names


def test_status_says_who_is_lost() -> None:
    nodes = [NodeStatus("cloud", Tier.CLOUD, "ready", 3, 0.4), NodeStatus("edge-0", Tier.EDGE, "lost")]
    text = shown(show_status(nodes))
    assert "ready" in text
    assert "lost" in text
    assert "400.0 ms ago" in text


def test_before_the_first_books_no_time_is_told(topology: Topology) -> None:
    assert "served 0 requests: 0 tokens of prompts" in shown(show_served(summarise_served([], topology)))
