"""Records travel as JSON lines and come back as they were."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecogen.errors import RunError
from ecogen.records import (
    EventRecord,
    Hop,
    PhaseRecord,
    Record,
    RequestRecord,
    RoundRecord,
    ServedCounts,
    ServedRecord,
    Traffic,
    Usage,
    from_line,
    read_records,
    to_line,
)

USAGE = Usage("edge-0", "tuning", 1.5, 0.5, 1e9, 10, (Traffic("cloud", "tunables", 2, 100, 20, 3),))
RECORDS: list[Record] = [
    RoundRecord("edge-0", 3, 0.9, None, 40, ("a", "b"), (), 2.0, (USAGE,), 1.0),
    PhaseRecord("cloud", "pretraining", 9.0, (USAGE,), "from a folder"),
    RequestRecord("r-1", "a", 1, 0.1, 0.2, 0.3, (Hop("d0", "blocks 0..1", 0.1, "d1", 10, 0.01),)),
    EventRecord("lost", "d0", 2, 'silent for "8 s"\nover', 4.0),
    ServedRecord(2, 30, 10, 40, 0.5, 6.0, node_id="edge-0", wall_s=300.0, usages=(USAGE,), time_s=1.0),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    line = to_line(record)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert from_line(line) == record


@given(st.lists(st.sampled_from(RECORDS)), st.data())
def test_of_a_log_that_was_cut_anywhere_the_whole_lines_are_read(records: list[Record], data: st.DataObject) -> None:
    content = b"".join(map(to_line, records))
    cut = data.draw(st.integers(0, len(content)))
    read = read_records(content[:cut].splitlines(keepends=True), "log")
    assert read == records[: len(read)]
    assert len(read) >= content[:cut].count(b"\n")


@pytest.mark.parametrize("bad", [b"nonsense\n", b'{"type":"round"}\n', b'{"type":"dance"}\n', b"\n"])
def test_a_bad_line_in_the_middle_is_an_error_that_names_it(bad: bytes) -> None:
    with pytest.raises(RunError, match=r"run/records\.jsonl:2: not a record"):
        read_records([to_line(RECORDS[0]), bad, to_line(RECORDS[1])], "run/records.jsonl")


def test_fields_of_a_newer_version_are_ignored() -> None:
    line = to_line(RECORDS[3]).replace(b'{"type"', b'{"mood":"fine","type"')
    assert from_line(line) == RECORDS[3]


def test_totals_hold_every_part() -> None:
    assert Traffic("cloud", "tunables", 2, 100, 20, 3).total_bytes == 123
    request = RECORDS[2]
    assert isinstance(request, RequestRecord)
    assert request.latency_s == pytest.approx(0.6)


def test_what_was_served_adds_up_and_stands_beside_the_records_own_fields() -> None:
    record = RECORDS[4]
    assert isinstance(record, ServedRecord)
    assert sum([record, record], ServedCounts.zero()) == ServedCounts(4, 60, 20, 80, 1.0, 12.0)
    assert msgspec.json.decode(to_line(record)).keys() == {"type", *record.__struct_fields__}
