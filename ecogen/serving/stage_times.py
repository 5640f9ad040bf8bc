"""How long the stages of a chain take, measured before it answers anyone: steps as decoding has them, of no request."""

from __future__ import annotations

from collections import defaultdict
from statistics import median

from ecogen.serving.chain import ServedChain
from ecogen.serving.scheduler import Step
from ecogen.serving.steps import Order

_STEPS = 4
"""The first of them warms up."""


async def stage_times(chain: ServedChain, slots: int) -> dict[str, float]:
    """Seconds that each device of a chain computes in a step that decodes as many requests as a group has slots.

    What the stages keep of these steps is written over by the first request in each slot.

    Raises:
        NodeLostError: if a device is lost meanwhile.
    """
    steps = [Step(0, (), 0, ((0,),) * slots, (index,) * slots, ("",) * slots, gives=0) for index in range(_STEPS)]
    seen = [await chain.visits_of(Order(step)) for step in steps]
    times: dict[str, float] = defaultdict(float)
    for index, visit in enumerate(chain.placement):
        times[visit.node_id] += median(visits[index].compute_s for visits in seen[1:])
    return dict(times)
