"""What an edge and the stages of a chain tell each other about a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from ecogen.serving.sampling import Chosen, Sampling
from ecogen.serving.scheduler import Step
from ecogen.transport.base import Message

STEP, CHOSEN, LOST = "step", "chosen", "lost"


@dataclass(frozen=True)
class Start:
    """How a request's tokens are chosen, and those that were before."""

    sampling: Sampling
    given: tuple[int, ...] = ()


@dataclass(frozen=True)
class Order:
    """One step, with what the last stage needs to choose tokens.

    Attributes:
        adapters: which one each row has; empty for none.
        starts: requests whose settings the last stage has not been told yet.
        ended: those that it may forget.
    """

    step: Step
    adapters: tuple[str, ...] = ()
    starts: Mapping[str, Start] = field(default_factory=dict)
    ended: tuple[str, ...] = ()


def size_of(message: Message) -> int:
    """Bytes of its body and tensors; a header of some ten bytes comes to them."""
    return len(message.body) + sum(tensor.nbytes for tensor in message.tensors.values())


class Visited(msgspec.Struct, frozen=True):
    """What one visit of a step took: seconds of computing, and bytes that brought its input."""

    compute_s: float
    received_bytes: int


class StepFlow(msgspec.Struct, frozen=True):
    """A step between two visits.

    Attributes:
        chain: which of a cluster's chains, one after the other: a step of an earlier one is nobody's any more.
        visits: those that were, in order.
    """

    chain: int
    order: Order
    visits: list[Visited] = msgspec.field(default_factory=list)


class StepResult(msgspec.Struct, frozen=True):
    """A step that is through: the token of each row that has one, or why not; where all failed, why, for every row."""

    chain: int
    group: int
    chosen: list[Chosen | str]
    visits: list[Visited]


class Lost(msgspec.Struct, frozen=True):
    """A device of a chain to its edge: I cannot reach this one any more."""

    chain: int
    node_id: str
    reason: str
