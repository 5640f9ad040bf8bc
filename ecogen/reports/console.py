"""What a run says in the terminal: a line a round, the closing summary, a prediction's way, and who is there.

Names are shown as text and never read as markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from ecogen.accounting.ledger import Bounds
from ecogen.records import PhaseRecord, RelayRecord, RequestRecord, RoundRecord
from ecogen.reports.served import Cost, ServedSummary
from ecogen.reports.study import Greenest, StudyRow, StudySummary
from ecogen.reports.summary import Summary
from ecogen.reports.tables import Column, Table, hops_tables, identifier, word
from ecogen.reports.wording import (
    DASH,
    LINK_NAMES,
    format_count,
    format_epsilon,
    format_grams,
    format_loss,
    format_number,
    format_perplexity,
    format_range,
    format_share,
    plural,
    warn_of_epsilon,
)
from ecogen.topology import Tier, Topology
from ecogen.units import format_bytes, format_joules, format_seconds


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """What a member of a federation is doing, for `ecogen status`.

    Attributes:
        state: in a word: awaited, preparing, ready, lost, finished.
        round_index: the last that it took part in.
        heard_s: seconds since it was last heard of.
    """

    node_id: str
    tier: Tier
    state: str
    round_index: int | None = None
    heard_s: float | None = None


def round_line(record: RoundRecord, num_rounds: int) -> Text:
    """One round in one line: `round 3/8  edge-0  accuracy 95.2 %  loss 0.3009  3 clusters  4.4 s`.

    Of a language model it says the perplexity in place of the accuracy.
    """
    members = f"{len(record.members)} of {plural(len(record.members) + len(record.missing), 'member')}"
    if record.epsilon is not None:
        members = f"epsilon {format_epsilon(record.epsilon)}"
    is_bad = record.missing or warn_of_epsilon(record.epsilon or 0.0)
    line = Text(f"round {record.round_index + 1}/{num_rounds}  ")
    line.append(f"{record.node_id:<8}", style="bold")
    line.append(f"  {_score(record)}  loss {format_loss(record.loss)}  ")
    if record.confident is not None:
        line.append(f"pseudo-labels {format_share(record.confident)}  ")
    line.append(members, style="red" if is_bad else "")
    return line.append(f"  {format_seconds(record.wall_s)}")


def delivered_line(record: PhaseRecord) -> Text:
    """What an edge's evaluation of the language model gave that it was delivered."""
    return Text.assemble(
        (f"{record.node_id:<8}", "bold"), f"  perplexity {format_perplexity(record.perplexity)} delivered"
    )


def lesson_line(record: RelayRecord) -> Text:
    """One lesson in one line: `lesson 1  cloud  accepted, version 1  perplexity edge-0 64.2 → 14.1  41.0 s`."""
    line = Text.assemble(f"lesson {record.cycle + 1}   ", (f"{record.node_id:<8}", "bold"), "  ")
    if record.accepted:
        told = (f"{one.name} {format_number(one.before)} → {format_number(one.after)}" for one in record.scores)
        line.append(f"accepted, version {record.version}  perplexity {', '.join(told)}")
    else:
        line.append(f"refused: {record.reason}", style="yellow")
    return line.append(f"  {format_seconds(record.wall_s)}")


def _score(record: RoundRecord) -> str:
    if record.perplexity is not None:
        return f"perplexity {format_perplexity(record.perplexity):>7}"
    return f"accuracy {format_share(record.accuracy):>7}"


def show_summary(summary: Summary) -> RenderableType:
    """The closing summary of a run."""
    grid = RichTable.grid(padding=(0, 3))
    for name, value, remark in _summary_rows(summary):
        grid.add_row(Text(name, style="dim"), Text(value, style="bold"), Text(remark, style="dim"))
    return Group(Text(f"{summary['name']}, seed {summary['seed']}", style="bold"), grid)


def show_study(summary: StudySummary) -> list[RenderableType]:
    """The tables of a study, with what matters most, and who was the greenest."""
    parts = {"table": summary["table"], **summary["parts"]}
    columns = (word("case"), Column("first round"), Column("last round"), Column("reference"), Column("seeds"))
    tables: list[RenderableType] = [
        show_table(Table(part.replace("_", " "), columns, tuple(_study_cells(row) for row in rows)))
        for part, rows in parts.items()
        if rows
    ]
    return [*tables, *(Text(_green_line(part, found)) for part, found in summary["greenest"].items())]


def _green_line(part: str, found: Greenest) -> str:
    who = f"the greenest is {found['case']}" if found["case"] else "nobody reached it"
    return f"{part.replace('_', ' ')}: to {format_share(found['target'])}, {who}"


