"""What a federation has served, and what all of its nodes took meanwhile: in total, and by tier, site and node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec
from msgspec.structs import asdict

from ecogen.accounting.bill import Bill, Bounds
from ecogen.accounting.ledger import Entry, settle
from ecogen.records import Record, ServedCounts, ServedRecord
from ecogen.topology import Topology


class Cost(msgspec.Struct, frozen=True):
    """What some nodes took, delivery of the model and idle time included.

    Attributes:
        cpu_s: CPU time, measured.
        sent_bytes: payload and headers, as the codec wrote them.
        energy_j, emissions_g: modelled, as low, mid and high.
    """

    cpu_s: float
    sent_bytes: int
    energy_j: tuple[float, float, float]
    emissions_g: tuple[float, float, float]


class ServedSummary(ServedCounts, frozen=True, kw_only=True):
    """All that the books hold.

    Attributes:
        share_j: for computing and sending what ended requests asked for; `total` has idle time too.
        wall_s: of the edge whose books go on for longest.
    """

    wall_s: float
    total: Cost
    by_tier: dict[str, Cost]
    by_site: dict[str, Cost]
    by_node: dict[str, Cost]


def summarise_served(records: Sequence[Record], topology: Topology) -> ServedSummary:
    """The totals of a federation's records.

    Raises:
        RunError: if they are of another topology.
    """
    order = list(topology.nodes)
    entries = sorted(settle(records, topology).entries, key=lambda entry: order.index(entry.node_id))
    served = [record for record in records if isinstance(record, ServedRecord)]
    walls_s = [sum(r.wall_s for r in served if r.node_id == edge_id) for edge_id in topology.edge_ids]
    return ServedSummary(
        **asdict(sum(served, ServedCounts.zero())),
        wall_s=max(walls_s),
        total=_cost(entries),
        by_tier=_costs(entries, lambda entry: entry.tier.value),
        by_site=_costs(entries, lambda entry: entry.site_id),
        by_node=_costs(entries, lambda entry: entry.node_id),
    )


def _costs(entries: Sequence[Entry], key: Callable[[Entry], str]) -> dict[str, Cost]:
    names = dict.fromkeys(map(key, entries))
    return {name: _cost(entry for entry in entries if key(entry) == name) for name in names}


def _cost(entries: Iterable[Entry]) -> Cost:
    own = list(entries)
    bill = sum((entry.bill for entry in own), Bill.zero())
    seconds, sent_bytes = sum(entry.cpu_s for entry in own), sum(entry.sent_bytes for entry in own)
    return Cost(seconds, sent_bytes, _figures(bill.energy_j), _figures(bill.emissions_g))


def _figures(bounds: Bounds) -> tuple[float, float, float]:
    return bounds.low, bounds.mid, bounds.high
