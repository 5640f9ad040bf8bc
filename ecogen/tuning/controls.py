"""A device's memory of SCAFFOLD: its part of its cluster's control variate c_i, on its disk.

Karimireddy et al. 2020, Algorithm 1: https://arxiv.org/abs/1910.06378. Local steps use g - c_i + c, and the new c_i is
the mean of the gradients g of the loss over the local steps. For plain SGD that is the paper's option II, c_i - c +
(x - y) / (K rate), which with another optimizer, or with clipping, would be no mean of gradients. The paper knows
neither: here the correction comes first, then clipping, then the optimizer. They are kept by
attempt, see `AttemptMemory`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ecogen.errors import ProtocolError
from ecogen.models.tunables import Tunables
from ecogen.tuning.attempt_memory import AttemptMemory


class Controls:
    """The control variates that one device holds, by the attempt that each came of.

    Args:
        path: of the file that they are in.
    """

    def __init__(self, path: Path) -> None:
        self._memory = AttemptMemory(path)
        self._own: Tunables = {}  # c_i

    def begin(self, counted: int | None, control: Mapping[str, Tensor], tunables: Mapping[str, Tensor]) -> Tunables:
        """What is to be added to the gradients of an attempt: c - c_i.

        Args:
            counted: this cluster's attempt that was counted last; None where none was, and c_i is zero.
            control: c; nothing where it is still zero.
            tunables: all that this device holds.

        Raises:
            ProtocolError: if what that attempt left is not here.
        """
        zeros = {name: torch.zeros_like(tensor) for name, tensor in tunables.items()}
        left = self._memory.begin(counted)
        if counted is not None and left is None:
            raise ProtocolError(
                f"{self._memory.path} does not have the control variate of attempt {counted}, which its edge has "
                f"counted, but those of {self._memory.attempts}; restore this device's folder, or start the run anew"
            )
        self._own = zeros if left is None else left
        return {name: control.get(name, zeros[name]) - own for name, own in self._own.items()}

    def end(self, attempt: int, gradient_sums: Mapping[str, Tensor], num_steps: int) -> Tunables:
        """How this attempt changes c_i; written down beside what it began with, for the edge to choose."""
        new = {name: gradient_sums[name] / num_steps if num_steps else own.clone() for name, own in self._own.items()}
        self._memory.end(attempt, new)
        return {name: new[name] - own for name, own in self._own.items()}
