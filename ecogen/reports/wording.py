"""How figures read: percentages, grams, bounds and names, one way in the terminal, the plots and the report."""

from __future__ import annotations

import math
from collections.abc import Callable

from ecogen.accounting.ledger import Bounds
from ecogen.records import LinkClass
from ecogen.units import format_joules

DASH = "\N{EN DASH}"
"""Stands for what was not measured, and between the ends of a range."""

LINK_NAMES: dict[LinkClass, str] = {
    "cloud_edge": f"cloud {DASH} edge",
    "edge_end": f"edge {DASH} end",
    "d2d": "device to device",
}


WEAK_EPSILON = 10.0
"""Above this, a report warns: the guarantee lets one cluster's part change any outcome's odds by e^10, 22,000 times."""


def phase_name(phase: str) -> str:
    """A phase for people."""
    return "pre-training" if phase == "pretraining" else phase


def format_share(share: float | None) -> str:
    """A share of one for people: `format_share(0.9644)` is `'96.4 %'`; one that was not measured is a dash."""
    return DASH if share is None else f"{share * 100:.1f} %"


def format_loss(loss: float | None) -> str:
    """A loss for people; one that was not measured is a dash."""
    return DASH if loss is None else f"{loss:.4f}"


def format_perplexity(perplexity: float | None) -> str:
    """A perplexity for people; one that was not measured is a dash."""
    return DASH if perplexity is None else f"{perplexity:.2f}"


def format_epsilon(epsilon: float) -> str:
    """A privacy loss for people, rounded up: `format_epsilon(7.912)` is `'7.92'`."""
    return f"{math.ceil(epsilon * 100 - 1e-9) / 100:.2f}"


def warn_of_epsilon(epsilon: float) -> str:
    """What to say of a privacy loss that promises next to nothing; nothing where it is smaller."""
    if epsilon <= WEAK_EPSILON:
        return ""
    return (
        f"epsilon is above {WEAK_EPSILON:g}: hardly a promise; take more noise, fewer rounds, or more clusters or "
        "examples and a smaller share of them at a time"
    )


def format_grams(grams: float) -> str:
    """Emissions for people: `format_grams(0.0123)` is `'12.3 mg'`."""
    for factor, unit in ((1e6, "t"), (1e3, "kg"), (1.0, "g"), (1e-3, "mg")):
        if abs(grams) >= factor:
            return f"{grams / factor:.3g} {unit}"
    return f"{grams * 1e6:.3g} µg" if grams else "0 g"


def format_count(count: float) -> str:
    """A whole number with thin gaps between thousands: `'21 600'`."""
    return f"{count:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def format_number(value: float) -> str:
    """Three significant digits without an exponent, gaps between thousands: `'388 000'`, `'0.0123'`."""
    if value == 0 or abs(value) >= 999.5:
        digits = max(0, len(f"{abs(value):.0f}") - 3)
        return format_count(round(value, -digits))
    return f"{value:#.3g}".rstrip(".") if abs(value) >= 1e-4 else f"{value:.1e}"


def format_range(bounds: Bounds, format_value: Callable[[float], str] = format_joules) -> str:
    """The bounds alone: `'180 J to 950 J'`."""
    return f"{format_value(bounds.low)} to {format_value(bounds.high)}"


def plural(count: int, noun: str) -> str:
    """A count with its noun: `'1 round'`, `'8 rounds'`."""
    return f"{format_count(count)} {noun}{'' if count == 1 else 's'}"


def shorten(name: str, most: int = 18) -> str:
    """A name that fits beside a chart."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def short_id(node_id: str) -> str:
    """A node's name within its cluster: `'device-2'` of `'edge-0.cluster-1.device-2'`."""
    return node_id.rpartition(".")[2]