def _study_cells(row: StudyRow) -> tuple[str, ...]:
    reference = row["reference"]
    said = f"{format_share(reference['first'])} → {format_share(reference['last'])}" if reference else DASH
    reached = [f"{format_share(row[f'{when}_mean'])} ± {row[f'{when}_sd'] * 100:.1f}" for when in ("first", "last")]  # type: ignore[literal-required]
    return (row["name"], *reached, said, str(row["seeds"]))


def show_request(record: RequestRecord, topology: Topology) -> RenderableType:
    """What each device of a split chain computed for a request, what crossed each link, and how long it took."""
    computed, crossed = hops_tables(record, topology)
    latency = (
        f"latency {format_seconds(record.latency_s)} = uplink {format_seconds(record.t_ul_s)} + inference "
        f"{format_seconds(record.t_inference_s)} + downlink {format_seconds(record.t_dl_s)}"
    )
    return Group(show_table(computed), show_table(crossed), Text(latency))


def show_status(nodes: Sequence[NodeStatus]) -> RenderableType:
    """Who is in the federation, and doing what."""
    columns = (identifier("node"), word("tier"), word("state"), Column("last round"), Column("last heard"))
    return show_table(Table("Nodes", columns, tuple(_status_cells(node) for node in nodes)))


def show_served(summary: ServedSummary) -> RenderableType:
    """What was served, and what all nodes took meanwhile."""
    columns = (word("of"), identifier("name"), Column("cpu"), Column("sent"), Column("energy"), Column("emissions"))
    groups = (("tier", summary.by_tier), ("site", summary.by_site), ("node", summary.by_node))
    rows = [_cost_cells(of, name, cost) for of, costs in groups for name, cost in costs.items()]
    table = Table("Taken by all nodes", columns, (*rows, _cost_cells("all", "", summary.total)))
    return Group(Text(_served_line(summary)), show_table(table))


def _served_line(summary: ServedSummary) -> str:
    took = f" in {format_seconds(summary.wall_s)}" if summary.wall_s else ""  # no time before the first books
    return (
        f"served {plural(summary.num_requests, 'request')}{took}: "
        f"{plural(summary.prompt_tokens, 'token')} of prompts, {format_count(summary.reused_tokens)} of them known; "
        f"{plural(summary.completion_tokens, 'token')} of answers, for which {format_joules(summary.share_j)} were used"
    )


def _cost_cells(of: str, name: str, cost: Cost) -> tuple[str, ...]:
    figures = format_seconds(cost.cpu_s), format_bytes(cost.sent_bytes), format_joules(cost.energy_j[1])
    return (of, name, *figures, f"{format_grams(cost.emissions_g[1])} CO2e")


