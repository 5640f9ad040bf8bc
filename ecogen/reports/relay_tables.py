"""The tables of the knowledge relay: lessons, and what each cycle of them took."""

from __future__ import annotations

from collections.abc import Mapping

from ecogen.reports.relay import Lesson, Relay, Score
from ecogen.reports.tables import Column, Table, identifier, sentence, word
from ecogen.reports.wording import DASH, format_count, format_grams, format_number, format_share
from ecogen.units import format_bytes, format_joules


def lessons_table(relay: Relay | None) -> Table:
    """A row for each lesson; none without a relay."""
    up, down = (relay["up"], relay["down"]) if relay else ([], [])
    lessons = [*(("up", one) for one in up), *(("down", one) for one in down)]
    has_tunables = any(one["tunables_share"] is not None for one in up)
    rows = tuple(
        (
            str(one["cycle"] + 1),
            f"{direction}, {', '.join(one['teachers']) or 'nobody'} to {one['node_id']}",
            _outcome(one),
            f"{format_count(one['num_samples'])} of {format_count(one['num_drawn'])}",
            format_count(one["num_disputed"]),
            *((format_share(one["tunables_share"]),) if has_tunables else ()),
            _told(one["new"]),
            _told(one["known"]),
            _why(one),
        )
        for direction, one in sorted(lessons, key=lambda pair: (pair[1]["cycle"], pair[0] != "up"))
    )
    columns = (
        word("cycle"),
        identifier("lesson"),
        sentence("outcome"),
        Column("handed on", "of drawn"),
        Column("disputed", "of these"),
        *((Column("averaged", "share"),) if has_tunables else ()),
        sentence("what was taught", "perplexity"),
        sentence("what was known", "perplexity"),
        sentence("why"),
    )
    return Table("Lessons of the knowledge relay", columns, rows)


def cycles_table(relay: Relay | None) -> Table:
    """What each cycle took, against sending the data; no rows without a relay."""
    rows = tuple(
        (
            str(one["cycle"] + 1),
            format_bytes(one["sample_bytes"]),
            format_bytes(one["tunable_bytes"]),
            format_joules(one["energy_j"]),
            f"{format_grams(one['emissions_g'])} CO2e",
        )
        for one in ([] if relay is None else relay["cycles"])
    )
    sent = (Column("samples sent", "payload"), Column("tunables sent", "payload"))
    columns = (word("cycle"), *sent, Column("energy", "modelled"), Column("emissions", "modelled"))
    return Table("Cycles of the knowledge relay", columns, rows)


def versions_table(relay: Relay | None) -> Table:
    """What each version draws and says of each domain; no rows without a relay."""
    rows = tuple(
        (
            DASH if one["cycle"] is None else str(one["cycle"] + 1),
            f"{one['node_id']}, version {one['version']}",
            one["what"],
            one["domain"],
            DASH if one["recognised"] is None else format_share(one["recognised"]),
            DASH if one["frechet"] is None else format_number(one["frechet"]),
            format_share(one["caption_accuracy"]),
        )
        for one in (relay["versions"] if relay else [])
    )
    columns = (
        word("cycle"),
        identifier("model"),
        word("lesson"),
        identifier("domain"),
        Column("recognised"),
        Column("distance", "Fréchet"),
        Column("captions right"),
    )
    return Table("Versions of the models, cycle by cycle", columns, rows)


def _why(lesson: Lesson) -> str:
    """Such as "drift after round 3, p = 1.5e-11"."""
    after = "" if lesson["round_index"] is None else f" after round {lesson['round_index'] + 1}"
    found = "" if lesson["p_value"] is None else f", p = {lesson['p_value']:.2g}"
    return f"{lesson['cause']}{after}{found}"


def _outcome(one: Lesson) -> str:
    if not one["accepted"]:
        return f"refused: {one['reason']}"
    part = "" if one["share"] == 1 else f" to {100 * one['share']:.0f} %"
    return f"accepted{part}, version {one['version']}"


def _told(scores: Mapping[str, Score]) -> str:
    parts = (f"{name} {format_number(one['before'])} → {format_number(one['after'])}" for name, one in scores.items())
    return "; ".join(parts)
