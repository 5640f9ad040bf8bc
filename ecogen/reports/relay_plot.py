"""How the models did from lesson to lesson, as inline SVGs: a line for each model and domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ecogen.reports.plots import MAX_LABELS, WIDTH, name_ends
from ecogen.reports.relay import Relay, VersionScore
from ecogen.reports.svg import SERIES, render

Measure = Literal["recognised", "caption_accuracy"]

_LABELS: dict[Measure, str] = {"recognised": "Drawings recognised", "caption_accuracy": "Captions right"}


def by_lesson(relay: Relay, measure: Measure) -> str:
    """Before the first lesson and after each: of the cloud dotted, of an edge in its own domain solid, else dashed."""
    told = [one for one in relay["versions"] if one[measure] is not None]
    domains = sorted({one["domain"] for one in told})
    lines = sorted({(one["domain"], one["node_id"]) for one in told})

    def paint(figure: Figure) -> None:
        axes, ends = figure.subplots(), list[tuple[float, str, str]]()
        for domain, node in lines:
            own = [one for one in told if (one["domain"], one["node_id"]) == (domain, node)]
            color = SERIES[domains.index(domain) % len(SERIES)]
            last = _line(axes, _after_each(own), measure, color, _dashes(own[0]))
            ends.append((last, node if node == domain else f"{node} on {domain}", color))
        if len(lines) <= MAX_LABELS:
            name_ends(axes, ends)
        axes.set_xlabel("lessons")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share * 100:g} %"))
        axes.grid(axis="x", visible=False)

    name = f"relay-{measure.replace('_', '-')}"
    return render(paint, name=name, label=f"{_LABELS[measure]} by lesson", width=WIDTH, height=260)


def _after_each(own: Sequence[VersionScore]) -> list[VersionScore]:
    """The first version, and those that lessons led to."""
    return [one for place, one in enumerate(own) if not place or one["what"] == "after"]


def _line(axes: Axes, own: Sequence[VersionScore], measure: Measure, color: str, dashes: str) -> float:
    """Draws it, and returns its last value."""
    values = [one[measure] or 0.0 for one in own]
    axes.plot(range(len(own)), values, color=color, linestyle=dashes, marker="o", markersize=4)
    return values[-1]


def _dashes(one: VersionScore) -> str:
    if one["node_id"] == one["domain"]:
        return "-"
    return ":" if one["node_id"] == "cloud" else "--"
