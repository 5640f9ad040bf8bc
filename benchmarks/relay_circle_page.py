"""The circle as a page: how each model draws and describes each edge's domain, by cycle, with and without the relay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ecogen.reports.page import render_page
from ecogen.reports.plots import WIDTH
from ecogen.reports.svg import SERIES, render
from ecogen.reports.tables import Column, Table, word
from ecogen.reports.wording import DASH, plural

MEASURES = {
    "recognised": "drawings recognised",
    "caption_accuracy": "captions right",
    "frechet": "Frechet distance",
}
LETTERS = "letters"
READ = "read"
_SHARES = ("recognised", "caption_accuracy", READ)
_STYLES = ("-", "--", "-.", ":", (0, (1, 3)))


@dataclass(frozen=True)
class Section:
    """Of one model: what is said of it, its plots and its table."""

    name: str
    title: str
    text: str
    caption: str
    table: Table


def circle_page(result: Mapping[str, Any]) -> str:
    """The page of a result, of as many runs as it has."""
    table, cycles = result["table"], result["cycles"]
    nodes = list(next(iter(table.values())))
    edges = [node for node in nodes if any(node in of for of in domains_of(table))]
    ordered = [*(node for node in nodes if node not in edges), *edges]
    return render_page(
        "comparison.html.j2",
        title="The circle",
        lead=lead(result),
        sections=[section(table, node, edges, cycles) for node in ordered],
        figures={node: Markup(plot(table, node, edges, cycles)) for node in ordered},
    )


def domains_of(table: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (domains for nodes in table.values() for domains in nodes.values())


def lead(result: Mapping[str, Any]) -> str:
    """What was run."""
    counted = [f"{name} {plural(number, 'seed')}" for name, number in result["seeds"].items()]
    return f"{plural(result['cycles'], 'cycle')} of tuning and lessons; {', '.join(counted)}; {result['date'][:10]}."


def section(table: Mapping[str, Any], node: str, edges: Sequence[str], cycles: int) -> Section:
    """What there is of one model."""
    letters = [
        f"{variant} {100 * nodes[node][LETTERS][READ][str(cycles)]['mean']:.1f} %" for variant, nodes in table.items()
    ]
    return Section(
        node,
        f"The model of {node}",
        f"Letters that it reads in the end: {', '.join(letters)}.",
        "Mean over seeds by cycle; bars span one standard deviation each way. Before the first, all have one model.",
        last_table(table, node, edges, str(cycles)),
    )


def plot(table: Mapping[str, Any], node: str, edges: Sequence[str], cycles: int) -> str:
    """A row for each measure, a column for each domain, a line for each variant."""

    def paint(figure: Figure) -> None:
        places = figure.subplots(len(MEASURES), len(edges), sharex=True, squeeze=False)
        for row, (measure, words) in zip(places, MEASURES.items(), strict=True):
            for axes, domain in zip(row, edges, strict=True):
                _lines(axes, table, (node, domain, measure), cycles)
            row[0].set_ylabel(words)
        for axes, domain in zip(places[0], edges, strict=True):
            axes.set_title(f"domain of {domain}", fontsize=12)
        for axes in places[-1]:
            axes.set_xlabel("cycle")
        figure.legend(*places[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=len(table))

    height = 60 + 190 * len(MEASURES)
    label = f"Quality of the model of {node} by cycle"
    return render(paint, name=node, label=label, width=2 * WIDTH, height=height, layout="constrained")


def _lines(axes: Axes, table: Mapping[str, Any], path: tuple[str, str, str], cycles: int) -> None:
    """Of one model, domain and measure, each variant by cycle; side by side, that bars do not hide each other."""
    node, domain, measure = path
    for index, (variant, nodes) in enumerate(table.items()):
        found = nodes[node][domain][measure]
        told = [cycle for cycle in range(cycles + 1) if str(cycle) in found]
        means, deviations = ([found[str(cycle)][key] for cycle in told] for key in ("mean", "deviation"))
        places = [cycle + 0.03 * (index - len(table) / 2) for cycle in told]
        color, style = SERIES[index % len(SERIES)], _STYLES[index % len(_STYLES)]
        bars = axes.errorbar(places, means, deviations, color=color, marker="o", markersize=4, capsize=2, label=variant)
        bars.lines[0].set_linestyle(style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if measure in _SHARES:
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share * 100:g} %"))
    else:
        axes.set_ylim(bottom=0)


def last_table(table: Mapping[str, Any], node: str, edges: Sequence[str], last: str) -> Table:
    """What each variant ended with."""
    columns = [word("variant"), *(Column(MEASURES[name], edge) for edge in edges for name in MEASURES)]
    rows = tuple(
        (variant, *(_cell(nodes[node][edge][name].get(last), name) for edge in edges for name in MEASURES))
        for variant, nodes in table.items()
    )
    return Table(f"After the last cycle: mean ± standard deviation of {node}'s model", tuple(columns), rows)


def _cell(found: Mapping[str, float] | None, measure: str) -> str:
    if found is None:
        return DASH
    factor = 100 if measure in _SHARES else 1
    unit = " %" if measure in _SHARES else ""
    return f"{factor * found['mean']:.1f} ± {factor * found['deviation']:.1f}{unit}"
