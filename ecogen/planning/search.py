"""Chooses where to cut a model over a cluster's devices, so that the slowest stage is as fast as it can be.

A pipeline is as fast as its slowest stage (PipeDream, Narayanan et al. 2019, section 3.1). The devices keep their
order, each holds at least one block, and none holds more than fits its memory. Dynamic programming over (device,
block) finds the best cuts in O(devices x blocks^2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ecogen.errors import PlacementError
from ecogen.placement import Labels, Placement, Segment, place
from ecogen.planning import cost
from ecogen.planning.cost import ModelShape
from ecogen.topology import Link, Node
from ecogen.units import format_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement with what it is predicted to take.

    Attributes:
        cuts: one block index between each two devices.
        stage_s: seconds a microbatch occupies each device, in the order of the devices: compute and sending, forward
            and, where the plan is for tuning, backward.
        memory_bytes: what each device needs to hold and tune its segments.
    """

    placement: Placement
    cuts: tuple[int, ...]
    stage_s: tuple[float, ...]
    memory_bytes: tuple[int, ...]

    @property
    def bottleneck_s(self) -> float:
        """The slowest stage: seconds between two microbatches of a full pipeline."""
        return max(self.stage_s)

    @property
    def traverse_s(self) -> float:
        """Seconds that one microbatch alone takes through all stages."""
        return sum(self.stage_s)


@dataclass(frozen=True, slots=True)
class _Problem:
    """The model, the devices in order, and what is in flight between them."""

    shape: ModelShape
    devices: tuple[Node, ...]
    link: Link
    labels: Labels
    microbatch_size: int
    microbatches: int
    tunes: bool

    def segments(self, index: int, start: int, stop: int) -> list[Segment]:
        """What device `index` holds if it gets blocks [start, stop)."""
        is_first, is_last = index == 0, index == len(self.devices) - 1
        if self.labels == "end" or len(self.devices) == 1:
            return [Segment(start, stop, is_first, is_last)]
        head = [Segment(self.shape.num_blocks, self.shape.num_blocks, has_head=True)] * is_first
        return [Segment(start, stop, is_first), *head]

    def needs(self, index: int, start: int, stop: int) -> int:
        """Bytes that device `index` needs for blocks [start, stop)."""
        in_flight = self.microbatch_size * self.microbatches
        return cost.memory_bytes(self.shape, self.segments(index, start, stop), in_flight, tunes=self.tunes)

    def fits(self, index: int, start: int, stop: int) -> bool:
        return self.needs(index, start, stop) <= self.devices[index].device.memory_bytes

    def seconds(self, index: int, start: int, stop: int) -> float:
        """Time of one microbatch on device `index`: its FLOPs / (FLOP/s), and the link time of what it sends."""
        segments = self.segments(index, start, stop)
        flops = sum(cost.forward_flops(self.shape, segment, self.microbatch_size) for segment in segments)
        if self.tunes:
            flops += sum(cost.backward_flops(self.shape, segment, self.microbatch_size) for segment in segments)
        compute_s = flops / self.devices[index].device.flops_per_s
        return compute_s + sum(map(self._link_s, self._cuts_sent_over(index, start, stop)))

    def _link_s(self, cut: int) -> float:
        """Time of one microbatch's activations, or gradients, on the link at a cut."""
        return self.link.seconds(self.microbatch_size * cost.activation_bytes(self.shape, cut))

    def _cuts_sent_over(self, index: int, start: int, stop: int) -> list[int]:
        """The cut of each message a microbatch: activations upward, gradients downward where something needs them."""
        is_alone = len(self.devices) == 1
        returns_to_start = self.labels == "start" and not is_alone
        is_followed = index < len(self.devices) - 1 or returns_to_start
        lowest, top = self.shape.lowest_tunable_block, self.shape.num_blocks
        gradients_down = self.tunes and index > 0 and lowest < start
        gradients_of_head = self.tunes and index == 0 and returns_to_start and lowest < top
        return [stop] * is_followed + [start] * gradients_down + [top] * gradients_of_head


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
) -> Plan:
    """The placement with the fastest slowest stage, or the given cuts, checked and timed.

    Args:
        devices: in the order of the chain; the first one starts.
        link: between any two of them.
        cuts: None to search; otherwise one block index between each two neighbours.
        microbatch_size: examples in a microbatch.
        microbatches: in flight at once; they share the devices' memory.
        tunes: count gradients, optimizer states and the backward pass; False for serving only.

    Raises:
        PlacementError: if the cuts do not divide the blocks, or the model does not fit; it says where and by how much.
    """
    problem = _Problem(shape, tuple(devices), link, labels, microbatch_size, microbatches, tunes)
    _check_number(problem)
    ids = [node.node_id for node in devices]
    chosen = _search(problem) if cuts is None else tuple(cuts)
    if chosen is None:
        raise _does_not_fit(problem, _fullest(problem))
    placement = place(ids, chosen, shape.num_blocks, labels)
    if not _all_fit(problem, chosen):
        raise _does_not_fit(problem, chosen)
    stages = [(index, *bounds) for index, bounds in enumerate(_bounds(problem, chosen))]
    seconds = tuple(problem.seconds(*stage) for stage in stages)
    return Plan(placement, chosen, seconds, tuple(problem.needs(*stage) for stage in stages))


