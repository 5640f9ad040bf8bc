"""A study's report.html: its plot over clusters, and a table for each part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ecogen.reports.page import render_page
from ecogen.reports.plots import WIDTH
from ecogen.reports.study import StudyRow, StudySummary, energy_to_target
from ecogen.reports.svg import INK, MUTED, SERIES, render
from ecogen.reports.tables import Column, Table, word
from ecogen.reports.wording import DASH, format_share
from ecogen.storage import write_atomically
from ecogen.units import format_bytes, format_joules, format_seconds

_PERCENT = FuncFormatter(lambda share, _: f"{share * 100:g} %")


def write_study(path: Path, summary: StudySummary) -> None:
    """Write the page.

    Raises:
        StorageError: if the disk is full.
    """
    write_atomically(path, render_study(summary))


def render_study(summary: StudySummary) -> str:
    """The page of a study, however far it came."""
    rows = summary["table"]
    figures = {"accuracy": Markup(plot_study(rows, summary["source"]))} if rows else {}
    parts = {"table": rows, **summary["parts"]}
    return render_page(
        "study.html.j2",
        summary=summary,
        figures=figures,
        tables=[_table(part, part_rows) for part, part_rows in parts.items() if part_rows],
        greenest=[
            (found["case"], _green_table(part, found["target"], parts[part]))
            for part, found in summary["greenest"].items()
        ],
        wins=_wins([row for part_rows in parts.values() for row in part_rows]),
    )


def plot_study(rows: Sequence[StudyRow], source: str) -> str:
    """First and last accuracy over the number of clusters, with deviations; beside them the reference and others."""
    ordered = sorted(rows, key=lambda row: row["clusters"])

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        _our_lines(axes, ordered)
        _reference_lines(axes, [row for row in ordered if row["reference"]], source)
        _other_lines(axes, [row for row in ordered if row["beside"]])
        axes.set_xlabel("clusters")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(_PERCENT)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderpad=0, handlelength=2, columnspacing=1)

    return render(paint, name="study", label="Accuracy by number of clusters", width=2 * WIDTH, height=380)


def _our_lines(axes: Axes, rows: Sequence[StudyRow]) -> None:
    for field, color, label in (("last", SERIES[0], "last round"), ("first", SERIES[1], "first round")):
        means, deviations = ([row[f"{field}_{key}"] for row in rows] for key in ("mean", "sd"))  # type: ignore[literal-required]
        axes.errorbar(_clusters(rows), means, deviations, color=color, marker="o", capsize=3, label=label)


def _reference_lines(axes: Axes, rows: Sequence[StudyRow], source: str) -> None:
    for field, marker in (("last", "D"), ("first", "s")) if rows else ():
        values = [row["reference"][field] for row in rows if row["reference"]]
        label = f"{source}, {field}"
        axes.plot(_clusters(rows), values, color=INK, marker=marker, markersize=4, linestyle=":", label=label)


def _other_lines(axes: Axes, rows: Sequence[StudyRow]) -> None:
    for index, name in enumerate(rows[0]["beside"] if rows else ()):
        means = [row["beside"][name]["mean"] for row in rows]
        style = ("--", "-.", (0, (1, 3)))[index % 3]
        axes.plot(_clusters(rows), means, color=MUTED, linewidth=1.1, linestyle=style, label=name)


def _clusters(rows: Sequence[StudyRow]) -> list[int]:
    return [row["clusters"] for row in rows]


def _table(part: str, rows: Sequence[StudyRow]) -> Table:
    others = list(dict.fromkeys(name for row in rows for name in row["beside"]))
    has_reference = any(row["reference"] for row in rows)
    has_error = any(row["lora_error"] is not None for row in rows)
    columns = [
        word("case"),
        Column("clusters"),
        Column("first round", "mean"),
        Column("sd"),
        Column("last round", "mean"),
    ]
    columns += [Column("sd"), Column("least"), Column("seeds")]
    columns += [Column("reference", "first"), Column("reference", "last")] if has_reference else []
    columns += [Column(name, "in one place") for name in others]
    columns += [Column("LoRA error", "of the mean")] if has_error else []
    columns += [Column("tunable"), Column("sent", "a run"), Column("of it D2D")]
    columns += [Column("compute", "GFLOP"), Column("energy", "modelled"), Column("time", "a run")]
    cells = tuple(_cells(row, others, has_reference, has_error) for row in rows)
    return Table(part.replace("_", " ").capitalize(), tuple(columns), cells)


def _cells(row: StudyRow, others: Sequence[str], has_reference: bool, has_error: bool) -> tuple[str, ...]:
    reference: Mapping[str, float] = row["reference"] or {}
    cells = [row["name"], str(row["clusters"]), format_share(row["first_mean"]), _points(row["first_sd"])]
    cells += [
        format_share(row["last_mean"]),
        _points(row["last_sd"]),
        format_share(min(row["last"])),
        str(row["seeds"]),
    ]
    cells += [format_share(reference.get(key)) for key in ("first", "last")] if has_reference else []
    cells += [format_share(row["beside"][name]["mean"]) if name in row["beside"] else DASH for name in others]
    cells += [format_share(row["lora_error"])] if has_error else []
    cells += [format_share(row["tunable_fraction"]), format_bytes(row["sent_bytes"]), format_bytes(row["d2d_bytes"])]
    cells += [f"{row['flops'] / 1e9:.1f}"]
    return (*cells, format_joules(row["energy_j"]), format_seconds(row["wall_s"]))


def _green_table(part: str, target: float, rows: Sequence[StudyRow]) -> Table:
    """What each row took to reach the target, the greenest first."""
    columns = (
        word("case"),
        Column("rounds"),
        Column("energy", "modelled"),
        Column("least"),
        Column("most"),
        Column("sent"),
        Column("time"),
    )
    cells = tuple(_green_cells(row) for row in sorted(rows, key=energy_to_target))
    return Table(
        f"{part.replace('_', ' ').capitalize()}: to {format_share(target)}, the greenest first", columns, cells
    )


def _green_cells(row: StudyRow) -> tuple[str, ...]:
    to_target = row["to_target"]
    if to_target is None:
        return (row["name"], "never", *[DASH] * 5)
    energy_j = [format_joules(to_target["energy_j"][key]) for key in ("mid", "low", "high")]
    took = format_bytes(to_target["sent_bytes"]), format_seconds(to_target["wall_s"])
    return (row["name"], str(to_target["rounds"]), *energy_j, *took)


def _points(deviation: float) -> str:
    return f"{deviation * 100:.1f}"


def _wins(rows: Sequence[StudyRow]) -> list[str]:
    """Where a classifier that sees everything in one place is better than the row beside it."""
    return [
        f"{name} ({format_share(other['mean'])}) beats {row['name']} ({format_share(row['last_mean'])})"
        for row in rows
        for name, other in row["beside"].items()
        if other["mean"] > row["last_mean"]
    ]
