"""Chooses where to cut a model over a cluster's devices, so that the slowest stage is as fast as it can be.

A pipeline is as fast as its slowest stage (PipeDream, Narayanan et al. 2019, section 3.1). The devices keep their
order, each holds at least one block, and none holds more than fits its memory. Dynamic programming over (device,
block) finds the best cuts in O(devices x blocks^2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

from ecogen.errors import PlacementError
from ecogen.placement import Labels, Placement, Segment, place
from ecogen.planning import cost
from ecogen.planning.cost import ModelShape
from ecogen.topology import Link, Node, link_between
from ecogen.units import format_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement with what it is predicted to take.

    Attributes:
        cuts: one block index between each two devices.
        stage_s: seconds a microbatch occupies each device, in the order of the devices: compute and sending, forward
            and, where the plan is for tuning, backward.
        sending_s: what of it is sending.
        memory_bytes: what each device needs to hold and tune its segments.
    """

    placement: Placement
    cuts: tuple[int, ...]
    stage_s: tuple[float, ...]
    sending_s: tuple[float, ...]
    memory_bytes: tuple[int, ...]

    @property
    def bottleneck_s(self) -> float:
        """The slowest stage: seconds between two microbatches of a full pipeline."""
        return max(self.stage_s)

    @property
    def traverse_s(self) -> float:
        """Seconds that one microbatch alone takes through all stages."""
        return sum(self.stage_s)


class Stages(Protocol):
    """Blocks in a row that devices in a row are to share."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_devices(self) -> int: ...

    @property
    def start_stop(self) -> int:
        """Where the first device's blocks must end; 0 where that is open."""

    def seconds(self, index: int, start: int, stop: int) -> float:
        """How long device `index` takes for blocks [start, stop)."""

    def fits(self, index: int, start: int, stop: int) -> bool:
        """Whether it has the memory."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A model over the devices of a cluster in their order, and what is in flight between them.

    Attributes:
        link: between two devices that have no access link of their own.
        owners: so many of the first devices take turns as the start, and hold what it holds besides their own.
        start_stop: where the start's own blocks end, once that is chosen; the other owners hold those too.
    """

    shape: ModelShape
    devices: tuple[Node, ...]
    link: Link
    labels: Labels
    microbatch_size: int
    microbatches: int
    tunes: bool = True
    owners: int = 1
    start_stop: int = 0

    @property
    def num_blocks(self) -> int:
        return self.shape.num_blocks

    @property
    def num_devices(self) -> int:
        return len(self.devices)

    def segments(self, index: int, start: int, stop: int) -> list[Segment]:
        """What device `index` computes on as the first device starts, if it gets blocks [start, stop)."""
        is_first, is_last = index == 0, index == len(self.devices) - 1
        if self.labels == "end" or len(self.devices) == 1:
            return [Segment(start, stop, is_first, is_last)]
        head = [Segment(self.shape.num_blocks, self.shape.num_blocks, has_head=True)] * is_first
        return [Segment(start, stop, is_first), *head]

    def held(self, index: int, start: int, stop: int) -> list[Segment]:
        """The same over all turns: an owner's, and the start's."""
        takes_turns = 0 < index < self.owners and self.start_stop > 0
        return self.segments(index, start, stop) + (self.segments(0, 0, self.start_stop) if takes_turns else [])

    def needs(self, index: int, start: int, stop: int) -> int:
        """Bytes that device `index` needs for blocks [start, stop)."""
        in_flight = self.microbatch_size * self.microbatches
        return cost.memory_bytes(self.shape, self.held(index, start, stop), in_flight, tunes=self.tunes)

    def fits(self, index: int, start: int, stop: int) -> bool:
        return self.needs(index, start, stop) <= self.devices[index].device.memory_bytes

    def flops(self, index: int, start: int, stop: int) -> int:
        """Of one microbatch on device `index`, forward and, where it tunes, backward."""
        segments = self.segments(index, start, stop)
        flops = sum(cost.forward_flops(self.shape, segment, self.microbatch_size) for segment in segments)
        if self.tunes:
            flops += sum(cost.backward_flops(self.shape, segment, self.microbatch_size) for segment in segments)
        return flops

    def seconds(self, index: int, start: int, stop: int) -> float:
        """Time of one microbatch on device `index`: its FLOPs / (FLOP/s), and the link time of what it sends."""
        compute_s = self.flops(index, start, stop) / self.devices[index].device.flops_per_s
        return compute_s + self.sending_s(index, start, stop)

    def sending_s(self, index: int, start: int, stop: int) -> float:
        """The link time of what device `index` sends."""
        return sum((self._crossing_s(index, *message) for message in self.messages(index, start, stop)), 0.0)

    def messages(self, index: int, start: int, stop: int) -> list[tuple[int, int]]:
        """To whom, and over which cut: activations to the next stage, gradients to the one before, if it needs them."""
        last = len(self.devices) - 1
        if not last:
            return []
        returns_to_start, lowest = self.labels == "start", self.shape.lowest_tunable_block
        messages = [(index + 1, stop)] if index < last else [(0, stop)] * returns_to_start
        if self.tunes and index > 0 and lowest < start:
            messages.append((index - 1, start))
        if self.tunes and index == 0 and returns_to_start and lowest < self.shape.num_blocks:
            messages.append((last, self.shape.num_blocks))  # the head's gradients
        return messages

    def _crossing_s(self, index: int, other: int, cut: int) -> float:
        link = link_between(self.devices[index], self.devices[other], self.link)
        return link.seconds(self.microbatch_size * cost.activation_bytes(self.shape, cut))


