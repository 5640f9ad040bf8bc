"""The charts of a report, each as an inline SVG: accuracy, traffic, energy, latency, the attack.

Values stand in a column of their own beside the bars, so they never overlap and can be read as a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ecogen.accounting.ledger import Bill, Bounds, Ledger
from ecogen.measurements import InversionAttack
from ecogen.records import Record, RequestRecord
from ecogen.reports.summary import history
from ecogen.reports.svg import GRID, INK, SERIES, render
from ecogen.reports.wording import LINK_NAMES, plural, shorten
from ecogen.topology import Tier, Topology
from ecogen.units import format_bytes, format_joules, format_seconds

WIDTH = 440
LINES = ("cpu", "idle", "memory", "network", "overhead")
"""The lines of a bill, as in `Bill.cpu_j` and so on."""

_LOG_FROM = 100  # a chart whose largest value is this many times its smallest is drawn on a logarithmic axis
_MAX_SHOWN = 12  # attacked images beside each other
MAX_LABELS = 6  # more lines than this share one colour and have no names


@dataclass(frozen=True, slots=True)
class Bar:
    """One named value of a chart, with the words for it, and its bounds where it has any."""

    name: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None


def accuracy(records: Sequence[Record], topology: Topology) -> str:
    """Accuracy by round, one line an edge, and the cloud's averages."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        _round_lines(axes, records, topology, "accuracy")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share * 100:g} %"))

    return render(paint, name="accuracy", label="Accuracy by round and edge", width=WIDTH, height=260)


def perplexity(records: Sequence[Record], topology: Topology, delivered: Mapping[str, float | None]) -> str:
    """Perplexity by round, one line an edge, and the cloud's averages; a dashed line at what an edge was delivered."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for index, value in enumerate(delivered.values()):
            color = SERIES[index % len(SERIES)] if len(delivered) <= MAX_LABELS else SERIES[0]
            if value is not None:
                axes.axhline(value, color=color, linewidth=1.2, linestyle=(0, (4, 2)))
        _round_lines(axes, records, topology, "perplexity")

    label = "Perplexity by round and edge; dashed: of the delivered model"
    return render(paint, name="perplexity", label=label, width=WIDTH, height=260)


def loss(records: Sequence[Record], topology: Topology) -> str:
    """Loss by round, one line an edge, and the cloud's averages."""

    def paint(figure: Figure) -> None:
        _round_lines(figure.subplots(), records, topology, "loss")

    return render(paint, name="loss", label="Loss by round and edge", width=WIDTH, height=260)


def traffic_by_kind(ledger: Ledger) -> str:
    """Bytes by what they carry."""
    bars = [Bar(kind, sent, format_bytes(sent)) for kind, sent in ledger.traffic_by_kind().items()]
    return _bar_chart(bars, name="traffic-kind", label="Traffic by kind", unit="B")


def traffic_by_link(ledger: Ledger) -> str:
    """Bytes by the class of link they crossed."""
    bars = [Bar(LINK_NAMES[link], sent, format_bytes(sent)) for link, sent in ledger.traffic_by_link().items()]
    return _bar_chart(bars, name="traffic-link", label="Traffic by link class", unit="B")


def energy_by_tier(bills: Mapping[Tier, Bill]) -> str:
    """Joules by tier, with their bounds."""
    bars = [_energy_bar(tier.value, bills[tier].energy_j) for tier in Tier if tier in bills]
    return _bar_chart(bars, name="energy-tier", label="Energy by tier, with bounds", unit="J")


def energy_by_line(total: Bill) -> str:
    """Joules by the line of the bill, with their bounds."""
    bars = [_energy_bar(line, getattr(total, f"{line}_j")) for line in LINES]
    return _bar_chart(bars, name="energy-line", label="Energy by line of the bill, with bounds", unit="J")


def latency(records: Sequence[Record], topology: Topology) -> str:
    """Median latency of a request at each edge: uplink, inference, downlink."""
    parts = _latency_parts(records, topology)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        _stacked(axes, parts, ("uplink", "inference", "downlink"))

    height = 96 + 30 * len(parts)
    return render(paint, name="latency", label="Median latency by edge", width=WIDTH, height=height)


