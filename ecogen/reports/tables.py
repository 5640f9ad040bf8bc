"""The tables of a run as plain values, which the terminal and the HTML report show each in its own way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from ecogen.accounting.intensity import intensity
from ecogen.accounting.ledger import Bill, Ledger
from ecogen.measurements import Drawings, Inversion, InversionAttack
from ecogen.placement import Placement
from ecogen.records import EventRecord, Hop, Record, RequestRecord, RoundRecord
from ecogen.reports.summary import RunFacts, Summary, history, round_indices
from ecogen.reports.wording import (
    DASH,
    LINK_NAMES,
    format_count,
    format_epsilon,
    format_loss,
    format_number,
    format_perplexity,
    format_share,
    short_id,
)
from ecogen.topology import Topology

Name = TypeVar("Name", bound=str)

_MAX_EDGES = 6  # more edges than this have no column of their own


@dataclass(frozen=True, slots=True)
class Column:
    """A column's head. Figures stand right, words left; what people copy is kept on one line, sentences are not."""

    name: str
    unit: str = ""
    is_figure: bool = True
    is_id: bool = False
    wraps: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A caption, columns, and rows of words."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


def word(name: str) -> Column:
    """The head of a column of words."""
    return Column(name, is_figure=False)


def sentence(name: str, unit: str = "") -> Column:
    """The head of a column of words that may take several lines."""
    return Column(name, unit, is_figure=False, wraps=True)


def identifier(name: str) -> Column:
    """The head of a column of ids."""
    return Column(name, is_figure=False, is_id=True)


def rounds_table(records: Sequence[Record], topology: Topology) -> Table:
    """Accuracy of the cloud and of each edge by round, the mean loss, examples, and what was missing.

    Of a language model, perplexity in its place. Where LoRA's products were averaged, by how much the edges missed
    their mean, as a mean over edges.
    """
    nodes = [topology.cloud_id, *(topology.edge_ids if len(topology.edge_ids) <= _MAX_EDGES else ())]
    is_text = any(isinstance(record, RoundRecord) and record.perplexity is not None for record in records)
    name, show = ("perplexity", format_perplexity) if is_text else ("accuracy", format_share)
    scores = [history(records, node, lambda record: getattr(record, name)) for node in nodes]
    has_error = any(isinstance(record, RoundRecord) and record.lora_error is not None for record in records)
    rows = []
    for position, index in enumerate(round_indices(records)):
        shares = [show(score[position]) for score in scores]
        edges = [r for r in _rounds(records, index) if r.node_id != topology.cloud_id]
        rows.append((str(position + 1), *shares, *_lora_error(edges, has_error), *_round_totals(edges)))
    columns = [word("round"), *(Column(node, name) for node in nodes)]
    columns += [Column("LoRA error", "of the mean")] if has_error else []
    columns += [Column("loss", "mean of edges"), Column("examples"), Column("longest edge", "s"), word("missing")]
    return Table("Rounds", tuple(columns), tuple(rows))


def perplexity_table(summary: Summary, *, examples: str = "text", is_averaged: bool = True) -> Table:
    """Perplexity by edge: delivered, tuned and saved; no rows of images.

    Args:
        examples: what was held out.
        is_averaged: whether the cloud averages what edges have tuned, and so makes what is saved.
    """
    rows = tuple(
        (edge, *(format_perplexity(found[when]) for when in ("delivered", "tuned", "saved")))
        for edge, found in (summary["perplexity"] or {}).items()
    )
    columns = (
        identifier("edge"),
        Column("delivered"),
        Column("tuned", "its own average"),
        Column("saved", "the cloud's average" if is_averaged else "of each edge"),
    )
    return Table(f"Perplexity on held-out {examples}", columns, rows)


def drawings_table(
    drawings: Mapping[str, Drawings], caption: str = "What the model of each edge draws and says"
) -> Table:
    """How well generators draw and describe each edge's domain; no rows of other models."""
    rows = tuple(
        (
            edge,
            format_count(found.num_drawn),
            *(DASH if value is None else format_share(value) for value in (found.recognised, found.real_recognised)),
            *(DASH if value is None else format_number(value) for value in (found.frechet, found.real_frechet)),
            format_share(found.copies),
            *(format_number(value) for value in (found.members_by_drawings, found.members_by_model)),
            format_share(found.caption_accuracy),
        )
        for edge, found in drawings.items()
    )
    columns = (
        identifier("edge"),
        Column("drawn"),
        Column("recognised"),
        Column("of real ones"),
        Column("distance", "Fréchet"),
        Column("of real ones", "Fréchet"),
        Column("near copies"),
        Column("members told", "AUC, by drawings"),
        Column("members told", "AUC, by the model"),
        Column("captions right"),
    )
    return Table(caption, columns, rows)