def plan(
    shape: ModelShape,
    devices: Sequence[Node],
    link: Link,
    labels: Labels = "start",
    *,
    cuts: Sequence[int] | None = None,
    microbatch_size: int = 1,
    microbatches: int = 1,
    tunes: bool = True,
    owners: int = 1,
) -> Plan:
    """The placement with the fastest slowest stage, or the given cuts, checked and timed.

    Args:
        devices: in the order of the chain; the first one starts.
        link: between any two of them that have no access link of their own.
        cuts: None to search; otherwise one block index between each two neighbours.
        microbatch_size: examples in a microbatch.
        microbatches: in flight at once; they share the devices' memory.
        tunes: count gradients, optimizer states and the backward pass; False for serving only.
        owners: devices, from the first, that take turns as the start and hold what that needs too.

    Raises:
        PlacementError: if the cuts do not divide the blocks, or the model does not fit; it says where and by how much.
    """
    pipeline = Pipeline(shape, tuple(devices), link, labels, microbatch_size, microbatches, tunes, owners)
    _check_number(pipeline)
    ids = [node.node_id for node in devices]
    chosen = _search(pipeline) if cuts is None else tuple(cuts)
    if chosen is None:
        raise _does_not_fit(pipeline, _fullest(pipeline))
    placement = place(ids, chosen, shape.num_blocks, labels)
    if not _all_fit(pipeline, chosen):
        raise _does_not_fit(pipeline, chosen)
    pipeline = _cut_at(pipeline, chosen)
    stages = [(index, *bounds) for index, bounds in enumerate(_bounds(pipeline, chosen))]
    seconds = tuple(pipeline.seconds(*stage) for stage in stages)
    sending = tuple(pipeline.sending_s(*stage) for stage in stages)
    return Plan(placement, chosen, seconds, sending, tuple(pipeline.needs(*stage) for stage in stages))


def _search(pipeline: Pipeline) -> tuple[int, ...] | None:
    """The cuts with the least largest stage time; None if no cuts fit the devices."""
    pipeline = replace(pipeline, start_stop=0)
    if pipeline.owners == 1 or len(pipeline.devices) == 1:
        starts = [pipeline]
    else:  # what the other owners hold depends on where the start's blocks end
        starts = [replace(pipeline, start_stop=stop) for stop in _stops(pipeline, 0)]
    ways = [way for way in map(fastest, starts) if way is not None]
    return min(ways)[1][:-1] if ways else None


