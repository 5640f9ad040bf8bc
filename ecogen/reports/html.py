"""One self-contained report.html: no script, no network, light and dark; the words stand in `report.html.j2`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from markupsafe import Markup

from ecogen.accounting.ledger import Ledger
from ecogen.config import Recipe, to_table
from ecogen.measurements import EXACT_DB, Inversion, InversionAttack
from ecogen.placement import Placement
from ecogen.records import EventRecord, Record, RequestRecord, RoundRecord
from ecogen.reports import drawing, plots, relay_tables, tables
from ecogen.reports.crossings_table import crossings_table
from ecogen.reports.page import render_page
from ecogen.reports.relay_plot import by_lesson
from ecogen.reports.summary import Perplexity, RunFacts, Summary, round_indices, summarise
from ecogen.reports.timeline import notable_events, start_s, timeline
from ecogen.reports.toml import to_toml
from ecogen.reports.wording import (
    format_count,
    format_grams,
    format_perplexity,
    format_range,
    format_share,
    phase_name,
    plural,
    warn_of_epsilon,
)
from ecogen.storage import write_atomically
from ecogen.topology import Topology
from ecogen.units import format_bytes, format_joules, format_seconds

_OF_CLOUD = "What the cloud's model draws and says of each edge's domain"


def write_report(
    path: str | os.PathLike[str],
    records: Sequence[Record],
    ledger: Ledger,
    recipe: Recipe,
    topology: Topology,
    facts: RunFacts,
) -> None:
    """Write the report of a run, however far it came; a reader never meets half of one.

    Raises:
        StorageError: if the disk is full or the folder cannot be written.
    """
    write_atomically(Path(path), render_report(records, ledger, recipe, topology, facts))


def render_report(
    records: Sequence[Record], ledger: Ledger, recipe: Recipe, topology: Topology, facts: RunFacts
) -> str:
    """The report as an HTML page."""
    summary = summarise(records, ledger, recipe, topology, facts)
    return render_page(
        "report.html.j2",
        summary=summary,
        recipe=recipe,
        recipe_toml=to_toml(to_table(recipe)),
        facts=facts,
        topology=topology,
        ledger=ledger,
        total=ledger.total,
        headline=_headline(summary, ledger, recipe, facts),
        figures={name: Markup(svg) for name, svg in _figures(records, ledger, topology, facts, summary).items()},
        tables=_tables(records, ledger, topology, facts)
        | {"privacy": tables.privacy_table(summary)}
        | {"perplexity": _perplexity(summary, recipe)}
        | {"drawings": tables.drawings_table(facts.drawings)}
        | {"cloud_drawings": tables.drawings_table(facts.cloud_drawings, _OF_CLOUD)}
        | {
            "lessons": relay_tables.lessons_table(summary["relay"]),
            "cycles": relay_tables.cycles_table(summary["relay"]),
            "by_version": relay_tables.versions_table(summary["relay"]),
            "crossings": crossings_table(summary["crossings"]),
        },
        inputs=_inputs(recipe),
        hidden_parts=drawing.hidden_parts(topology),
        num_joined=_num_joined(records),
        first_cuts=first_cuts(facts.placements),
        strongest=strongest(facts.inversion),
        privacy_warning=warn_of_epsilon(summary["privacy"]["epsilon"]) if summary["privacy"] else "",
        exact_db=EXACT_DB,
    )


def _inputs(recipe: Recipe) -> str:
    return "pairs" if recipe.data.is_pairs else "text" if recipe.data.is_text else "images"


def _perplexity(summary: Summary, recipe: Recipe) -> tables.Table:
    return tables.perplexity_table(summary, examples=_inputs(recipe), is_averaged=recipe.tuning.cloud_every > 0)


def _headline(summary: Summary, ledger: Ledger, recipe: Recipe, facts: RunFacts) -> list[tuple[str, str, str]]:
    """Name, figure and remark of each headline."""
    total = ledger.total
    parameters = f"{format_count(facts.tunable_parameters)} of {format_count(facts.total_parameters)} parameters"
    sent = sum(line.sent_bytes for line in ledger.traffic())
    return [
        _quality_headline(summary, recipe),
        ("Tunable share", format_share(facts.tunable_fraction), parameters),
        ("Traffic", format_bytes(sent), f"{format_bytes(summary['traffic_bytes']['tunables'])} of it tunables"),
        ("Energy", format_joules(total.energy_j.mid), f"{format_range(total.energy_j)}, modelled"),
        (
            "Emissions",
            f"{format_grams(total.emissions_g.mid)} CO2e",
            f"{format_range(total.emissions_g, format_grams)}, modelled",
        ),
        ("Wall time", format_seconds(facts.wall_s), f"engine {facts.engine}"),
    ]


def _quality_headline(summary: Summary, recipe: Recipe) -> tuple[str, str, str]:
    """Accuracy, or of a language model the mean perplexity of its edges."""
    if summary["perplexity"] is not None:
        return _perplexity_headline(summary["perplexity"], recipe)
    accuracy, rounds = summary["accuracy"], plural(summary["rounds"], "round")
    if accuracy["first"] is None:
        return "Accuracy", "not measured", f"{rounds} done"
    figure = f"{format_share(accuracy['first'])} → {format_share(accuracy['last'])}"
    return "Accuracy", figure, f"first to last of {rounds}, {recipe.evaluation.split} split"


def _perplexity_headline(edges: Mapping[str, Perplexity], recipe: Recipe) -> tuple[str, str, str]:
    pairs = [(found["delivered"], found["tuned"]) for found in edges.values()]
    measured = [(before, after) for before, after in pairs if before is not None and after is not None]
    if not measured:
        return "Perplexity", "not measured", f"{recipe.evaluation.split} split"
    before, after = (fmean(values) for values in zip(*measured, strict=True))
    remark = f"delivered to tuned, mean of {plural(len(measured), 'edge')}, {recipe.evaluation.split} split"
    return "Perplexity", f"{format_perplexity(before)} → {format_perplexity(after)}", remark


def _figures(
    records: Sequence[Record], ledger: Ledger, topology: Topology, facts: RunFacts, summary: Summary
) -> dict[str, str]:
    """Every figure that this run has data for."""
    figures = {"topology": drawing.draw_topology(topology, facts.placements)}
    rounds = [record for record in records if isinstance(record, RoundRecord)]
    if any(record.accuracy is not None for record in rounds):
        figures["accuracy"] = plots.accuracy(records, topology)
    if summary["perplexity"] and any(record.perplexity is not None for record in rounds):
        delivered = {edge: found["delivered"] for edge, found in summary["perplexity"].items()}
        figures["perplexity"] = plots.perplexity(records, topology, delivered)
    if any(record.loss is not None for record in rounds):
        figures["loss"] = plots.loss(records, topology)
    if rounds:
        figures["timeline"] = timeline(records, topology)
    if ledger.traffic():
        figures["traffic_by_kind"] = plots.traffic_by_kind(ledger)
        figures["traffic_by_link"] = plots.traffic_by_link(ledger)
    if ledger.entries:
        figures["energy_by_tier"] = plots.energy_by_tier(ledger.by_tier())
        figures["energy_by_line"] = plots.energy_by_line(ledger.total)
    if summary["relay"] and summary["relay"]["versions"]:
        figures["relay_recognised"] = by_lesson(summary["relay"], "recognised")
        figures["relay_captions"] = by_lesson(summary["relay"], "caption_accuracy")
    if any(isinstance(record, RequestRecord) for record in records):
        figures["latency"] = plots.latency(records, topology)
    return figures | _attack_figures(facts)


def _attack_figures(facts: RunFacts) -> dict[str, str]:
    attacks = [attack for attack in facts.inversion if attack.results]
    if not attacks:
        return {}
    figures = {"inversion": plots.inversion(attacks)}
    if all(attack.originals for attack in attacks):
        figures["reconstructions"] = plots.reconstructions(attacks)
    return figures


def _tables(records: Sequence[Record], ledger: Ledger, topology: Topology, facts: RunFacts) -> dict[str, tables.Table]:
    rounds = round_indices(records)
    return {
        "rounds": tables.rounds_table(records, topology),
        "traffic": tables.traffic_table(ledger),
        "tiers": tables.bills_table("Energy and emissions by tier", "tier", ledger.by_tier()),
        "sites": tables.bills_table("Energy and emissions by site", "site", ledger.by_site()),
        "phases": tables.bills_table("Energy and emissions by phase", "phase", ledger.by_phase(), phase_name),
        "nodes": tables.bills_table("Energy and emissions by node", "node", ledger.by_node()),
        "latency": tables.latency_table(records, topology),
        "events": tables.events_table(notable_events(records), rounds.start, start_s(records)),
        "places": tables.sites_table(topology),
        "links": tables.links_table(topology),
        "placement": tables.placement_table(topology, facts.placements),
        "inversion": tables.inversion_table(facts),
    }


def first_cuts(placements: Mapping[str, Placement]) -> list[int]:
    """How many blocks stand before the first cut, of all clusters, each number once."""
    return sorted({placement.visits[0].segment.stop for placement in placements.values() if len(placement) > 1})


def strongest(attacks: Sequence[InversionAttack]) -> list[tuple[InversionAttack, Inversion]]:
    """At each depth of the cut, the attack that recovered most, and what it did."""
    found = [(attack, result) for attack in attacks for result in attack.results]
    depths = sorted({result.blocks_before for _, result in found})
    return [
        max((pair for pair in found if pair[1].blocks_before == depth), key=lambda pair: pair[1].psnr_db)
        for depth in depths
    ]


def _num_joined(records: Sequence[Record]) -> int:
    return len({r.node_id for r in records if isinstance(r, EventRecord) and r.event == "joined"})