def show_table(table: Table) -> RichTable:
    """A table of values for the terminal."""
    shown = RichTable(title=Text(table.caption, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for column in table.columns:
        head = f"{column.name} ({column.unit})" if column.unit else column.name
        justify: Literal["left", "right"] = "right" if column.is_figure else "left"
        shown.add_column(Text(head), justify=justify, overflow="fold", no_wrap=column.is_id)
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def accuracy_line(summary: Summary) -> str:
    """Accuracy after the first round and after the last."""
    return f"{format_share(summary['accuracy']['first'])} → {format_share(summary['accuracy']['last'])}"


def _summary_rows(summary: Summary) -> list[tuple[str, str, str]]:
    """Name, figure and remark of each line."""
    sent = summary["traffic_bytes"]
    rounds = f"{summary['rounds']} of {plural(summary['rounds_planned'], 'round')}"
    links = ", ".join(f"{name} {format_bytes(sent[link])}" for link, name in LINK_NAMES.items())
    energy_j, emissions_g = _bounds(summary["energy_j"]), _bounds(summary["emissions_g_bounds"])
    return [
        *_quality_rows(summary, rounds),
        ("tunable", format_share(summary["tunable_fraction"]), "of the parameters"),
        *_lora_rows(summary),
        ("tunables sent", format_bytes(sent["tunables"]), ""),
        ("all sent", format_bytes(sum(sent[link] for link in LINK_NAMES)), links),
        ("energy", format_joules(energy_j.mid), f"{format_range(energy_j)}, modelled"),
        ("emissions", f"{format_grams(emissions_g.mid)} CO2e", f"{format_range(emissions_g, format_grams)}, modelled"),
        *_privacy_rows(summary),
        *_latency_rows(summary),
        *_crossing_rows(summary),
        ("wall time", format_seconds(summary["wall_s"]), f"engine {summary['engine']}"),
        *_event_rows(summary),
    ]


def _quality_rows(summary: Summary, rounds: str) -> list[tuple[str, str, str]]:
    """Accuracy, or of a language model each edge's perplexity, before and after."""
    if summary["perplexity"] is None:
        return [("accuracy", accuracy_line(summary), rounds)]
    perplexities = [
        (
            f"perplexity {edge}",
            f"{format_perplexity(found['delivered'])} → {format_perplexity(found['tuned'])}",
            f"delivered → tuned, {rounds}; the saved average {format_perplexity(found['saved'])}",
        )
        for edge, found in summary["perplexity"].items()
    ]
    return [*perplexities, *_drawing_rows(summary), *_relay_rows(summary)]


def _drawing_rows(summary: Summary) -> list[tuple[str, str, str]]:
    """Of a text-image generator, how well each edge's draws and describes."""
    rows = []
    for edge, recognised in (summary["recognised"] or {}).items():
        copies, captions = (summary[name] or {} for name in ("copies", "caption_accuracy"))
        remark = f"near copies {format_share(copies[edge])}; captions right {format_share(captions[edge])}"
        rows.append((f"recognised {edge}", DASH if recognised is None else format_share(recognised), remark))
    return rows


def _relay_rows(summary: Summary) -> list[tuple[str, str, str]]:
    """How many lessons were accepted, and what the cloud knows of each domain by them."""
    relay = summary["relay"]
    if relay is None:
        return []
    lessons = [*relay["up"], *relay["down"]]
    accepted = sum(one["accepted"] for one in lessons)
    sent = format_bytes(sum(one["sample_bytes"] + one["tunable_bytes"] for one in relay["cycles"]))
    remark = f"accepted; {sent} sent for them, and the pairs are {format_bytes(relay['data_bytes'])}"
    rows = [("lessons", f"{accepted} of {len(lessons)}", remark)]
    of_cloud = [one for one in relay["versions"] if one["node_id"] == "cloud"]
    for domain in sorted({one["domain"] for one in of_cloud}):
        own = [one for one in of_cloud if one["domain"] == domain]
        drawn = _from_to(own[0]["recognised"], own[-1]["recognised"])
        said = _from_to(own[0]["caption_accuracy"], own[-1]["caption_accuracy"])
        rows.append((f"cloud on {domain}", drawn, f"recognised, delivered → taught; captions right {said}"))
    return rows


def _from_to(first: float | None, last: float | None) -> str:
    return f"{format_share(first)} → {format_share(last)}"


def _lora_rows(summary: Summary) -> list[tuple[str, str, str]]:
    error = summary["lora_error"]
    return [] if error is None else [("LoRA error", format_share(error), "of what products should be, mean of rounds")]


def _bounds(values: Mapping[str, float | str]) -> Bounds:
    return Bounds(float(values["low"]), float(values["mid"]), float(values["high"]))


def _privacy_rows(summary: Summary) -> list[tuple[str, str, str]]:
    spent = summary["privacy"]
    if spent is None:
        return []
    at_delta = f"at delta {spent['delta']:g}"
    if spent["unit"] == "example":
        edges = [(edge, epsilon) for edge, epsilon in spent["edges"].items() if epsilon is not None]
        rows = [(f"epsilon {edge}", format_epsilon(epsilon), f"{at_delta}, of each example") for edge, epsilon in edges]
    else:
        remark = f"{at_delta}, of each of {spent['clusters']} clusters an edge"
        rows = [("epsilon", format_epsilon(spent["epsilon"]), remark)]
    warning = warn_of_epsilon(spent["epsilon"])
    return [*rows, ("warning", "", warning)] if warning else rows


def _latency_rows(summary: Summary) -> list[tuple[str, str, str]]:
    latency_s = summary["latency_s"]
    if latency_s is None:
        return []
    parts = ("uplink", "t_ul"), ("inference", "t_inference"), ("downlink", "t_dl")
    remark = ", ".join(f"{name} {format_seconds(latency_s[key])}" for name, key in parts)
    return [("latency", format_seconds(latency_s["total"]), f"medians: {remark}")]


def _crossing_rows(summary: Summary) -> list[tuple[str, str, str]]:
    """What crosses the link to a generator for a picture, where the modules are here or there."""
    found = summary["crossings"]
    if found is None:
        return []
    return [
        (
            f"{placed['task']}, {placed['crossing']}",
            format_bytes(placed["sent_bytes"] + placed["received_bytes"]),
            f"modules at the {placed['modules']}; {format_seconds(placed['total_s'])} with the modelled link",
        )
        for placed in found["placements"]
    ]


def _event_rows(summary: Summary) -> list[tuple[str, str, str]]:
    """A line each for what a reader should know of: not that nodes joined and finished."""
    events = [event for event in summary["events"] if event["event"] not in ("joined", "finished")]
    return [(event["event"].replace("_", " "), event["node_id"], event["detail"]) for event in events]


def _status_cells(node: NodeStatus) -> tuple[str, ...]:
    heard = DASH if node.heard_s is None else f"{format_seconds(node.heard_s)} ago" if node.heard_s else "now"
    return (
        node.node_id,
        node.tier.value,
        node.state,
        DASH if node.round_index is None else str(node.round_index + 1),
        heard,
    )
