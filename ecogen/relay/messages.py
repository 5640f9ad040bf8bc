"""What an edge and the cloud say to each other in the knowledge relay: samples, and beside them counts only."""

from __future__ import annotations

from typing import Annotated

import msgspec

from ecogen.relay.samples import Captions

RELAY = "relay"

Number = Annotated[int, msgspec.Meta(ge=0)]


class Offer(msgspec.Struct, frozen=True):
    """Edge to cloud: what I can draw. Tensors: the samples.

    Attributes:
        num_drawn: pictures that were drawn for it.
    """

    cycle: Number
    captions: Captions
    num_drawn: Number


class Answer(msgspec.Struct, frozen=True):
    """Cloud to edge: what the cloud can draw by now. Tensors: the samples.

    Attributes:
        cycle: of the cloud's last lesson; a later one than was asked for where that closed without this edge.
        version: of the cloud's model.
    """

    cycle: int
    captions: Captions
    num_drawn: Number
    version: Number
