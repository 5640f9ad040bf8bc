"""Who is in the federation and doing what, read from its records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from ecogen.records import EventKind, EventRecord, PhaseRecord, Record, RoundRecord, ServedRecord

State = Literal["awaited", "preparing", "ready", "lost", "finished"]

_AFTER: dict[EventKind, State] = {
    "joined": "preparing",
    "rejoined": "preparing",
    "resumed": "ready",
    "lost": "lost",
    "finished": "finished",
}


class Presence(msgspec.Struct):
    """One node as the federation's records show it.

    Attributes:
        round_index: the last round that it took part in.
        time_s: when something was heard of it last; 0 for never.
    """

    node_id: str
    state: State = "awaited"
    round_index: int | None = None
    time_s: float = 0.0


def presences(records: Iterable[Record], node_ids: Sequence[str]) -> list[Presence]:
    """Every node in the order of `node_ids`, after all those records."""
    nodes = {node_id: Presence(node_id) for node_id in node_ids}
    for record in records:
        if isinstance(record, EventRecord):
            _happened(nodes, record)
        elif isinstance(record, (RoundRecord, ServedRecord)):
            for node_id in {record.node_id, *(usage.node_id for usage in record.usages)}:
                _heard(nodes, node_id, record.time_s, getattr(record, "round_index", None))
        elif isinstance(record, PhaseRecord):
            _heard(nodes, record.node_id, record.time_s)
    return list(nodes.values())


def _happened(nodes: dict[str, Presence], event: EventRecord) -> None:
    node = nodes.get(event.node_id)
    if node is not None and event.event in _AFTER:
        node.state = _AFTER[event.event]
        if event.event != "lost":
            node.time_s = max(node.time_s, event.time_s)


def _heard(nodes: dict[str, Presence], node_id: str, time_s: float, round_index: int | None = None) -> None:
    node = nodes.get(node_id)
    if node is None:
        return
    node.time_s = max(node.time_s, time_s)
    node.state = "ready" if node.state in ("awaited", "preparing") else node.state
    node.round_index = node.round_index if round_index is None else round_index
