"""The way of a microbatch through a cluster, with what tuning must know of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ecogen.placement import Placement, Segment
from ecogen.planning.cost import ModelShape


@dataclass(frozen=True)
class Route:
    """A placement, and what tuning must know of it.

    Attributes:
        goes_down: whether gradients go down to the start, needed or not, as in plain split learning.
    """

    placement: Placement
    shape: ModelShape
    goes_down: bool = False

    @property
    def last(self) -> int:
        """The index of the visit with the head."""
        return len(self.placement) - 1

    @property
    def lowest(self) -> int:
        """The first visit that holds a tunable; no gradient flows below it."""
        if self.goes_down:
            return 0
        block = self.shape.lowest_tunable_block
        return next((i for i, visit in enumerate(self.placement) if visit.segment.stop > block), self.last)

    def segment(self, visit: int) -> Segment:
        return self.placement.visits[visit].segment

    @property
    def lowest_in_two(self) -> tuple[Segment, Segment]:
        """The lowest visit's segment: its frozen blocks, and the others from the lowest tunable one up."""
        whole, block = self.segment(self.lowest), 0 if self.goes_down else self.shape.lowest_tunable_block
        cut = min(max(block, whole.start), whole.stop)
        has_embedding = whole.has_embedding and block > 0
        frozen = Segment(whole.start, cut, has_embedding)
        return frozen, replace(whole, start=cut, has_embedding=whole.has_embedding and not has_embedding)

    def node_id(self, visit: int) -> str:
        return self.placement.visits[visit].node_id


def moved(before: Route, after: Route) -> list[Segment]:
    """The segments that are at another node when another owner is the start."""
    visits = zip(before.placement, after.placement, strict=True)
    return [one.segment for one, other in visits if one.node_id != other.node_id]
