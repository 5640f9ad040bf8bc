"""One matplotlib figure as an inline SVG: it takes its colours from the page's theme and needs nothing from outside.

Figures are painted in the stand-in colours below, which the SVG then names as the page's CSS variables; so one figure
serves light and dark. Text stays text: it can be read aloud, selected and searched. One unit is one CSS pixel.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import Any, Literal

import matplotlib
from matplotlib.figure import Figure

from ecogen.topology import Tier

INK, MUTED, GRID, SURFACE, ALARM = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05"
SERIES = ("#0a0b11", "#0a0b12", "#0a0b13", "#0a0b14", "#0a0b15", "#0a0b16")
TIER_COLORS = {Tier.CLOUD: SERIES[3], Tier.EDGE: SERIES[0], Tier.END: SERIES[4]}
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface", ALARM: "alarm"} | {
    color: f"series-{index}" for index, color in enumerate(SERIES, start=1)
}
"""Stand-in colour -> the CSS variable that replaces it."""

_UNITS_PER_INCH = 72
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.usetex": False,
    "text.parse_math": False,  # a node may be called "$x$"
    "text.color": INK,
    "font.size": 12,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "legend.frameon": False,
    "legend.fontsize": 11.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def render(
    paint: Callable[[Figure], None],
    *,
    name: str,
    label: str,
    width: int,
    height: int,
    layout: Literal["tight", "constrained"] | None = "tight",
) -> str:
    """The figure that `paint` fills, as an `<svg>` element.

    Args:
        name: unique on the page; it prefixes the ids in the SVG.
        label: what a reader who does not see the figure should hear.
        layout: None where `paint` places its axes itself.
    """
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(width / _UNITS_PER_INCH, height / _UNITS_PER_INCH), dpi=_UNITS_PER_INCH, layout=layout)
        paint(figure)
        text = io.StringIO()
        with warnings.catch_warnings():
            # The browser's fonts draw the text; what DejaVu lacks only costs an estimate of its width.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(text, format="svg")
    size = f'viewBox="0 0 {width} {height}" width="{width}"'
    return f'<svg role="img" aria-label="{escape(label)}" {size}>{_inline(text.getvalue(), name)}'


def _inline(document: str, name: str) -> str:
    """What follows the opening tag of a document's `<svg>`: without metadata, themed, its ids prefixed."""
    body = document.partition("<svg")[2].partition(">")[2].strip()
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body).replace("url(#", f"url(#{name}-")
    body = body.replace('xlink:href="#', f'href="#{name}-').replace("xlink:href", "href")
    for color, variable in VARIABLES.items():
        body = body.replace(color, f"var(--{variable})")
    return body