def fastest(stages: Stages) -> tuple[float, tuple[int, ...]] | None:
    """The least largest stage time and where each stage stops; None if no way fits."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for index in range(stages.num_devices):
        best = _extend(stages, index, best)
    return best.get(stages.num_blocks)


def _extend(
    stages: Stages, index: int, best: dict[int, tuple[float, tuple[int, ...]]]
) -> dict[int, tuple[float, tuple[int, ...]]]:
    """For each stop, the best way to bring blocks [0, stop) on the devices up to `index`."""
    extended = {}
    for stop in _stops(stages, index):
        ways = [
            (max(slowest, stages.seconds(index, start, stop)), (*cuts, stop))
            for start, (slowest, cuts) in best.items()
            if start < stop and stages.fits(index, start, stop)
        ]
        if ways:
            extended[stop] = min(ways)
    return extended


def _stops(stages: Stages, index: int) -> range:
    """Where device `index` may stop: each device after it needs a block, and the last one takes all that is left."""
    num_blocks, after = stages.num_blocks, stages.num_devices - 1 - index
    if after and index == 0 and stages.start_stop:
        return range(stages.start_stop, stages.start_stop + 1)
    return range(index + 1, num_blocks - after + 1) if after else range(num_blocks, num_blocks + 1)


def _cut_at(pipeline: Pipeline, cuts: Sequence[int]) -> Pipeline:
    return replace(pipeline, start_stop=[*cuts, pipeline.shape.num_blocks][0])


def _bounds(pipeline: Pipeline, cuts: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise([0, *cuts, pipeline.shape.num_blocks]))


def _all_fit(pipeline: Pipeline, cuts: Sequence[int]) -> bool:
    pipeline = _cut_at(pipeline, cuts)
    return all(pipeline.fits(index, *bounds) for index, bounds in enumerate(_bounds(pipeline, cuts)))


def _fullest(pipeline: Pipeline) -> tuple[int, ...]:
    """Cuts that fill each device in turn; whatever does not fit is then on the device that says so."""
    cuts = [0]
    for index in range(len(pipeline.devices) - 1):
        room = _most(pipeline, index, cuts[-1], max(_stops(pipeline, index)))
        cuts.append(cuts[-1] + max(1, room))
    return tuple(cuts[1:])


def _most(pipeline: Pipeline, index: int, start: int, stop: int) -> int:
    """How many of the blocks [start, stop) fit device `index`; the last device counts from the top."""
    is_last = index == len(pipeline.devices) - 1
    for count in range(stop - start, 0, -1):
        if pipeline.fits(index, *((stop - count, stop) if is_last else (start, start + count))):
            return count
    return 0


def _check_number(pipeline: Pipeline) -> None:
    count, num_blocks = len(pipeline.devices), pipeline.shape.num_blocks
    if not count:
        raise PlacementError("there is no device to place the model on; give the cluster at least one")
    if count > num_blocks:
        raise PlacementError(
            f"{count} devices cannot share {num_blocks} blocks, since each holds at least one; "
            f"use at most {num_blocks} devices a cluster, or a model with at least {count} blocks"
        )


def _does_not_fit(pipeline: Pipeline, cuts: Sequence[int]) -> PlacementError:
    """The error for the first device whose segments do not fit."""
    pipeline = _cut_at(pipeline, cuts)
    bounds = _bounds(pipeline, cuts)
    index = next(index for index, blocks in enumerate(bounds) if not pipeline.fits(index, *blocks))
    node, needed = pipeline.devices[index], pipeline.needs(index, *bounds[index])
    has = node.device.memory_bytes
    most = _most(pipeline, index, *bounds[index])
    at_most = f"it can hold at most {most} block{'s' * (most != 1)}" if most else "it cannot hold even one block"
    return PlacementError(
        f"{' and '.join(map(str, pipeline.held(index, *bounds[index])))}: needs {format_bytes(needed)} but node "
        f"{node.node_id!r} has {format_bytes(has)} ({format_bytes(needed - has)} over); {at_most}; "
        f"{_remedy(pipeline, cuts, index, most)}"
    )


def _remedy(pipeline: Pipeline, cuts: Sequence[int], index: int, most: int) -> str:
    """What would fit, tried out before it is said."""
    for moved in _moved_cuts(pipeline, cuts, index, most):
        if _all_fit(pipeline, moved):
            before, after = next((a, b) for a, b in zip(cuts, moved, strict=True) if a != b)
            return f"move the cut from {before} to {after} or add a device"
    found = _search(pipeline)
    if found is not None:
        return f"cuts {list(found)} fit, or add a device"
    if 0 < index < pipeline.owners:
        return "it takes turns as the start: lower data.owners, or give it more memory"
    if not most:
        return "put a device with more memory in its place, or have smaller or fewer microbatches in flight"
    return "no cuts fit these devices: add a device or memory"


def _moved_cuts(pipeline: Pipeline, cuts: Sequence[int], index: int, most: int) -> list[list[int]]:
    """The cuts with one of the segment's own two moved so far that the segment fits."""
    start, stop = _bounds(pipeline, cuts)[index]
    moves = []
    if most and index < len(cuts):
        moves.append([*cuts[:index], start + most, *cuts[index + 1 :]])
    if most and index > 0:
        moves.append([*cuts[: index - 1], stop - most, *cuts[index:]])
    return moves
