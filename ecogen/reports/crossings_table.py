"""The table of where pictures become tokens."""

from __future__ import annotations

from ecogen.reports.crossings import Crossings, Placed
from ecogen.reports.tables import Column, Table, word
from ecogen.reports.wording import format_count


def crossings_table(found: Crossings | None) -> Table:
    """A row for each task and place of the modules; none where nothing was compared."""
    rows = tuple(_cells(one) for one in (found["placements"] if found else ()))
    parts = ("encode", "generate", "decode", "transfer", "link", "all")
    columns = (
        word("asked to"),
        word("modules at"),
        word("on the link"),
        *(Column(name, "B") for name in ("up", "down", "framing")),
        *(Column(name, "ms") for name in parts),
    )
    return Table("A request by where the modules are, medians", columns, rows)


def _cells(one: Placed) -> tuple[str, ...]:
    sizes = (one["sent_bytes"], one["received_bytes"], one["framing_bytes"])
    parts = (one["encode_s"], one["generate_s"], one["decode_s"], one["transfer_s"], one["link_s"], one["total_s"])
    names = (one["task"], one["modules"], one["crossing"])
    return (*names, *map(format_count, map(round, sizes)), *(f"{1e3 * part:.2f}" for part in parts))
