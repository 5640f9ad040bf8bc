"""What one request takes, added up step by step: seconds of computing by visit, bytes by hop, and the bill of both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ecogen.accounting.bill import Bill
from ecogen.accounting.constants import Constants
from ecogen.accounting.energy import bill
from ecogen.placement import Placement
from ecogen.records import Usage
from ecogen.serving.generation import Finish
from ecogen.serving.steps import Visited
from ecogen.topology import Topology

_TOKEN_BYTES = 4


@dataclass(slots=True)
class _Visit:
    """All steps' visits of one kind; where another chain took over, with its devices."""

    node_id: str
    segment: str
    receiver_id: str
    compute_s: float = 0.0
    sent_bytes: float = 0.0


@dataclass
class Tally:
    """One request's, from its arrival at the edge on.

    Attributes:
        goes_on: another edge has begun it.
        is_probe: as the request's.
    """

    edge_id: str
    cluster_id: str
    num_prompt: int
    goes_on: bool = False
    is_probe: bool = False
    began_s: float = field(default_factory=time.perf_counter)
    num_reused: int = 0
    num_tokens: int = 0
    _visits: dict[tuple[str, str, str], _Visit] = field(default_factory=dict)

    @property
    def has_run(self) -> bool:
        """Whether a stage computed anything for it, or it was given something that was computed before."""
        return bool(self._visits or self.num_tokens)

    def count_step(
        self, placement: Placement, visits: Sequence[Visited], received: Sequence[int], share: float
    ) -> None:
        """Add this request's share of a step.

        Args:
            visits: of the step, in order; fewer than the placement's where one failed.
            received: bytes that brought each visit's result on.
        """
        receivers = [*(visit.node_id for visit in placement.visits[1:]), self.edge_id]
        for visit, receiver_id, visited, num_bytes in zip(placement, receivers, visits, received, strict=False):
            key = (visit.node_id, str(visit.segment), receiver_id)
            own = self._visits.setdefault(key, _Visit(*key))
            own.compute_s += share * visited.compute_s
            own.sent_bytes += share * num_bytes

    def finish(self, topology: Topology, constants: Constants) -> Finish:
        """How it came about, now that the last token is here.

        Computing is measured; what crosses links is counted, and its time to and from the chain modelled: RTT/2 and
        bytes by bandwidth. Idle time of devices is nobody's request's: the ledger has it.
        """
        bills = [self._bill(visit, topology, constants) for visit in self._visits.values()]
        node_ids = tuple(dict.fromkeys(visit.node_id for visit in self._visits.values()))
        ends = (node_ids[0], node_ids[-1]) if node_ids else (self.edge_id, self.edge_id)
        return Finish(
            bill=sum(bills, Bill.zero()),
            t_ul_s=_link_s(topology, self.edge_id, ends[0], self.num_prompt * _TOKEN_BYTES),
            t_inference_s=time.perf_counter() - self.began_s,
            t_dl_s=_link_s(topology, ends[1], self.edge_id, _TOKEN_BYTES),
            node_ids=node_ids,
            num_reused=self.num_reused,
        )

    def _bill(self, visit: _Visit, topology: Topology, constants: Constants) -> Bill:
        node = topology.nodes[visit.node_id]
        link = topology.link(visit.node_id, visit.receiver_id)
        sent = [(None if link is None else link.link_class, round(visit.sent_bytes))]
        usage = Usage(visit.node_id, "serving", visit.compute_s, visit.compute_s)
        return bill(usage, sent, node, topology.sites[node.site_id], constants)


def _link_s(topology: Topology, sender_id: str, receiver_id: str, num_bytes: int) -> float:
    link = topology.link(sender_id, receiver_id)
    return 0.0 if link is None else link.seconds(num_bytes)
