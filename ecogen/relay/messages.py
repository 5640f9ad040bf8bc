"""What an edge and the cloud say to each other in the knowledge relay: samples and scores, and beside them counts only.

An edge sends an `Offer`, is given a `Review` of what others offered, returns its `Verdict`, and is given an `Answer`.
Where the recipe asks for its tunables as well, they go first, as `Tuned`.
"""

from __future__ import annotations

import msgspec

from ecogen.records import Cause
from ecogen.relay.samples import Captions, Number

RELAY, VERDICT, TUNED = "relay", "relay_verdict", "relay_tunables"
CONFIDENCE = "confidence"


class Tuned(msgspec.Struct, frozen=True):
    """Edge to cloud: what I have tuned, of the exchange for which I offer next. Tensors: the tunables.

    The answer is empty: it is here.
    """

    cycle: Number
    cause: Cause = "schedule"


class Offer(msgspec.Struct, frozen=True):
    """Edge to cloud: what I can draw. Tensors: the samples.

    Attributes:
        cycle: of the schedule; where the edge's domain has drifted, the round after which it comes.
        num_drawn: pictures that were drawn for it.
    """

    cycle: Number
    captions: Captions
    num_drawn: Number
    cause: Cause = "schedule"


class Review(msgspec.Struct, frozen=True):
    """Cloud to edge: what others offered of captions that you know too. Tensors: the samples, N of them."""

    cycle: int
    captions: Captions


class Verdict(msgspec.Struct, frozen=True):
    """Edge to cloud: how likely I hold these captions to be right. Tensors: `CONFIDENCE` [N], of 0 to 1."""

    cycle: Number
    cause: Cause = "schedule"


class Answer(msgspec.Struct, frozen=True):
    """Cloud to edge: what the cloud can draw by now. Tensors: the samples.

    Attributes:
        cycle: of the cloud's last lesson, in the order in which it closed them; a later one than was asked for where
            that closed without this edge.
        is_closed: whether the exchange that was asked for is; or else the cloud was lost meanwhile, and is to be
            offered the lesson again.
        version: of the cloud's model.
    """

    cycle: int
    captions: Captions
    num_drawn: Number
    version: Number
    is_closed: bool = True
