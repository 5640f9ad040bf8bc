"""The ledger: records in, one entry a usage, and totals that agree however they are grouped.

Nothing here is measured: seconds, FLOPs and bytes come from the records, joules and grams are modelled from them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from ecogen.accounting.bill import Bill, Bounds
from ecogen.accounting.constants import Constants
from ecogen.accounting.energy import bill
from ecogen.errors import RunError
from ecogen.records import KINDS, LINK_CLASSES, EventRecord, Kind, LinkClass, Phase, Record, RoundRecord, Traffic, Usage
from ecogen.topology import Tier, Topology

__all__ = ["Bill", "Bounds", "Constants", "Entry", "Ledger", "LinkTraffic", "settle"]

_Key = TypeVar("_Key")


@dataclass(frozen=True, slots=True)
class LinkTraffic:
    """What went over one class of links, of one kind.

    Attributes:
        link_class: None where no link of the topology was used: to an operator, or within a node.
    """

    link_class: LinkClass | None
    kind: Kind
    messages: int
    payload_bytes: int
    header_bytes: int
    framing_bytes: int

    @property
    def sent_bytes(self) -> int:
        """Payload and header, without the modelled framing."""
        return self.payload_bytes + self.header_bytes

    def __add__(self, other: LinkTraffic) -> LinkTraffic:
        """Both together; they have the same link class and kind."""
        return LinkTraffic(
            self.link_class,
            self.kind,
            self.messages + other.messages,
            self.payload_bytes + other.payload_bytes,
            self.header_bytes + other.header_bytes,
            self.framing_bytes + other.framing_bytes,
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """One usage with its place, its time and its bill."""

    node_id: str
    site_id: str
    tier: Tier
    phase: Phase
    round_index: int | None
    wall_s: float
    cpu_s: float
    flops: float
    traffic: tuple[LinkTraffic, ...]
    bill: Bill
    method: str

    @property
    def sent_bytes(self) -> int:
        return sum(line.sent_bytes for line in self.traffic)


@dataclass(frozen=True, slots=True)
class Ledger:
    """All entries of a run.

    Attributes:
        method: what was measured and what modelled, for the head of a report.
    """

    entries: tuple[Entry, ...]
    method: str

    @property
    def total(self) -> Bill:
        return sum((entry.bill for entry in self.entries), Bill.zero())

    def by_node(self) -> dict[str, Bill]:
        return _bills(self.entries, lambda entry: entry.node_id)

    def by_site(self) -> dict[str, Bill]:
        return _bills(self.entries, lambda entry: entry.site_id)

    def by_tier(self) -> dict[Tier, Bill]:
        return _bills(self.entries, lambda entry: entry.tier)

    def by_phase(self) -> dict[Phase, Bill]:
        return _bills(self.entries, lambda entry: entry.phase)

    def by_round(self) -> dict[int, Bill]:
        """Bills of the rounds; what was outside of them is in `outside_rounds`."""
        rounds = [(entry.round_index, entry.bill) for entry in self.entries if entry.round_index is not None]
        bills: dict[int, Bill] = defaultdict(Bill.zero)
        for index, amount in sorted(rounds, key=lambda pair: pair[0]):
            bills[index] += amount
        return dict(bills)

    def sent_by_round(self) -> dict[int, int]:
        """Payload and header bytes of the rounds."""
        sent: dict[int, int] = defaultdict(int)
        for entry in self.entries:
            if entry.round_index is not None:
                sent[entry.round_index] += entry.sent_bytes
        return dict(sent)

    @property
    def outside_rounds(self) -> Bill:
        """Pre-training, delivery, evaluation and serving."""
        return sum((entry.bill for entry in self.entries if entry.round_index is None), Bill.zero())

    def traffic(self) -> list[LinkTraffic]:
        """One line a link class and kind, the lines without a link last."""
        lines: dict[tuple[LinkClass | None, Kind], LinkTraffic] = {}
        for line in self._lines():
            key = (line.link_class, line.kind)
            lines[key] = lines[key] + line if key in lines else line
        return sorted(lines.values(), key=_order)

    def traffic_by_kind(self) -> dict[Kind, int]:
        """Payload and header bytes of every kind, over all links and none."""
        return {kind: sum(line.sent_bytes for line in self._lines() if line.kind == kind) for kind in KINDS}

    def traffic_by_link(self) -> dict[LinkClass, int]:
        """Payload and header bytes of every link class; what used no link is in `unlinked_bytes`."""
        return {link: self._bytes_over(link) for link in LINK_CLASSES}

    @property
    def unlinked_bytes(self) -> int:
        """Payload and header bytes over no link of the topology: to an operator. They cost no energy here."""
        return self._bytes_over(None)

    @property
    def framing_bytes(self) -> int:
        """What gRPC, HTTP/2 and TLS add, modelled; in no other byte total, but in the energy."""
        return sum(line.framing_bytes for line in self._lines())

    def _lines(self) -> Iterable[LinkTraffic]:
        return (line for entry in self.entries for line in entry.traffic)

    def _bytes_over(self, link: LinkClass | None) -> int:
        return sum(line.sent_bytes for line in self._lines() if line.link_class == link)


def settle(records: Iterable[Record], topology: Topology, constants: Constants | None = None) -> Ledger:
    """The ledger of a run: every usage in its records, billed once.

    Args:
        constants: None for the defaults, whose sources `accounting.constants` names.

    Raises:
        RunError: if a usage is of a node that the topology does not have.
        ConfigError: if a site's zone has no carbon intensity.
    """
    chosen = Constants() if constants is None else constants
    usages = [(usage, index) for record in records for usage, index in _usages(record)]
    entries = tuple(_entry(usage, index, topology, chosen) for usage, index in usages)
    return Ledger(entries, _method([usage for usage, _ in usages]))


def _usages(record: Record) -> list[tuple[Usage, int | None]]:
    if isinstance(record, EventRecord):
        return []
    round_index = record.round_index if isinstance(record, RoundRecord) else None
    return [(usage, round_index) for usage in record.usages]


def _entry(usage: Usage, round_index: int | None, topology: Topology, constants: Constants) -> Entry:
    node = topology.nodes.get(usage.node_id)
    if node is None:
        raise RunError(f"a record bills node {usage.node_id!r}, which is not in the topology; use the run's own recipe")
    traffic = tuple(_resolve(usage.node_id, line, topology) for line in usage.traffic)
    sent = [(line.link_class, line.sent_bytes + line.framing_bytes) for line in traffic]
    return Entry(
        node_id=node.node_id,
        site_id=node.site_id,
        tier=node.tier,
        phase=usage.phase,
        round_index=round_index,
        wall_s=usage.wall_s,
        cpu_s=usage.cpu_s,
        flops=usage.flops,
        traffic=traffic,
        bill=bill(usage, sent, node, topology.sites[node.site_id], constants),
        method=f"modelled: {usage.method} CPU time x watts",
    )


def _resolve(sender_id: str, line: Traffic, topology: Topology) -> LinkTraffic:
    link = topology.link(sender_id, line.receiver_id)
    link_class = None if link is None else link.link_class
    return LinkTraffic(link_class, line.kind, line.messages, line.payload_bytes, line.header_bytes, line.framing_bytes)


def _method(usages: Iterable[Usage]) -> str:
    sources = " and ".join(sorted({usage.method for usage in usages})) or "no"
    return (
        f"{sources} CPU time; bytes counted as the codec wrote them, framing modelled; every joule modelled: CPU time "
        "x device watts, idle time x idle watts, memory x W/GB, bytes x average J/GB (low end: marginal); emissions "
        "modelled: annual average grid intensity of the node's zone; embodied share assumed"
    )


def _bills(entries: Iterable[Entry], key: Callable[[Entry], _Key]) -> dict[_Key, Bill]:
    bills: dict[_Key, Bill] = defaultdict(Bill.zero)
    for entry in entries:
        bills[key(entry)] += entry.bill
    return dict(bills)


def _order(line: LinkTraffic) -> tuple[int, int]:
    link = len(LINK_CLASSES) if line.link_class is None else LINK_CLASSES.index(line.link_class)
    return link, KINDS.index(line.kind)
