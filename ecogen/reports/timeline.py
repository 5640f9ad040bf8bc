"""The rounds in time, as an inline SVG: when each edge and the cloud worked on which, and what happened meanwhile.

Events stand as numbered discs; the report's table says what each was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ecogen.records import EventRecord, Record, RelayRecord, RoundRecord
from ecogen.reports.plots import WIDTH, tidy_rows
from ecogen.reports.svg import ALARM, GRID, INK, SURFACE, TIER_COLORS, render
from ecogen.reports.wording import shorten
from ecogen.topology import Tier, Topology


def timeline(records: Sequence[Record], topology: Topology) -> str:
    """When each edge and the cloud worked on which round, the lessons between, and the numbered events."""
    rounds = [record for record in records if isinstance(record, RoundRecord)]
    lessons = [record for record in records if isinstance(record, RelayRecord) and record.time_s]
    active = {record.node_id for record in rounds} | {lesson.node_id for lesson in lessons}
    nodes = [node for node in (topology.cloud_id, *topology.edge_ids) if node in active]
    rows = {node: row for row, node in enumerate(nodes)}
    events = notable_events(records)
    clock = _Clock(start_s(rounds), any(record.time_s for record in rounds))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for lesson in lessons:
            _lesson_box(axes, clock, lesson, rows[lesson.node_id])
        for record in rounds:
            color = TIER_COLORS[topology.nodes[record.node_id].tier]
            _round_box(axes, clock, record, rows[record.node_id], color)
        _number_rounds(axes, clock, rounds, rows)
        _event_marks(axes, clock, events, rows, topology)
        axes.set_yticks(range(len(rows)), [shorten(node) for node in rows])
        axes.set_ylim(len(rows) - 0.45, -0.75)
        axes.set_xlabel(clock.unit)
        axes.grid(axis="y", visible=False)
        tidy_rows(axes)

    height = 76 + 44 * len(rows)
    return render(paint, name="timeline", label="Rounds and events in time", width=2 * WIDTH, height=height)


def notable_events(records: Sequence[Record]) -> list[EventRecord]:
    """The events that a reader asks about, in order of time: not that nodes joined and finished."""
    events = [record for record in records if isinstance(record, EventRecord)]
    return sorted((e for e in events if e.event not in ("joined", "finished")), key=lambda e: e.time_s)


def start_s(records: Sequence[Record]) -> float:
    """When the first round began, on the clock of the records; 0 where they carry no time."""
    rounds = [record.time_s - record.wall_s for record in records if isinstance(record, RoundRecord) and record.time_s]
    return min(rounds, default=0.0)


@dataclass(frozen=True, slots=True)
class _Clock:
    """Places records on the time axis; on one of round numbers where records carry no time."""

    start_s: float
    has_time: bool

    @property
    def unit(self) -> str:
        return "seconds since the first round began" if self.has_time else "round"

    def stretch(self, record: RoundRecord) -> tuple[float, float]:
        """Begin and end of a round."""
        if not self.has_time:
            return record.round_index, record.round_index + 1
        end = record.time_s - self.start_s
        return end - record.wall_s, end

    def moment(self, event: EventRecord) -> float:
        return event.time_s - self.start_s if self.has_time else (event.round_index or 0) + 0.5


def _round_box(axes: Axes, clock: _Clock, record: RoundRecord, row: int, color: str) -> None:
    """A box as long as the round, outlined in alarm where members are missing."""
    begin, end = clock.stretch(record)
    edge, line = (ALARM, 2.5) if record.missing else (SURFACE, 1.5)
    axes.barh(row, end - begin, left=begin, height=0.5, color=color, edgecolor=edge, linewidth=line)


def _lesson_box(axes: Axes, clock: _Clock, lesson: RelayRecord, row: int) -> None:
    """A hatched box as long as a lesson took its receiver, with the wait for others."""
    end = lesson.time_s - clock.start_s
    axes.barh(
        row, lesson.wall_s, left=end - lesson.wall_s, height=0.3, color=GRID, edgecolor=INK, hatch="///", linewidth=0
    )


def _number_rounds(axes: Axes, clock: _Clock, rounds: Sequence[RoundRecord], rows: Mapping[str, int]) -> None:
    """The round's number in each box that is wide enough for it."""
    left, right = axes.get_xlim()
    first = min((record.round_index for record in rounds), default=0)
    for record in rounds:
        begin, end = clock.stretch(record)
        if end - begin > 0.02 * (right - left):
            number = str(record.round_index - first + 1)
            axes.text((begin + end) / 2, rows[record.node_id], number, ha="center", va="center", color=SURFACE)


def _event_marks(
    axes: Axes, clock: _Clock, events: Sequence[EventRecord], rows: Mapping[str, int], topology: Topology
) -> None:
    """Numbered discs above the row of the edge that an event belongs to; the report's table says what each was."""
    left, right = axes.get_xlim()
    free = dict.fromkeys(rows.values(), left)
    for number, event in enumerate(events, start=1):
        row = rows.get(_row_node(event.node_id, topology), 0)
        x = max(min(clock.moment(event), right), free[row])
        free[row] = x + 0.02 * (right - left)  # the next disc of the row stands beside this one at least
        axes.text(x, row - 0.42, str(number), ha="center", va="center", fontsize=9, color=SURFACE, bbox=_DISC)


_DISC = {"boxstyle": "circle,pad=0.25", "facecolor": ALARM, "edgecolor": SURFACE}


def _row_node(node_id: str, topology: Topology) -> str:
    """The edge or cloud on whose row an event of a node or a cluster is drawn."""
    if node_id in topology.clusters:
        return topology.clusters[node_id].edge_id
    if node_id in topology.nodes and topology.nodes[node_id].tier is Tier.END:
        return topology.cluster_of(node_id).edge_id
    return node_id
