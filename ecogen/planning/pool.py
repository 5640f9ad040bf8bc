"""What clusters of a pool's devices would take: the slowest stage of a cluster over every order and cut.

The same figures as `planning.search`, which it asks for them, for many orders at once: arrays instead of loops.

Legend: R orders, n devices in a cluster, B blocks, N devices in the pool, W = B - n + 1 blocks where a stage may start.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations, permutations

import numpy as np
from numpy.typing import NDArray

from ecogen.placement import Labels, most_in_flight
from ecogen.planning import cost
from ecogen.planning.cost import ModelShape
from ecogen.planning.search import Pipeline, Plan, plan
from ecogen.topology import Link, Node, link_between

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Members = frozenset[int]
"""A cluster: indices into the pool."""

Messages = tuple[tuple[int, bool], ...]
"""To which place of a chain, and whether only what the head needs is sent."""

# R x W^2 up to which every order is tried, and for how many at once: 5 devices of a model of 12 blocks.
_MANY = 20_000


@dataclass(frozen=True, slots=True)
class Work:
    """What every cluster is to do; as the arguments of `planning.search.plan`.

    Attributes:
        microbatches: of a batch, so that no more can be in flight.
    """

    shape: ModelShape
    link: Link
    labels: Labels = "start"
    microbatch_size: int = 1
    microbatches: int = 1
    owners: int = 1

    def in_flight(self, size: int) -> int:
        """How many microbatches a cluster of so many devices has under way at most."""
        return min(self.microbatches, most_in_flight(size, returns=self.labels == "start" and size > 1))

    def plan(self, devices: Sequence[Node], cuts: Sequence[int] | None = None) -> Plan:
        """The placement on devices in their order.

        Raises:
            PlacementError: if they cannot hold the model, or the cuts do not divide it.
        """
        return plan(
            self.shape,
            devices,
            self.link,
            self.labels,
            cuts=cuts,
            microbatch_size=self.microbatch_size,
            microbatches=self.in_flight(len(devices)),
            owners=self.owners,
        )

    def pipeline(self, devices: Sequence[Node], microbatches: int, start_stop: int = 0) -> Pipeline:
        """The model over these devices, with so many microbatches in flight."""
        return Pipeline(
            self.shape,
            tuple(devices),
            self.link,
            self.labels,
            self.microbatch_size,
            microbatches,
            owners=self.owners,
            start_stop=start_stop,
        )


@dataclass(frozen=True)
class Stages:
    """What blocks [start, stop) cost at each place of a chain, whichever device stands there.

    Attributes:
        flops, needs: of a microbatch, and bytes [n, B + 1, B + 1]; infinite where there is no block.
        messages: for each place the starts [B + 1] that send alike, and what they send.
        owners_need: bytes that another owner holds of the start's, by where the start's blocks end [B + 1].
        least_flops, least_needs: of so many blocks, wherever they are, as the first and as another; FLOPs by how many
            messages of each kind that place sends: [2, 2 of the head, 3 of others, B + 1] and [2, B + 1].
    """

    flops: Floats
    needs: Floats
    messages: Sequence[Sequence[tuple[NDArray[np.bool_], Messages]]]
    owners_need: Floats
    least_flops: Floats
    least_needs: Floats

    @classmethod
    def of(cls, work: Work, node: Node, size: int, microbatches: int) -> Stages:
        """Of a chain of so many devices."""
        pipeline, stops = work.pipeline([node] * size, microbatches), work.shape.num_blocks + 1
        flops, needs = np.full((2, size, stops, stops), np.inf)
        for start, stop in combinations(range(stops), 2):
            for index in {0, min(1, size - 1), size - 1}:  # the places between are alike
                flops[index, start, stop] = pipeline.flops(index, start, stop)
                needs[index, start, stop] = pipeline.needs(index, start, stop)
        flops[1 : size - 1], needs[1 : size - 1] = flops[min(1, size - 1)], needs[min(1, size - 1)]
        sends = [[_messages(pipeline, index, start) for start in range(stops)] for index in range(size)]
        alike = [[(np.array([sent == one for one in row]), sent) for sent in dict.fromkeys(row)] for row in sends]
        return cls(
            flops, needs, alike, _owners_need(work, node, size, microbatches), *_least_of_places(flops, needs, sends)
        )


class Pool:
    """Devices, and what each cluster of them would take; what was found once is remembered."""

    def __init__(self, work: Work, nodes: Sequence[Node]) -> None:
        self.work, self.nodes = work, tuple(nodes)
        self._speed = np.array([node.device.flops_per_s for node in nodes])
        self._memory = np.array([float(node.device.memory_bytes) for node in nodes])
        links = [[link_between(one, other, work.link) for other in nodes] for one in nodes]
        payloads = [work.microbatch_size * cost.activation_bytes(work.shape, cut) for cut in (0, work.shape.num_blocks)]
        # Seconds [2, N, N] of a message from one device to another: over a cut between blocks, and to or from the head.
        self._sent_s = np.array([[[link.seconds(payload) for link in row] for row in links] for payload in payloads])
        self._stages: dict[int, Stages] = {}
        self._found: dict[Members, tuple[float, tuple[int, ...]]] = {}

    @property
    def num_blocks(self) -> int:
        return self.work.shape.num_blocks

    def slowest_s(self, members: Members) -> float:
        """Seconds of a cluster's slowest stage at its best order and cuts; infinite if it cannot hold the model."""
        return self._best(members)[0]

    def plan(self, members: Members) -> Plan:
        """The placement of a cluster in its best order.

        Raises:
            PlacementError: if it cannot hold the model.
        """
        return self.work.plan([self.nodes[index] for index in self._best(members)[1]])

    def _best(self, members: Members) -> tuple[float, tuple[int, ...]]:
        if members not in self._found:
            self._found[members] = self._search(sorted(members))
        return self._found[members]

    def _search(self, members: Sequence[int]) -> tuple[float, tuple[int, ...]]:
        """Every order where that is little work; else the best that exchanging two or moving one leads to."""
        if not 0 < len(members) <= self.num_blocks:
            return float("inf"), tuple(members)
        if _num_orders(len(members)) * (self.num_blocks - len(members) + 1) ** 2 <= _MANY:
            return self._best_of(np.array(members)[_orders(len(members))])
        return self._climb(members)

    def _climb(self, members: Sequence[int]) -> tuple[float, tuple[int, ...]]:
        """From devices with links alike beside each other, any of them first, by exchanging two and moving one.

        A slow link is paid for by both of its ends, so slow ones belong together.
        """
        own_s = {index: self._sent_s[0, index, index] for index in members}
        line = sorted(members, key=lambda index: (own_s[index], -self._speed[index]))
        lines = (line, sorted(members, key=lambda index: -self._speed[index]))
        best = self._best_of(np.array([order[turn:] + order[:turn] for order in lines for turn in range(len(order))]))
        while True:
            found = self._best_of(_neighbours(best[1]))
            if found[0] >= best[0]:
                return best
            best = found

    def _best_of(self, orders: Ints) -> tuple[float, tuple[int, ...]]:
        most = max(1, _MANY // self.num_blocks**2)
        parts = np.split(orders, range(most, len(orders), most))
        slowest = np.concatenate([self.slowest_of_orders(part) for part in parts])
        first = int(slowest.argmin())
        return float(slowest[first]), tuple(int(index) for index in orders[first])

    def slowest_of_orders(self, orders: Ints) -> Floats:
        """Seconds of the slowest stage [R] of each order [R, n] at its best cuts: dynamic programming over blocks."""
        size = orders.shape[1]
        stages = self._stages_of(size)
        takes = [self._stage_s(stages, orders, index) for index in range(size)]
        if self.work.owners == 1 or size == 1:
            return self._least(takes)
        stops = range(1, self.num_blocks - size + 2)
        ends = [self._least(self._with_owners(stages, orders, takes, stop)) for stop in stops]
        least: Floats = np.min(ends, axis=0)
        return least

    def _least(self, takes: Sequence[Floats]) -> Floats:
        """The least largest time [R] of stages that take [R, W, W] each."""
        best = np.full(takes[0].shape[:2], np.inf)
        best[:, 0] = 0
        for stage_s in takes:
            best = np.maximum(best[:, :, None], stage_s).min(axis=1)
        least: Floats = best[:, -1]
        return least

    def _stage_s(self, stages: Stages, orders: Ints, index: int) -> Floats:
        """Seconds [R, W, W] of the device at one place, by start and stop; infinite where it does not fit."""
        here, window = orders[:, index], self._window(index, orders.shape[1])
        takes: Floats = stages.flops[index][window] / self._speed[here, None, None]
        for starts, messages in stages.messages[index]:
            each_s = [self._sent_s[int(of_head), here, orders[:, other]] for other, of_head in messages]
            sent_s = sum(each_s, np.zeros(len(orders)))
            takes[:, starts[window[0]]] += sent_s[:, None, None]
        takes[stages.needs[index][window] > self._memory[here, None, None]] = np.inf
        return takes

    def _window(self, index: int, size: int) -> tuple[slice, slice]:
        """Where a device may start and stop, so that each before and after it has a block."""
        width = self.num_blocks - size + 1
        return slice(index, index + width), slice(index + 1, index + 1 + width)

    def _with_owners(self, stages: Stages, orders: Ints, takes: Sequence[Floats], stop: int) -> list[Floats]:
        """The same where the start's blocks end at `stop`, which the other owners hold as well."""
        first = np.full_like(takes[0], np.inf)
        first[:, :, stop - 1] = takes[0][:, :, stop - 1]
        owned = [first, *takes[1:]]
        for index in range(1, min(self.work.owners, orders.shape[1])):
            needs = stages.needs[index][self._window(index, orders.shape[1])] + stages.owners_need[stop]
            owned[index] = np.where(needs > self._memory[orders[:, index], None, None], np.inf, takes[index])
        return owned

    # What no cluster can beat.

    @cached_property
    def alone_s(self) -> Floats:
        """Seconds [N] of each device with the whole model; infinite where it does not fit."""
        return np.array([self.slowest_s(frozenset({index})) for index in range(len(self.nodes))])

    def least_s(self, members: Ints, smallest: int) -> tuple[Floats, Floats]:
        """The least seconds [n, B + 1] in which devices can hold so many blocks: as the first of a chain, as another.

        Wherever the blocks are, in whatever chain of these devices; infinite where they do not fit.

        Args:
            smallest: how many devices a chain has at least; as many as these are, if they are one.
        """
        size = len(members)
        is_chain, in_flight = size == smallest, self.work.in_flight(smallest)
        stages = self._stages_of(size) if is_chain else Stages.of(self.work, self.nodes[0], 3, in_flight)
        sent_s = self._sent_s[:, members[:, None], members] + np.diag(np.full(size, np.inf))
        sent_s.sort(axis=2)
        nearest, of_head = sent_s[0, :, :1], sent_s[1, :, :1]
        # A chain of two sends everything to the same device, a longer one to two.
        second = sent_s[0, :, 1:2] if is_chain and size > 2 else nearest
        others = np.stack([np.zeros_like(nearest), nearest, nearest + second])
        sending = np.stack([others, others + of_head])
        first, other = (
            np.min(stages.least_flops[role][:, :, None] / self._speed[members][:, None] + sending, axis=(0, 1))
            for role in range(2)
        )
        first[stages.least_needs[0] > self._memory[members][:, None]] = np.inf
        other[stages.least_needs[1] > self._memory[members][:, None]] = np.inf
        return first, other

    def least_needs(self, size: int) -> float:
        """Bytes that one block needs wherever it is, at least, in a cluster of so many devices."""
        return float(Stages.of(self.work, self.nodes[0], 3, self.work.in_flight(size)).least_needs[:, 1].min())

    def better_than(self, index: int, others: Iterable[int]) -> list[int]:
        """Those of other devices that have more memory, speed or a better link than one has."""
        return [other for other in sorted(others) if not self._is_no_better[other, index]]

    @cached_property
    def _is_no_better(self) -> NDArray[np.bool_]:
        """Whether one device [N, ] is in everything at most as good as another [, N]."""
        speed, memory, sent_s = self._speed, self._memory, self._sent_s
        links = (sent_s[:, :, None, :] >= sent_s[:, None, :, :]).all(axis=(0, 3))
        return (speed[:, None] <= speed) & (memory[:, None] <= memory) & links

    def may_be_faster(self, members: Members, limit_s: float) -> bool:
        """False where it is certain that a cluster cannot be faster than this; quick."""
        size = len(members)
        if members in self._found or size == 1:
            return self.slowest_s(members) < limit_s
        if not 0 < size <= self.num_blocks:
            return False
        first, other = (_most_blocks(role_s, limit_s) for role_s in self.least_s(np.array(sorted(members)), size))
        starts = first > 0
        return bool(starts.any() and (first - other)[starts].max() + other.sum() >= self.num_blocks)

    def _stages_of(self, size: int) -> Stages:
        if size not in self._stages:
            self._stages[size] = Stages.of(self.work, self.nodes[0], size, self.work.in_flight(size))
        return self._stages[size]


def _messages(pipeline: Pipeline, index: int, start: int) -> Messages:
    """What a place sends; only the last one's blocks end where the head begins."""
    num_blocks = pipeline.shape.num_blocks
    stop = num_blocks if index == len(pipeline.devices) - 1 else start
    return tuple((other, cut == num_blocks) for other, cut in pipeline.messages(index, start, stop))


def _least_of_places(flops: Floats, needs: Floats, sends: Sequence[Sequence[Messages]]) -> tuple[Floats, Floats]:
    size, stops = flops.shape[:2]
    least_flops, least_needs = np.full((2, 2, 3, stops), np.inf), np.full((2, stops), np.inf)
    for index in range(size):
        role = min(index, 1)
        for start in range(1 if index == 0 else stops - 1):
            blocks, of_head = slice(0, stops - start), sum(to_head for _, to_head in sends[index][start])
            flops_so = least_flops[role, of_head, len(sends[index][start]) - of_head]
            for least, every in ((flops_so, flops), (least_needs[role], needs)):
                least[blocks] = np.minimum(least[blocks], every[index, start, start:])
    return least_flops, least_needs


def _most_blocks(seconds: Floats, limit_s: float) -> Ints:
    """The most blocks [n] in less than a time."""
    blocks: Ints = np.where(seconds < limit_s, np.arange(seconds.shape[1]), 0).max(axis=1)
    return blocks


def _owners_need(work: Work, node: Node, size: int, microbatches: int) -> Floats:
    num_blocks = work.shape.num_blocks
    extra = np.zeros(num_blocks + 1)
    if work.owners > 1 and size > 1:
        last = (1, num_blocks - 1, num_blocks)
        own = work.pipeline([node] * size, microbatches).needs(*last)
        for stop in range(1, num_blocks):
            extra[stop] = work.pipeline([node] * size, microbatches, stop).needs(*last) - own
    return extra


@cache
def _orders(size: int) -> Ints:
    return np.array(list(permutations(range(size))))


def _num_orders(size: int) -> int:
    return int(np.prod(range(1, size + 1), dtype=float))


def _neighbours(order: Sequence[int]) -> Ints:
    """Every order with two devices exchanged, or one moved."""
    orders = []
    for one, other in permutations(range(len(order)), 2):
        moved = list(order)
        moved.insert(other, moved.pop(one))
        orders.append(moved)
        if one < other:
            changed = list(order)
            changed[one], changed[other] = changed[other], changed[one]
            orders.append(changed)
    return np.array(orders)
