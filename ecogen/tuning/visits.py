"""What one device computes for the microbatches that visit it, on its compute thread.

Forward and backward of its segments, each optimizer step when the news comes that it is due, and the prefix
activations that it keeps for others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from ecogen.config import Unlabelled, WireType
from ecogen.errors import ProtocolError
from ecogen.metering.meter import Meter
from ecogen.models.tunables import Tunables
from ecogen.placement import Segment
from ecogen.planning.cost import ModelShape, backward_flops, forward_flops
from ecogen.runtime.compression import TENSOR, compress, restore
from ecogen.runtime.example_gradients import example_weights
from ecogen.runtime.prefix_cache import PrefixCache
from ecogen.runtime.stage import MicrobatchKey, Stage
from ecogen.tuning.fixmatch import targets, without_weak
from ecogen.tuning.messages import (
    BACKWARD,
    FORWARD,
    HOLD,
    KEEP,
    KEYS,
    LABELS,
    RECALL,
    RETURNED,
    ROOM,
    Flow,
)
from ecogen.tuning.route import Route, moved_segments


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What a device knows in the end: the number of local steps, means over them, and what it answers with.

    Attributes:
        confident: share of unlabelled examples with a pseudo-label.
    """

    num_steps: int
    loss: float | None
    confident: float
    tunables: Tunables


class Parcel(NamedTuple):
    """What a computation gave, and the visit it goes to."""

    method: str
    visit: int
    flow: Flow
    tensors: Mapping[str, Tensor]


