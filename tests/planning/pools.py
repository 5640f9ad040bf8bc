"""Random pools of unlike devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st

from ecogen.config import TunedBlock
from ecogen.placement import Segment
from ecogen.planning import cost
from ecogen.planning.cost import ModelShape
from ecogen.planning.pool import Pool, Work
from ecogen.topology import Device, Link, Node, Tier

SHAPE = ModelShape(6, 64, 128, 17, 49, 10, tuned=(TunedBlock(8, 4, ("q_proj", "v_proj")),) * 6)
LINK = Link("d2d", rtt_s=0.004, bytes_per_s=1e7)
BLOCK = cost.memory_bytes(SHAPE, [Segment(1, 2)], 1)


def node(index: int, blocks: float, flops_per_s: float = 1e9, access: Link | None = None) -> Node:
    """A device with memory for about so many blocks."""
    device = Device(int(blocks * BLOCK), flops_per_s, 0.7, 2.3)
    return Node(f"edge-0.device-{index}", Tier.END, "edge-0.field", device, access)


def pool_of(*nodes: Node, work: Work | None = None) -> Pool:
    return Pool(work or Work(SHAPE, LINK), nodes)


ACCESS = st.one_of(
    st.none(),
    st.builds(Link, st.just("d2d"), st.floats(0, 0.02), st.floats(3e5, 1e8)),
)
HARDWARE = st.tuples(st.floats(0.5, 20), st.floats(1e8, 3e9), ACCESS)
WORKS = st.builds(
    Work,
    st.integers(0, 6).map(lambda first: replace(SHAPE, tuned=(TunedBlock(),) * first + SHAPE.tuned[first:])),
    st.just(LINK),
    st.sampled_from(["start", "end"]),
    st.integers(1, 3),
    st.integers(1, 8),
    st.integers(1, 3),
)


def pools(min_size: int, max_size: int) -> st.SearchStrategy[Pool]:
    """Pools of so many devices, for one of several kinds of work."""
    return st.builds(_pool, WORKS, st.lists(HARDWARE, min_size=min_size, max_size=max_size))


def _pool(work: Work, hardware: Sequence[tuple[float, float, Link | None]]) -> Pool:
    return Pool(work, [node(index, *values) for index, values in enumerate(hardware)])
