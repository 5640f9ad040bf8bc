"""What an owner of examples knows of the prefix activations that another device keeps for it.

The blocks below the lowest tunable give the same activations in every epoch, as long as an example enters them as the
same image. So they are computed and sent once; afterwards a key recalls them on the device with the lowest tunable.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ecogen.config import Tuning, Wire
from ecogen.planning.cost import ModelShape
from ecogen.tuning.passages import Batch


def why_not_kept(tuning: Tuning, wire: Wire, shape: ModelShape) -> str | None:
    """Why no prefix can be kept, and what would have to change; None where one can."""
    if not tuning.prefix_memory_mib and not tuning.prefix_disk_mib:
        return "tuning.prefix_memory_mib and prefix_disk_mib leave no room"
    if not shape.lowest_tunable_block:
        return "block 0 is tuned, so nothing below is frozen; raise tunables.first_block"
    if tuning.unlabelled.method != "ignore":
        return "FixMatch draws new views in every epoch; set tuning.unlabelled.method to 'ignore'"
    if tuning.augmentation and not tuning.augmentation_views:
        return "augmentation draws new images in every epoch; set tuning.augmentation_views to have them come again"
    if wire.tokens == "all" or wire.gradients_to == "start":
        return "wire.tokens or wire.gradients_to is as in plain split learning"
    return None


class Divided(NamedTuple):
    """A microbatch in the order in which it travels: examples that must be sent, then those to be recalled.

    Attributes:
        fresh: how many must be sent.
        kept: keys of the first of them, which are to be kept.
        recalled: keys of the others.
    """

    examples: Batch
    fresh: int
    kept: Tensor
    recalled: Tensor


class KnownPrefixes:
    """Which examples' activations can be recalled, and for how many more there is room.

    Args:
        held: keys [N] that the holder has.
        room: rows that it has reserved, those it holds already included.
        own: keys of this owner's examples.
    """

    def __init__(self, held: Tensor, room: int, own: Tensor) -> None:
        self._held = set(held.tolist()) & set(own.tolist())
        self._room = room

    def divide(self, part: Batch) -> Divided:
        """A microbatch as it should be sent; what is to be kept counts as held from now on."""
        assert part.keys is not None
        keys = part.keys.tolist()
        fresh = [index for index, key in enumerate(keys) if key not in self._held]
        old = [index for index, key in enumerate(keys) if key in self._held]
        kept = [keys[index] for index in fresh][: max(0, self._room - len(self._held))]
        self._held.update(kept)
        recalled = [keys[index] for index in old]
        examples = part[[*fresh, *old]] if fresh and old else part
        return Divided(examples, len(fresh), _keys(kept), _keys(recalled))


def _keys(keys: list[int]) -> Tensor:
    return torch.tensor(keys, dtype=torch.int64)