def inversion(attacks: Sequence[InversionAttack]) -> str:
    """What each attacker recovers at each depth of the cut, beside somebody who sees nothing."""
    depths = sorted({result.blocks_before for attack in attacks for result in attack.results})
    baseline = max(result.baseline_psnr_db for attack in attacks for result in attack.results)
    width = 0.84 / len(attacks)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for index, attack in enumerate(attacks):
            shift = (index - (len(attacks) - 1) / 2) * width
            bars = [(depths.index(result.blocks_before) + shift, result.psnr_db) for result in attack.results]
            color = SERIES[index % len(SERIES)]
            axes.bar([x for x, _ in bars], [y for _, y in bars], width=0.9 * width, color=color, label=attack.attacker)
            for x, y in bars:
                axes.annotate(f"{y:.1f}", (x, y), (0, 3), **_ABOVE)
        axes.axhline(baseline, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.set_xticks(range(len(depths)), [f"after {plural(depth, 'block')}" for depth in depths])
        axes.set_ylabel("PSNR in dB; dashed: mean image")
        axes.margins(y=0.12)
        axes.grid(axis="x", visible=False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderpad=0, handlelength=1, columnspacing=1)

    label = "Quality of each attacker's reconstructions by blocks before the cut"
    return render(paint, name="inversion", label=label, width=WIDTH, height=300)


def reconstructions(attacks: Sequence[InversionAttack]) -> str:
    """Attacked images, and below them what each attacker recovered, one row a depth of the cut."""
    depths = sorted({result.blocks_before for attack in attacks for result in attack.results})
    shown = min(_MAX_SHOWN // len(attacks), *(len(attack.originals) for attack in attacks))

    def paint(figure: Figure) -> None:
        grid = figure.add_gridspec(1, len(attacks), left=0.11, right=1, bottom=0, top=0.9, wspace=0.06)
        for index, attack in enumerate(attacks):
            found = {result.blocks_before: result.reconstructions for result in attack.results}
            rows = [attack.originals, *(found.get(depth, ()) for depth in depths)]
            cells = grid[index].subgridspec(len(rows), max(shown, 1), wspace=0.05, hspace=0.06).subplots(squeeze=False)
            for row, (axes_row, images) in enumerate(zip(cells, rows, strict=True)):
                _image_row(axes_row, images[:shown], f"{attack.attacker}-{row}".replace(" ", "-"))
            cells[0][0].set_title(attack.attacker, loc="left", fontsize=12, color=INK)
            if index == 0:
                _row_titles(cells, ["original", *(f"after {plural(depth, 'block')}" for depth in depths)])

    label = "Attacked images and their reconstructions"
    height = 30 + 62 * (1 + len(depths))
    return render(paint, name="reconstructions", label=label, width=2 * WIDTH, height=height, layout=None)


_ABOVE: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 10.5}


def _round_lines(axes: Axes, records: Sequence[Record], topology: Topology, field: str) -> None:
    """One line an edge, and diamonds for the cloud, named at their ends."""
    edges = topology.edge_ids
    ends: list[tuple[float, str, str]] = []
    for index, edge in enumerate(edges):
        color = SERIES[index % len(SERIES)] if len(edges) <= MAX_LABELS else SERIES[0]
        ends += _line(axes, records, edge, field, color, marker="o", markersize=4)
    ends += _line(axes, records, topology.cloud_id, field, INK, marker="D", markersize=4.5, linestyle=":")
    if len(edges) <= MAX_LABELS:
        name_ends(axes, ends)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="x", visible=False)


def _line(
    axes: Axes, records: Sequence[Record], node_id: str, field: str, color: str, **style: Any
) -> list[tuple[float, str, str]]:
    """Draws what a node recorded and returns where the line ends, if it has a point."""
    values = history(records, node_id, lambda record: getattr(record, field))
    points = [(number, value) for number, value in enumerate(values, start=1) if value is not None]
    axes.plot([x for x, _ in points], [y for _, y in points], color=color, **style)
    return [(points[-1][1], node_id, color)] if points else []


def name_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names right of the axes, at the height of each line's last value, pushed apart where they would touch."""
    low, high = axes.get_ylim()
    heights = _apart([(value - low) / (high - low) for value, _, _ in sorted(ends)], least=0.075)
    for height, (_, name, color) in zip(heights, sorted(ends), strict=True):
        axes.text(1.015, height, shorten(name), transform=axes.transAxes, color=color, va="center", fontsize=11.5)


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Rising heights in [0, 1], each at least `least` above the one before, moved as little as that takes."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + least) if placed else height)
    overshoot = max(0.0, placed[-1] - 1) if placed else 0.0
    return [height - overshoot for height in placed]


def _energy_bar(name: str, energy_j: Bounds) -> Bar:
    return Bar(name, energy_j.mid, format_joules(energy_j.mid), energy_j.low, energy_j.high)


