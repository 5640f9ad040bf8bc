"""Where to cut a language model over the devices that serve it.

Decoding reads every weight for every token, so a stage takes as long as its weights are large: with a head that is read
as a block is, and an embedding of which a row is read. How fast a device reads them is measured, once it holds some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ecogen.errors import PlacementError
from ecogen.placement import Labels, Placement, place
from ecogen.planning.search import fastest
from ecogen.topology import Node
from ecogen.units import format_bytes


@dataclass(frozen=True, slots=True)
class Weights:
    """How large a model is.

    Attributes:
        blocks: bytes of each block.
        embedding, head: bytes below and above the blocks; a head that is the embedding too counts as both.
        slabs: bytes of keys and values that each block keeps for all requests.
    """

    blocks: tuple[int, ...]
    embedding: int
    head: int
    slabs: int

    @property
    def total(self) -> int:
        """What one device needs for all of it."""
        return sum(self.blocks) + self.embedding + self.head + len(self.blocks) * self.slabs


@dataclass(frozen=True, slots=True)
class _Stages:
    """A model over the devices of a cluster; see `planning.search.Stages`."""

    weights: Weights
    devices: tuple[Node, ...]
    labels: Labels
    rates: Mapping[str, float] = field(default_factory=dict)
    start_stop: int = 0

    @property
    def num_blocks(self) -> int:
        return len(self.weights.blocks)

    @property
    def num_devices(self) -> int:
        return len(self.devices)

    def holds_head(self, index: int) -> bool:
        return index == (self.num_devices - 1 if self.labels == "end" else 0)

    def read_bytes(self, index: int, start: int, stop: int) -> int:
        """What one token reads."""
        return sum(self.weights.blocks[start:stop]) + self.holds_head(index) * self.weights.head

    def needs(self, index: int, start: int, stop: int) -> int:
        embedding = (index == 0) * self.weights.embedding
        return self.read_bytes(index, start, stop) + embedding + (stop - start) * self.weights.slabs

    def fits(self, index: int, start: int, stop: int) -> bool:
        return self.needs(index, start, stop) <= self.devices[index].device.memory_bytes

    def seconds(self, index: int, start: int, stop: int) -> float:
        """In units of their own where not all were measured: memory is then taken to be as fast as they compute."""
        device = self.devices[index]
        is_measured = all(other.node_id in self.rates for other in self.devices)
        return self.read_bytes(index, start, stop) / (
            self.rates[device.node_id] if is_measured else device.device.flops_per_s
        )


def place_decoder(
    weights: Weights, devices: Sequence[Node], labels: Labels = "end", rates: Mapping[str, float] | None = None
) -> Placement:
    """The placement with the fastest slowest stage.

    Args:
        devices: in the order of the chain; where there are more than blocks, the last ones are left out.
        labels: where the head is: on the last device, or on the first one, which then sees all tokens and no other.
        rates: bytes of weights that devices read in a second, as `rates_of` has them; used if all of these have one.

    Raises:
        PlacementError: if the model does not fit.
    """
    used = tuple(devices[: len(weights.blocks)])
    stages = _Stages(weights, used, labels, rates or {})
    found = fastest(stages) if used else None
    if found is None:
        has = ", ".join(format_bytes(node.device.memory_bytes) for node in used)
        raise PlacementError(
            f"the model needs {format_bytes(weights.total)} with its requests' keys and values, and no cuts of its "
            f"{stages.num_blocks} blocks fit {len(used)} devices that have {has or 'nothing'}; "
            "add a device, or set serving.slots or serving.max_tokens lower"
        )
    return place([node.node_id for node in used], found[1][:-1], stages.num_blocks, labels)


def rates_of(weights: Weights, placement: Placement, seconds: Mapping[str, float]) -> dict[str, float]:
    """Bytes of weights that each device reads in a second, from how long its stages take in a step."""
    return {node_id: _read_bytes(weights, placement, node_id) / taken for node_id, taken in seconds.items()}


def predicted_s(weights: Weights, placement: Placement, rates: Mapping[str, float]) -> float:
    """Seconds of the slowest stage of a placement, all of whose devices were measured."""
    return max(_read_bytes(weights, placement, node_id) / rates[node_id] for node_id in placement.node_ids)


def _read_bytes(weights: Weights, placement: Placement, node_id: str) -> int:
    segments = placement.segments_of(node_id)
    blocks = sum(weights.blocks[block] for segment in segments for block in segment.blocks)
    return blocks + any(segment.has_head for segment in segments) * weights.head