def _search(problem: _Problem) -> tuple[int, ...] | None:
    """The cuts with the least largest stage time; None if no cuts fit the devices."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for index in range(len(problem.devices)):
        best = _extend(problem, index, best)
    found = best.get(problem.shape.num_blocks)
    return None if found is None else found[1][:-1]


def _extend(
    problem: _Problem, index: int, best: dict[int, tuple[float, tuple[int, ...]]]
) -> dict[int, tuple[float, tuple[int, ...]]]:
    """For each stop, the best way to bring blocks [0, stop) on the devices up to `index`."""
    extended = {}
    for stop in _stops(problem, index):
        ways = [
            (max(slowest, problem.seconds(index, start, stop)), (*cuts, stop))
            for start, (slowest, cuts) in best.items()
            if start < stop and problem.fits(index, start, stop)
        ]
        if ways:
            extended[stop] = min(ways)
    return extended


def _stops(problem: _Problem, index: int) -> range:
    """Where device `index` may stop: each device after it needs a block, and the last one takes all that is left."""
    num_blocks, after = problem.shape.num_blocks, len(problem.devices) - 1 - index
    return range(index + 1, num_blocks - after + 1) if after else range(num_blocks, num_blocks + 1)


def _bounds(problem: _Problem, cuts: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise([0, *cuts, problem.shape.num_blocks]))


def _all_fit(problem: _Problem, cuts: Sequence[int]) -> bool:
    return all(problem.fits(index, *bounds) for index, bounds in enumerate(_bounds(problem, cuts)))


def _fullest(problem: _Problem) -> tuple[int, ...]:
    """Cuts that fill each device in turn; whatever does not fit is then on the device that says so."""
    cuts = [0]
    for index in range(len(problem.devices) - 1):
        room = _most(problem, index, cuts[-1], max(_stops(problem, index)))
        cuts.append(cuts[-1] + max(1, room))
    return tuple(cuts[1:])


def _most(problem: _Problem, index: int, start: int, stop: int) -> int:
    """How many of the blocks [start, stop) fit device `index`; the last device counts from the top."""
    is_last = index == len(problem.devices) - 1
    for count in range(stop - start, 0, -1):
        if problem.fits(index, *((stop - count, stop) if is_last else (start, start + count))):
            return count
    return 0


def _check_number(problem: _Problem) -> None:
    count, num_blocks = len(problem.devices), problem.shape.num_blocks
    if not count:
        raise PlacementError("there is no device to place the model on; give the cluster at least one")
    if count > num_blocks:
        raise PlacementError(
            f"{count} devices cannot share {num_blocks} blocks, since each holds at least one; "
            f"use at most {num_blocks} devices a cluster, or a model with at least {count} blocks"
        )


def _does_not_fit(problem: _Problem, cuts: Sequence[int]) -> PlacementError:
    """The error for the first device whose segments do not fit."""
    bounds = _bounds(problem, cuts)
    index = next(index for index, blocks in enumerate(bounds) if not problem.fits(index, *blocks))
    node, needed = problem.devices[index], problem.needs(index, *bounds[index])
    has = node.device.memory_bytes
    most = _most(problem, index, *bounds[index])
    at_most = f"it can hold at most {most} block{'s' * (most != 1)}" if most else "it cannot hold even one block"
    return PlacementError(
        f"{' and '.join(map(str, problem.segments(index, *bounds[index])))}: needs {format_bytes(needed)} but node "
        f"{node.node_id!r} has {format_bytes(has)} ({format_bytes(needed - has)} over); {at_most}; "
        f"{_remedy(problem, cuts, index, most)}"
    )


def _remedy(problem: _Problem, cuts: Sequence[int], index: int, most: int) -> str:
    """What would fit, tried out before it is said."""
    for moved in _moved_cuts(problem, cuts, index, most):
        if _all_fit(problem, moved):
            before, after = next((a, b) for a, b in zip(cuts, moved, strict=True) if a != b)
            return f"move the cut from {before} to {after} or add a device"
    found = _search(problem)
    if found is not None:
        return f"cuts {list(found)} fit, or add a device"
    if not most:
        return "put a device with more memory in its place, or have smaller or fewer microbatches in flight"
    return "no cuts fit these devices: add a device or memory"


def _moved_cuts(problem: _Problem, cuts: Sequence[int], index: int, most: int) -> list[list[int]]:
    """The cuts with one of the segment's own two moved so far that the segment fits."""
    start, stop = _bounds(problem, cuts)[index]
    moves = []
    if most and index < len(cuts):
        moves.append([*cuts[:index], start + most, *cuts[index + 1 :]])
    if most and index > 0:
        moves.append([*cuts[: index - 1], stop - most, *cuts[index:]])
    return moves