class Visits:
    """One device's computations in one attempt.

    Args:
        routes: one for each owner, in the order of their turns.
        wire_types: of what this device sends, by method; float32 where nothing is said.
        cache: where it keeps prefix activations.
        unlabelled: what is made of unlabelled examples, where batches have some.
        collect: what it answers with after the last step.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        node_id: str,
        stage: Stage,
        meter: Meter,
        *,
        wire_types: Mapping[str, WireType],
        cache: PrefixCache | None,
        unlabelled: Unlabelled,
        collect: Callable[[], Tunables],
    ) -> None:
        self._routes, self._own_id, self._stage, self._meter = routes, node_id, stage, meter
        self._wire_types, self._cache, self._unlabelled, self._collect = wire_types, cache, unlabelled, collect
        self._backwards: dict[int, int] = {}  # visit -> microbatches of this step that came back
        self._step = 0
        self._expected = 1  # examples that the step has on average

    def execute(self, method: str, flow: Flow, tensors: Mapping[str, Tensor]) -> Parcel | LocalResult:
        """Compute what a message asks for; returns what to send and to which visit, or the result at the end."""
        self._step_up_to(flow)
        match method:
            case "finish":
                self._stage.take_over(tensors)  # sums of gradients, where there is a correction
                return LocalResult(flow.step, flow.loss if flow.step else None, flow.confident, self._collect())
            case "want":
                return self._reserve(flow, int(tensors[ROOM]))
            case "backward":
                return self._backward(flow, restore(tensors))
        return self._forward(flow, tensors)

    def _step_up_to(self, flow: Flow) -> None:
        """Take the optimizer step before this one, unless it is taken."""
        if flow.step > self._step:
            if self._stage.noise is not None:
                self._stage.noised_step(flow.squared_norms, self._expected)
            else:
                self._stage.step(flow.squared_norm)
            self._step = flow.step
            self._backwards.clear()
        self._expected = flow.batch_size or self._expected

    def give_up(self, flow: Flow) -> dict[str, Tensor]:
        """What the next owner goes on with: tunables and optimizer states, stepped for the last time here."""
        self._step_up_to(flow)
        moved = moved_segments(self._route(flow, before=1), self._route(flow))
        return {name: tensor for segment in moved for name, tensor in self._stage.hand_over(segment).items()}

    def _reserve(self, flow: Flow, wanted: int) -> Parcel:
        """What an owner may recall here, and how much more it may send to be kept."""
        room = self._cache.reserve(self._route(flow).node_id(0), wanted) if self._cache else 0
        keys = self._cache.keys if self._cache else torch.empty(0, dtype=torch.int64)
        return Parcel(HOLD, 0, flow, {KEYS: keys, ROOM: torch.tensor(room)})

    def _forward(self, flow: Flow, tensors: Mapping[str, Tensor]) -> Parcel:
        route, visit = self._route(flow), flow.visit
        if visit < route.lowest:
            return self._pass_through(flow, tensors)
        segment = route.segment(visit)
        if visit == route.lowest:
            inputs, segment = self._above_prefix(route, tensors), route.lowest_in_two[1]
        else:
            inputs = restore(tensors)
        self._meter.add_flops(forward_flops(_shape(route, inputs), segment, len(inputs)))
        key, input_grads = MicrobatchKey(flow.step, flow.microbatch, visit), visit > route.lowest or route.goes_down
        inputs, weak = without_weak(inputs, flow.num_weak)
        by_edge = self._unlabelled.teacher == "edge"
        weak_outputs = None if weak is None else self._stage.infer(segment, weak, as_begun=by_edge)
        if visit == route.last:
            size, spec = flow.batch_size, self._unlabelled
            aim = targets(tensors[LABELS], len(inputs), weak_outputs, spec, size, flow.num_unlabelled)
            weights = aim.weights
            if self._stage.noise is not None:  # examples by themselves, until they are clipped
                size, weights = 1, example_weights(aim.labels, self._stage.noise.rows)
            loss = self._stage.loss(key, segment, inputs, aim.labels, size, weights=weights, input_grads=input_grads)
            if self._stage.noise is not None:
                loss /= flow.batch_size
            flow = at(flow, visit, loss=loss, confident=aim.confident)
            flow = msgspec.structs.replace(flow, squared_norm=0.0, squared_norms=())
            return self._backward(flow, None, inputs)
        outputs = self._stage.forward(key, segment, inputs, input_grads=input_grads)
        if weak_outputs is not None:
            outputs = torch.cat([outputs, weak_outputs])
        return self._parcel(FORWARD, visit + 1, flow, outputs)

    def _pass_through(self, flow: Flow, tensors: Mapping[str, Tensor]) -> Parcel:
        """A visit below the lowest tunable: nothing is kept for a backward pass."""
        outputs = self._infer(self._route(flow), self._route(flow).segment(flow.visit), restore(tensors))
        keys = {name: tensors[name] for name in (KEEP, RECALL) if name in tensors}
        parcel = self._parcel(FORWARD, flow.visit + 1, flow, outputs)
        return parcel._replace(tensors={**parcel.tensors, **keys})

    def _above_prefix(self, route: Route, tensors: Mapping[str, Tensor]) -> Tensor:
        """What enters the lowest tunable block: computed now, or recalled."""
        parts = []
        if TENSOR in tensors:
            parts.append(self._infer(route, route.lowest_in_two[0], restore(tensors)).cpu())
        if KEEP in tensors:
            assert self._cache is not None
            self._cache.keep(tensors[KEEP].tolist(), parts[0][: len(tensors[KEEP])])
        if RECALL in tensors:
            assert self._cache is not None
            parts.append(self._cache.recall(tensors[RECALL].tolist()))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _infer(self, route: Route, segment: Segment, inputs: Tensor) -> Tensor:
        self._meter.add_flops(forward_flops(_shape(route, inputs), segment, len(inputs)))
        return self._stage.infer(segment, inputs)

    def _backward(self, flow: Flow, grads: Tensor | None, inputs: Tensor | None = None) -> Parcel:
        """Take gradients back through a visit, or begin with the loss of these inputs."""
        route = self._route(flow)
        visit, segment = flow.visit, route.segment(flow.visit)
        passed = inputs if grads is None else grads
        assert passed is not None
        self._meter.add_flops(backward_flops(_shape(route, passed), segment, len(passed)))
        input_grads = self._stage.backward(MicrobatchKey(flow.step, flow.microbatch, visit), grads)
        flow = self._with_norm(flow)
        if visit > route.lowest:
            assert input_grads is not None
            return self._parcel(BACKWARD, visit - 1, flow, input_grads)
        return Parcel(RETURNED, 0, at(flow, 0), {})

    def _parcel(self, method: str, visit: int, flow: Flow, tensor: Tensor) -> Parcel:
        """A result for another visit, in fewer bytes where it leaves this node and is to."""
        stays = self._route(flow).node_id(visit) == self._own_id
        wire_type = "float32" if stays else self._wire_types.get(method, "float32")
        return Parcel(method, visit, at(flow, visit), compress(tensor.cpu(), wire_type))

    def _with_norm(self, flow: Flow) -> Flow:
        """The same with the gradient's squared norm at this visit added; where examples are protected, with theirs."""
        if self._stage.noise is None:
            return msgspec.structs.replace(flow, squared_norm=flow.squared_norm + self._norm_when_complete(flow))
        key = MicrobatchKey(flow.step, flow.microbatch, flow.visit)
        own = self._stage.example_norms(key, self._route(flow).segment(flow.visit))
        above = flow.squared_norms or (0.0,) * len(own)
        if len(above) != len(own):
            raise ProtocolError(f"the norms of {len(above)} examples came back for a microbatch of {len(own)}")
        return msgspec.structs.replace(flow, squared_norms=tuple(a + b for a, b in zip(above, own, strict=True)))

    def _norm_when_complete(self, flow: Flow) -> float:
        """The squared norm of a visit's gradients once its last microbatch is back, 0 before."""
        self._backwards[flow.visit] = self._backwards.get(flow.visit, 0) + 1
        if self._backwards[flow.visit] < flow.num_microbatches:
            return 0.0
        segment = self._route(flow).segment(flow.visit)
        self._stage.correct(segment)
        return self._stage.squared_norm(segment)

    def _route(self, flow: Flow, before: int = 0) -> Route:
        """The route of the owner whose turn it is, or was `before`."""
        return self._routes[(flow.turn - before) % len(self._routes)]


def _shape(route: Route, tensor: Tensor) -> ModelShape:
    """The model's shape for inputs or activations of this size, [B, T] or [B, T, D] where they are of text."""
    return route.shape.seeing(tensor.shape[1])


def at(flow: Flow, visit: int, **changes: float) -> Flow:
    """The same microbatch at another visit."""
    return msgspec.structs.replace(flow, visit=visit, **changes)