def privacy_table(summary: Summary) -> Table:
    """Epsilon by round; no rows without noise."""
    spent = summary["privacy"]
    rows = [] if spent is None else enumerate(spent["per_round"], start=1)
    cells = tuple((str(number), DASH if value is None else format_epsilon(value)) for number, value in rows)
    return Table("Epsilon by round", (word("round"), Column("epsilon")), cells)


def traffic_table(ledger: Ledger) -> Table:
    """Messages and bytes by link class and kind, the largest first."""
    columns = ("messages", ""), ("payload", "B"), ("headers", "B"), ("framing, modelled", "B")
    rows = sorted(ledger.traffic(), key=lambda row: -row.sent_bytes)
    return Table(
        "Traffic by link class and kind",
        (word("link class"), word("kind"), *(Column(name, unit) for name, unit in columns)),
        tuple(
            (
                "to an operator" if row.link_class is None else LINK_NAMES[row.link_class],
                row.kind,
                *(format_count(n) for n in (row.messages, row.payload_bytes, row.header_bytes, row.framing_bytes)),
            )
            for row in rows
        ),
    )


def bills_table(caption: str, name: str, bills: Mapping[Name, Bill], say: Callable[[str], str] = str) -> Table:
    """Joules by line with their total, and grams, one row a bill; the lines are the middle estimates.

    Args:
        name: what a row is: a tier, a site, a phase.
        say: how the key of a row reads.
    """
    factor, unit = _emissions_unit(bills.values())
    columns = [word(name), *(Column(line, "J") for line in ("cpu", "idle", "memory", "network", "overhead"))]
    columns += [
        Column("energy", "J"),
        Column(f"low {DASH} high", "J"),
        Column("emissions", unit),
        Column(f"low {DASH} high", unit),
    ]
    rows = tuple((say(key), *_bill_cells(bill, factor)) for key, bill in bills.items())
    return Table(caption, tuple(columns), rows)


def latency_table(records: Sequence[Record], topology: Topology) -> Table:
    """Median of each part of a request's latency by edge, with the 95th percentile of the total."""
    requests = [record for record in records if isinstance(record, RequestRecord)]
    columns = ("requests", ""), ("uplink", "ms"), ("inference", "ms"), ("downlink", "ms"), ("total", "ms")
    rows = []
    for edge in topology.edge_ids:
        clusters = {cluster.cluster_id for cluster in topology.clusters_of(edge)}
        own = [request for request in requests if request.cluster_id in clusters]
        if own:
            rows.append((edge, str(len(own)), *_latency_cells(own)))
    heads = (*(Column(name, unit) for name, unit in columns), Column("total, 95 %", "ms"))
    return Table("Median latency of a request", (word("edge"), *heads), tuple(rows))


def events_table(events: Sequence[EventRecord], first_round: int, start_s: float) -> Table:
    """The numbered events of the timeline."""
    columns = (word("no."), Column("time", "s"), Column("round"), word("event"), identifier("node"), word("detail"))
    return Table(
        "Events",
        columns,
        tuple(
            (
                str(number),
                format_number(event.time_s - start_s) if event.time_s and start_s else DASH,
                DASH if event.round_index is None else str(event.round_index - first_round + 1),
                event.event.replace("_", " "),
                event.node_id,
                event.detail or DASH,
            )
            for number, event in enumerate(events, start=1)
        ),
    )


def sites_table(topology: Topology) -> Table:
    """Where the nodes stand: grid zone and its annual average, power usage effectiveness, nodes."""
    counts = {site: sum(node.site_id == site for node in topology.nodes.values()) for site in topology.sites}
    return Table(
        "Sites",
        (word("site"), word("zone"), Column("grid", "gCO2e/kWh"), Column("PUE"), Column("nodes")),
        tuple(
            (site.site_id, site.zone, f"{intensity(site.zone).g_per_kwh:g}", f"{site.pue:g}", str(counts[key]))
            for key, site in topology.sites.items()
        ),
    )


def links_table(topology: Topology) -> Table:
    """The classes of links: round-trip time and bandwidth; and the access links that devices have of their own."""
    own = Counter(node.access for node in topology.nodes.values() if node.access)
    named = [(LINK_NAMES[name], link) for name, link in topology.links.items()]
    named += [(f"access of {count} end device{'s' * (count != 1)}", link) for link, count in own.items()]
    return Table(
        "Links",
        (word("link class"), Column("round trip", "ms"), Column("bandwidth", "Mbit/s")),
        tuple((name, f"{link.rtt_s * 1e3:g}", f"{link.bytes_per_s * 8 / 1e6:g}") for name, link in named),
    )


