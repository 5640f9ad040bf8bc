"""The knowledge relay in the summary and in the report's tables."""

from __future__ import annotations

from ecogen.config import build_topology, load
from ecogen.records import RelayRecord, Taught
from ecogen.reports.relay import relay_of
from ecogen.reports.relay_tables import lessons_table


def lesson(node_id: str, num_disputed: int) -> RelayRecord:
    up = node_id == "cloud"
    return RelayRecord(
        node_id,
        0,
        "up" if up else "down",
        ("edge-0", "edge-1") if up else ("cloud",),
        accepted=True,
        version=1,
        num_drawn=1800,
        num_samples=1200,
        sample_bytes=9000,
        scores=(Taught("edge-0", 9.0, 8.0, is_new=True),),
        wall_s=1.0,
        usages=(),
        num_disputed=num_disputed,
    )


def test_what_was_disputed_is_told() -> None:
    relay = relay_of([lesson("cloud", 34), lesson("edge-0", 5)], build_topology(load("pairs").topology), 0)
    assert relay is not None
    assert [one["num_disputed"] for one in [*relay["up"], *relay["down"]]] == [34, 5]
    table = lessons_table(relay)
    place = [column.name for column in table.columns].index("disputed")
    assert [row[place] for row in table.rows] == ["34", "5"]
    assert (table.columns[place - 1].name, table.columns[place].unit) == ("handed on", "of these")
