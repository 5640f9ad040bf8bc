"""Where pictures become tokens, in figures: what crosses the link to a generator, and how long each part takes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TypedDict

from ecogen.records import CrossingRecord, Record


class Placed(TypedDict):
    """Medians over pictures drawn or described with the modules in one place.

    Bytes are of whole messages, and `framing_bytes` modelled. Seconds are measured but for `link_s`; `total_s` is that
    of the computation and the modelled link, `measured_s` of the computation and the run's own network.
    """

    task: str
    modules: str
    crossing: str
    num_requests: int
    sent_bytes: float
    received_bytes: float
    framing_bytes: float
    encode_s: float
    generate_s: float
    decode_s: float
    transfer_s: float
    link_s: float
    total_s: float
    measured_s: float


class Crossings(TypedDict):
    """Both placements of the modules.

    Attributes:
        num_compared: pictures and captions that were asked for both ways.
        num_same: those of them that came out the same, bit for bit.
        modules_bytes: of the modules' files, fetched once.
    """

    placements: list[Placed]
    num_compared: int
    num_same: int
    modules_bytes: int


def crossings_of(records: Sequence[Record]) -> Crossings | None:
    """Of a run whose edges asked the cloud for pictures; None of others. What was asked for again counts once."""
    told = {_key(one): one for one in records if isinstance(one, CrossingRecord)}
    if not told:
        return None
    kinds = sorted(
        {(one.task, one.crossing) for one in told.values()}, key=lambda kind: (kind[0] != "draw", kind[1] != "tokens")
    )
    answers: dict[tuple[str, str], list[str]] = {}
    for (request_id, task, _), one in told.items():
        answers.setdefault((request_id, task), []).append(one.answer)
    compared = [pair for pair in answers.values() if len(pair) > 1]
    return {
        "placements": [_placed([one for one in told.values() if (one.task, one.crossing) == kind]) for kind in kinds],
        "num_compared": len(compared),
        "num_same": sum(len(set(pair)) == 1 for pair in compared),
        "modules_bytes": max(one.modules_bytes for one in told.values()),
    }


def _key(record: CrossingRecord) -> tuple[str, str, str]:
    return record.request_id, record.task, record.crossing


def _placed(records: Sequence[CrossingRecord]) -> Placed:
    first = records[0]
    computed = [one.encode_s + one.generate_s + one.decode_s for one in records]
    return {
        "task": first.task,
        "modules": "edge" if first.crossing == "tokens" else "cloud",
        "crossing": first.crossing,
        "num_requests": len(records),
        "sent_bytes": median(one.sent_bytes for one in records),
        "received_bytes": median(one.received_bytes for one in records),
        "framing_bytes": median(one.framing_bytes for one in records),
        "encode_s": median(one.encode_s for one in records),
        "generate_s": median(one.generate_s for one in records),
        "decode_s": median(one.decode_s for one in records),
        "transfer_s": median(one.transfer_s for one in records),
        "link_s": median(one.link_s for one in records),
        "total_s": median(own + one.link_s for own, one in zip(computed, records, strict=True)),
        "measured_s": median(own + one.transfer_s for own, one in zip(computed, records, strict=True)),
    }
