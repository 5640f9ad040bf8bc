"""Which node holds which segment of the model, and in which order a microbatch visits them: plain values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ecogen.errors import PlacementError

Labels = Literal["start", "end"]
"""Where the head and the labels are: beside the data (U-shape) or on the last device, as the paper draws it."""


@dataclass(frozen=True, slots=True, order=True)
class Segment:
    """Blocks [start, stop) of a model, with or without what comes before and after them."""

    start: int
    stop: int
    has_embedding: bool = False
    has_head: bool = False

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def blocks(self) -> range:
        return range(self.start, self.stop)

    def __str__(self) -> str:
        parts = ["embedding"] * self.has_embedding
        parts += [f"blocks {self.start}..{self.stop}"] * bool(len(self))
        parts += ["head"] * self.has_head
        return " + ".join(parts) or "nothing"


@dataclass(frozen=True, slots=True)
class Visit:
    """One stop of a microbatch on its way through a cluster."""

    node_id: str
    segment: Segment


@dataclass(frozen=True, slots=True)
class Placement:
    """The ordered route of a microbatch through one cluster; a node may be visited twice.

    Together the visits hold the embedding once, every block once and in order, and the head once.
    """

    visits: tuple[Visit, ...]

    def __post_init__(self) -> None:
        segments = [visit.segment for visit in self.visits]
        if not segments or not segments[0].has_embedding or not segments[-1].has_head:
            raise PlacementError("a placement starts with the embedding and ends with the head")
        if sum(s.has_embedding for s in segments) > 1 or sum(s.has_head for s in segments) > 1:
            raise PlacementError("a placement has one embedding and one head")
        for before, after in pairwise(segments):
            if before.stop != after.start:
                raise PlacementError(f"blocks {before.stop}..{after.start} are missing or held twice between visits")

    def __iter__(self) -> Iterator[Visit]:
        return iter(self.visits)

    def __len__(self) -> int:
        return len(self.visits)

    @property
    def num_blocks(self) -> int:
        return self.visits[-1].segment.stop

    @property
    def start_id(self) -> str:
        """The node that holds the embedding, and so reads the data."""
        return self.visits[0].node_id

    @property
    def node_ids(self) -> list[str]:
        """The nodes in order of their first visit."""
        return list(dict.fromkeys(visit.node_id for visit in self.visits))

    @property
    def in_flight(self) -> int:
        """How many microbatches are under way at once, at most."""
        return most_in_flight(len(self.node_ids), returns=self.returns)

    @property
    def returns(self) -> bool:
        """Whether the route ends where it starts, at a head that is alone."""
        return len(self.visits) > 1 and not len(self.visits[-1].segment)

    def segments_of(self, node_id: str) -> list[Segment]:
        """What one node holds, in the order of its visits."""
        return [visit.segment for visit in self.visits if visit.node_id == node_id]


def most_in_flight(num_devices: int, *, returns: bool) -> int:
    """How many microbatches should be under way for no device to wait: one a device, as in 1F1B, or 2 S + 1.

    Where the route returns to its start for the head, a microbatch comes by there once more before any of it goes
    back, so with S under way the last device waits while the start is at another: 0.75 of the pipeline's bound with two
    devices and eight microbatches, 0.99 with five under way (a simulation with stages of equal time).
    """
    return 2 * num_devices + 1 if returns else num_devices


def start_from(placement: Placement, owner_id: str) -> Placement:
    """The route of the same cluster with another of its devices as the start.

    The owner has what the start device has before the first cut (and, in the U-shape, the head) besides its own
    blocks; the others keep theirs.
    """
    start, head = placement.visits[0], placement.visits[-1]
    visits = [Visit(owner_id, start.segment), *placement.visits[1:]]
    if head.node_id == start.node_id and len(visits) > 1:
        visits[-1] = Visit(owner_id, head.segment)
    return Placement(tuple(visits))


def rotations(placement: Placement, num_owners: int) -> list[Placement]:
    """One route for each of the first `num_owners` devices of a cluster, which own data and take turns as the start."""
    return [start_from(placement, node_id) for node_id in placement.node_ids[:num_owners]]


def segments_held(placement: Placement, num_owners: int, node_id: str) -> list[Segment]:
    """What a node holds over all turns, each segment once."""
    routes = rotations(placement, num_owners)
    return list(dict.fromkeys(segment for route in routes for segment in route.segments_of(node_id)))


def neighbours_of(placement: Placement, num_owners: int, node_id: str) -> list[str]:
    """Whom a node exchanges messages with: those before and after it on a route, and each route's start device."""
    pairs: set[frozenset[str]] = set()
    starts = [route.start_id for route in rotations(placement, num_owners)]
    for route in rotations(placement, num_owners):
        nodes = [visit.node_id for visit in route]
        pairs |= {frozenset(pair) for pair in pairwise(nodes)}
        pairs |= {frozenset((start, other)) for start in starts for other in nodes}
    return sorted(other for pair in pairs if node_id in pair for other in pair if other != node_id)


def place(node_ids: Sequence[str], cuts: Sequence[int], num_blocks: int, labels: Labels = "start") -> Placement:
    """The placement of a model on the nodes of a cluster, cut at `cuts`.

    Args:
        node_ids: the devices in order; the first is the start.
        cuts: one block index between each two neighbours, rising, each segment with at least one block.
        num_blocks: transformer blocks of the model.
        labels: `"start"` returns to the first device for the head (U-shape); `"end"` leaves it on the last.

    Raises:
        PlacementError: if the cuts do not fit the nodes and blocks.
    """
    bounds = [0, *cuts, num_blocks]
    if len(bounds) != len(node_ids) + 1 or any(a >= b for a, b in pairwise(bounds)):
        raise PlacementError(
            f"cuts {list(cuts)} do not divide {num_blocks} blocks into {len(node_ids)} segments of at least one block; "
            f"give {len(node_ids) - 1} rising cuts between 1 and {num_blocks - 1}"
        )
    alone_or_end = labels == "end" or len(node_ids) == 1
    visits = [
        Visit(node, Segment(start, stop, start == 0, alone_or_end and stop == num_blocks))
        for node, (start, stop) in zip(node_ids, pairwise(bounds), strict=True)
    ]
    if not alone_or_end:
        visits.append(Visit(node_ids[0], Segment(num_blocks, num_blocks, has_head=True)))
    return Placement(tuple(visits))