def placement_table(topology: Topology, placements: Mapping[str, Placement]) -> Table:
    """The route of a microbatch through each cluster, in words."""
    rows = [
        (cluster.edge_id, short_id(name), _route(placements[name]))
        for name, cluster in topology.clusters.items()
        if name in placements
    ]
    return Table("Placement", (word("edge"), word("cluster"), word("route of a microbatch")), tuple(rows))


def inversion_table(facts: RunFacts) -> Table:
    """What each attacker recovered, by blocks before the cut."""
    columns = [word("attacker"), Column("blocks", "before the cut"), Column("images")]
    columns += [Column("PSNR", "dB"), Column("mean image alone", "dB"), Column("SSIM"), Column("labels read")]
    columns += [Column("from the originals")]
    rows = tuple(_inversion_cells(attack, result) for attack in facts.inversion for result in attack.results)
    return Table("Inversion attacks", tuple(columns), rows)


def hops_tables(record: RequestRecord, topology: Topology) -> tuple[Table, Table]:
    """What each device computed for a request, and what crossed each link."""
    computed = Table(
        "Computed",
        (identifier("device"), word("segment"), Column("compute", "ms")),
        tuple((hop.node_id, hop.segment, _ms(hop.compute_s)) for hop in record.hops),
    )
    crossed = Table(
        "Sent",
        (identifier("from"), identifier("to"), word("link class"), Column("sent", "B"), Column("time, modelled", "ms")),
        tuple(_sent_cells(hop, topology) for hop in record.hops if hop.receiver_id is not None),
    )
    return computed, crossed


def _rounds(records: Sequence[Record], index: int) -> list[RoundRecord]:
    return [record for record in records if isinstance(record, RoundRecord) and record.round_index == index]


def _lora_error(edges: Sequence[RoundRecord], is_shown: bool) -> tuple[str, ...]:
    errors = [record.lora_error for record in edges if record.lora_error is not None]
    return (format_share(sum(errors) / len(errors) if errors else None),) if is_shown else ()


def _round_totals(edges: Sequence[RoundRecord]) -> tuple[str, str, str, str]:
    losses = [record.loss for record in edges if record.loss is not None]
    loss = sum(losses) / len(losses) if losses else None
    missing = ", ".join(name for record in edges for name in record.missing)
    longest_s = max((record.wall_s for record in edges), default=0.0)
    num_examples = sum(record.num_examples for record in edges)  # 0 where it is private
    return format_loss(loss), format_count(num_examples) if num_examples else DASH, f"{longest_s:.2f}", missing or DASH


def _emissions_unit(bills: Iterable[Bill]) -> tuple[float, str]:
    """Factor from grams, and the unit in which a table of these bills reads well."""
    largest_g = max((bill.emissions_g.mid for bill in bills), default=0.0)
    return (1.0, "gCO2e") if largest_g >= 10 else (1e3, "mgCO2e")


def _bill_cells(bill: Bill, factor: float) -> tuple[str, ...]:
    lines = (bill.cpu_j, bill.idle_j, bill.memory_j, bill.network_j, bill.overhead_j)
    energy, emissions = bill.energy_j, bill.emissions_g * factor
    cells = [format_number(line.mid) for line in lines]
    for bounds in (energy, emissions):
        cells += [format_number(bounds.mid), f"{format_number(bounds.low)} {DASH} {format_number(bounds.high)}"]
    return tuple(cells)


def _latency_cells(requests: Sequence[RequestRecord]) -> tuple[str, ...]:
    totals = sorted(request.latency_s for request in requests)
    return (
        _ms(median(request.t_ul_s for request in requests)),
        _ms(median(request.t_inference_s for request in requests)),
        _ms(median(request.t_dl_s for request in requests)),
        _ms(median(totals)),
        _ms(totals[max(0, -(-95 * len(totals) // 100) - 1)]),  # nearest rank
    )


def _route(placement: Placement) -> str:
    return " → ".join(f"{short_id(visit.node_id)}: {visit.segment}" for visit in placement)


def _inversion_cells(attack: InversionAttack, result: Inversion) -> tuple[str, ...]:
    return (
        attack.attacker,
        str(result.blocks_before),
        format_count(attack.num_images),
        f"{result.psnr_db:.1f}",
        f"{result.baseline_psnr_db:.1f}",
        DASH if result.ssim is None else f"{result.ssim:.2f}",
        format_share(result.label_accuracy),
        format_share(attack.original_label_accuracy),
    )


def _sent_cells(hop: Hop, topology: Topology) -> tuple[str, ...]:
    receiver = hop.receiver_id or ""
    link = topology.link(hop.node_id, receiver)
    link_class = LINK_NAMES[link.link_class] if link else "to an operator"
    return hop.node_id, receiver, link_class, format_count(hop.sent_bytes), _ms(hop.link_s)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"