def _bar_chart(bars: Sequence[Bar], *, name: str, label: str, unit: str) -> str:
    spoken = f"{label}: " + ", ".join(f"{bar.name} {bar.text}" for bar in bars)

    def paint(figure: Figure) -> None:
        _bars(figure.subplots(), bars, unit)

    return render(paint, name=name, label=spoken, width=WIDTH, height=84 + 28 * len(bars))


def _bars(axes: Axes, bars: Sequence[Bar], unit: str) -> None:
    """Horizontal bars, or dots on a logarithmic axis where the values differ too much for lengths."""
    rows = range(len(bars))
    if _differ_widely(bars):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(LogLocator(numticks=5))
        axes.set_xlabel("logarithmic scale")
        shown = [(row, bar) for row, bar in zip(rows, bars, strict=True) if bar.value > 0]
        axes.hlines(rows, 0, 1, transform=axes.get_yaxis_transform(), color=GRID, linewidth=0.7, linestyle=":")
        axes.plot([bar.value for _, bar in shown], [row for row, _ in shown], "o", color=SERIES[0], markersize=8)
    else:
        axes.barh(rows, [bar.value for bar in bars], height=0.55, color=SERIES[0])
    for row, bar in zip(rows, bars, strict=True):
        _whisker(axes, row, bar)
    _row_names(axes, [bar.name for bar in bars])
    _column(axes, [bar.text for bar in bars])
    axes.xaxis.set_major_formatter(FuncFormatter(_format_j if unit == "J" else _format_b))


def _differ_widely(bars: Sequence[Bar]) -> bool:
    values = [value for bar in bars for value in (bar.low, bar.value, bar.high) if value]
    return bool(values) and max(values) > _LOG_FROM * min(values)


def _whisker(axes: Axes, row: int, bar: Bar) -> None:
    if bar.low is not None and bar.high is not None and bar.high > 0:
        axes.plot([bar.low, bar.high], [row, row], color=INK, linewidth=1.2, marker="|", markersize=8)


def _format_b(num_bytes: float, _: int) -> str:
    return format_bytes(num_bytes) if num_bytes else "0"


def _format_j(energy_j: float, _: int) -> str:
    return format_joules(energy_j) if energy_j else "0"


def _row_names(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [shorten(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(4)) if axes.get_xscale() == "linear" else None
    tidy_rows(axes)


def tidy_rows(axes: Axes) -> None:
    """Row names in ink, without ticks or an axis line."""
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)


def _column(axes: Axes, texts: Sequence[str]) -> None:
    """One text beside each row."""
    for row, text in enumerate(texts):
        axes.annotate(text, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=11.5)


def _latency_parts(records: Sequence[Record], topology: Topology) -> dict[str, tuple[float, float, float]]:
    """Edge -> medians of uplink, inference and downlink over the requests of its clusters."""
    requests = [record for record in records if isinstance(record, RequestRecord)]
    parts: dict[str, tuple[float, float, float]] = {}
    for edge in topology.edge_ids:
        clusters = {cluster.cluster_id for cluster in topology.clusters_of(edge)}
        own = [request for request in requests if request.cluster_id in clusters]
        if own:
            parts[edge] = (
                median(request.t_ul_s for request in own),
                median(request.t_inference_s for request in own),
                median(request.t_dl_s for request in own),
            )
    return parts


def _stacked(axes: Axes, parts: Mapping[str, Sequence[float]], names: Sequence[str]) -> None:
    """Horizontal bars of several parts each, with the length of the whole bar beside them."""
    lefts = [0.0] * len(parts)
    for index, name in enumerate(names):
        widths = [row[index] for row in parts.values()]
        axes.barh(range(len(parts)), widths, left=lefts, height=0.55, color=SERIES[index], label=name)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    _row_names(axes, list(parts))
    _column(axes, [format_seconds(sum(row)) for row in parts.values()])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: format_seconds(seconds) if seconds else "0"))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(names), borderpad=0, handlelength=1)


def _image_row(axes_row: Sequence[Axes], images: Sequence[Any], name: str) -> None:
    """`name` makes the pictures' ids unique, which matplotlib derives from their content."""
    for axes in axes_row:
        axes.set_axis_off()
    for column, (axes, image) in enumerate(zip(axes_row, images, strict=False)):
        picture = axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="none")
        picture.set_gid(f"{name}-{column}")


def _row_titles(cells: Iterable[Sequence[Axes]], names: Sequence[str]) -> None:
    for row, name in zip(cells, names, strict=True):
        row[0].text(-0.2, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=11.5)
