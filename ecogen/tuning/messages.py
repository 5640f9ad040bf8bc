"""What nodes say to each other while they tune: the names of methods, and the bodies of messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import msgspec
from torch import Tensor

from ecogen.placement import Placement, Segment, Visit
from ecogen.records import Usage

TUNE, SYNC = "tune", "sync"
FORWARD, BACKWARD, RETURNED, LABELS, FINISH = "forward", "backward", "returned", "labels", "finish"
HAND_OVER = "hand_over"
KEEP, RECALL, KEYS, ROOM = "keep", "recall", "keys", "room"  # what tensors beside the activations are
WANT, HOLD = "want", "hold"  # room for prefix activations, and what there is of both
FLOW_METHODS = frozenset({FORWARD, BACKWARD, RETURNED, LABELS, FINISH, HAND_OVER, WANT, HOLD})


class AttemptKey(msgspec.Struct, frozen=True, order=True):
    """One attempt of one cluster at one round; a later attempt fences off the earlier ones."""

    round_index: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.attempt} of round {self.round_index + 1}"


CONTROL = "control of "
"""Before the names of tensors that are SCAFFOLD's, not tunables."""


class TuneOrder(msgspec.Struct, frozen=True):
    """Edge to each device of a cluster: do your part of the local steps.

    Tensors: the tunables of its segments and, as `CONTROL` and a name, SCAFFOLD's c.

    Attributes:
        addresses: where its neighbours on the route are.
        draw: keys the random numbers of the attempt; None for the round.
        counted: the last attempt of this cluster that is in the edge's tunables; None where none is.
    """

    key: AttemptKey
    addresses: dict[str, str]
    draw: int | None = None
    counted: int | None = None


class Sampled(NamedTuple):
    """How an attempt drew a device's examples.

    Attributes:
        rate: the probability with which each was in a step.
        steps: local steps on examples of this device.
    """

    rate: float
    steps: int


class TuneResult(msgspec.Struct, frozen=True):
    """Device to edge: done.

    Tensors: the tunables after the local steps and, as `CONTROL` and a name, how SCAFFOLD's c_i changed.

    Attributes:
        num_examples: examples that this device owns and tuned on, each counted once; 0 where it owns none.
        loss: mean training loss over the local steps, from the start device.
        confident: mean share of unlabelled examples with a pseudo-label over the local steps; None without any.
        usage: of this device since its last report.
        sampled: where examples are protected, how those of this device were drawn; None where it owns none.
    """

    num_examples: Annotated[int, msgspec.Meta(ge=0)]
    loss: float | None
    usage: Usage
    confident: float | None = None
    sampled: Sampled | None = None


class SyncOrder(msgspec.Struct, frozen=True):
    """Edge to cloud: my aggregate after this round, to be averaged with the other edges'. Tensors: the tunables."""

    round_index: Annotated[int, msgspec.Meta(ge=0)]
    num_examples: Annotated[int, msgspec.Meta(ge=0)]


class SyncResult(msgspec.Struct, frozen=True):
    """Cloud to edge: the average. Tensors: the tunables.

    Attributes:
        counted: False where the update came after its round was closed, and is not in the average.
    """

    round_index: int
    counted: bool


class Flow(msgspec.Struct, frozen=True, omit_defaults=True):
    """One microbatch between two visits, forward or backward.

    Attributes:
        turn: of the owner whose microbatch it is; owners take turns.
        visit: the index of the visit that should run, on the route of that owner.
        batch_size: labels of the whole batch: its labelled examples, or of text the tokens that count.
        num_microbatches: microbatches of the batch.
        squared_norm: forward: of the previous step's gradients over the whole chain; backward: of this step's so far,
            with the batch's last microbatch.
        loss: backward: the microbatch's share of the batch's mean loss; with `hand_over`, the sum over the steps so
            far, and with `finish`, their mean.
        num_weak: the last rows, which only predict: they have no gradient (`tuning.fixmatch`).
        num_unlabelled: unlabelled examples of the whole batch, each of which is a strong and a weak view.
        confident: as `loss`, of the share of unlabelled examples with a pseudo-label.
        squared_norms: as `squared_norm`, where examples are protected: of the gradient of each example, backward of
            the microbatch's, forward of all examples of the previous step. Then `batch_size` is how many examples a
            step has on average.
    """

    key: AttemptKey
    step: int
    turn: int = 0
    microbatch: int = 0
    visit: int = 0
    batch_size: int = 0
    num_microbatches: int = 0
    squared_norm: float = 0.0
    loss: float = 0.0
    num_weak: Annotated[int, msgspec.Meta(ge=0)] = 0
    num_unlabelled: Annotated[int, msgspec.Meta(ge=0)] = 0
    confident: float = 0.0
    squared_norms: tuple[float, ...] = ()


def split_controls(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A message's tunables, and SCAFFOLD's tensors under the names of the tunables that they are for."""
    controls = {name.removeprefix(CONTROL): t for name, t in tensors.items() if name.startswith(CONTROL)}
    return {name: t for name, t in tensors.items() if not name.startswith(CONTROL)}, controls


def with_controls(tunables: Mapping[str, Tensor], controls: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `split_controls` takes apart."""
    return {**tunables, **{CONTROL + name: tensor for name, tensor in controls.items()}}


def placement_table(placement: Placement) -> list[dict[str, Any]]:
    """A placement as plain values."""
    plain: list[dict[str, Any]] = msgspec.to_builtins(list(placement))
    return plain


def placement_from_table(table: list[dict[str, Any]]) -> Placement:
    """The placement that `placement_table` wrote."""
    return Placement(tuple(Visit(row["node_id"], Segment(**row["segment"])) for row in table))
