"""The knowledge relay in figures: each lesson, what it changed and cost, and what sending the data would have been."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

from ecogen.accounting.ledger import Bill, settle
from ecogen.measurements import VersionQuality
from ecogen.records import Record, RelayRecord, Taught
from ecogen.topology import Topology


class Score(TypedDict):
    """Perplexity on held-out pairs before and after a lesson."""

    before: float
    after: float


class Lesson(TypedDict):
    """One lesson; `new` and `known` are by what the pairs are of.

    `round` is the one after which it was, from 1; None of runs that did not write it down. `cause` is schedule or
    drift, and `p_value` that of an edge's drift. `share` is how far the receiver went towards what it had learnt, 0
    where it refused it; `tunables_share` how far from its own tunables to the mean of the edges' the cloud began to
    learn, None where none were sent. Of the samples that were handed on, those that are disputed were held for wrong by
    others who know their captions, and not learnt from.
    """

    cycle: int
    round_index: int | None
    cause: str
    p_value: float | None
    node_id: str
    teachers: list[str]
    accepted: bool
    reason: str
    version: int
    num_drawn: int
    num_samples: int
    tunables_share: float | None
    num_disputed: int
    share: float
    new: dict[str, Score]
    known: dict[str, Score]
    wall_s: float


class Cycle(TypedDict):
    """What one exchange of all lessons took: bytes of samples and of edges' tunables, as tensors; the rest modelled."""

    cycle: int
    sample_bytes: int
    tunable_bytes: int
    energy_j: float
    emissions_g: float


class VersionScore(TypedDict):
    """What a version of a node's model draws and says of an edge's domain; `cycle` is null for the delivered one."""

    cycle: int | None
    node_id: str
    version: int
    what: str
    domain: str
    recognised: float | None
    frechet: float | None
    caption_accuracy: float


class Relay(TypedDict):
    """All lessons in order, what they led to, the bill of each cycle, and bytes of the pairs that did not travel."""

    up: list[Lesson]
    down: list[Lesson]
    cycles: list[Cycle]
    versions: list[VersionScore]
    data_bytes: int


def relay_of(
    records: Sequence[Record], topology: Topology, data_bytes: int, by_version: Sequence[VersionQuality] = ()
) -> Relay | None:
    """The relay of a run; None without one.

    Args:
        data_bytes: of the pairs that the edges' devices tuned on.
    """
    told = sorted(
        (record for record in records if isinstance(record, RelayRecord)), key=lambda one: (one.cycle, one.node_id)
    )
    if not told:
        return None
    return {
        "up": [_lesson(one) for one in told if one.direction == "up"],
        "down": [_lesson(one) for one in told if one.direction == "down"],
        "cycles": [
            _cycle(cycle, [one for one in told if one.cycle == cycle], topology)
            for cycle in sorted({one.cycle for one in told})
        ],
        "versions": sorted(map(_version, by_version), key=_in_order),
        "data_bytes": data_bytes,
    }


def _lesson(record: RelayRecord) -> Lesson:
    return {
        "cycle": record.cycle,
        "round_index": record.round_index,
        "cause": record.cause,
        "p_value": record.p_value,
        "node_id": record.node_id,
        "teachers": [*record.teachers],
        "accepted": record.accepted,
        "reason": record.reason,
        "version": record.version,
        "num_drawn": record.num_drawn,
        "num_samples": record.num_samples,
        "tunables_share": record.tunables_share if record.tunable_bytes else None,
        "num_disputed": record.num_disputed,
        "share": record.share if record.accepted else 0.0,
        "new": _scores(score for score in record.scores if score.is_new),
        "known": _scores(score for score in record.scores if not score.is_new),
        "wall_s": record.wall_s,
    }


def _version(found: VersionQuality) -> VersionScore:
    return {
        "cycle": found.cycle,
        "node_id": found.node_id,
        "version": found.version,
        "what": found.what,
        "domain": found.domain,
        "recognised": found.quality.recognised,
        "frechet": found.quality.frechet,
        "caption_accuracy": found.quality.caption_accuracy,
    }


def _in_order(one: VersionScore) -> tuple[int, str, int, str]:
    return (-1 if one["cycle"] is None else one["cycle"], one["node_id"], one["version"], one["domain"])


def _scores(scores: Iterable[Taught]) -> dict[str, Score]:
    return {score.name: {"before": score.before, "after": score.after} for score in scores}


def _cycle(cycle: int, records: Sequence[RelayRecord], topology: Topology) -> Cycle:
    ledger = settle(records, topology)
    total = ledger.by_phase().get("relay", Bill.zero())
    return {
        "cycle": cycle,
        "sample_bytes": sum(one.sample_bytes for one in records),
        "tunable_bytes": sum(one.tunable_bytes for one in records),
        "energy_j": total.energy_j.mid,
        "emissions_g": total.emissions_g.mid,
    }
