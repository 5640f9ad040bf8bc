"""A device's memory of SCAFFOLD: its part of its cluster's control variate c_i, on its disk.

Karimireddy et al. 2020, Algorithm 1: https://arxiv.org/abs/1910.06378. Local steps use g - c_i + c, and the new c_i is
the mean of the gradients g of the loss over the local steps. For plain SGD that is the paper's option II, c_i - c +
(x - y) / (K rate), which with another optimizer, or with clipping, would be no mean of gradients. The paper knows
neither: here the correction comes first, then clipping, then the optimizer.

What an attempt leaves counts only once the edge has counted the attempt, and each order says which was counted last. So
both are kept, the c_i that the attempt began with and the one it ended with, until the next order says which it goes
on with. A device that is killed at any moment comes back with both or with the first, as its edge does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ecogen.errors import ProtocolError
from ecogen.models.checkpoint import load_metadata, load_tensors, save_tensors
from ecogen.models.tunables import Tunables

_KEEPS = "attempts"


class Controls:
    """The control variates that one device holds, by the attempt that each came of.

    Args:
        path: of the file that they are in.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counted: int | None = None
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
        self._counted, self._own = counted, zeros if counted is None else self._load(counted)
        return {name: control.get(name, zeros[name]) - own for name, own in self._own.items()}

    def end(self, attempt: int, gradient_sums: Mapping[str, Tensor], num_steps: int) -> Tunables:
        """How this attempt changes c_i; written down beside what it began with, for the edge to choose."""
        new = {name: gradient_sums[name] / num_steps if num_steps else own.clone() for name, own in self._own.items()}
        kept = {attempt: new} if self._counted is None else {self._counted: self._own, attempt: new}
        tensors = {f"{number} {name}": tensor for number, part in kept.items() for name, tensor in part.items()}
        save_tensors(self._path, tensors, {_KEEPS: json.dumps(list(kept))})
        return {name: new[name] - own for name, own in self._own.items()}

    def _load(self, counted: int) -> Tunables:
        kept = json.loads(load_metadata(self._path)[_KEEPS]) if self._path.exists() else []
        if counted not in kept:
            raise ProtocolError(
                f"{self._path} does not have the control variate of attempt {counted}, which its edge has counted, but "
                f"those of {kept}; restore this device's folder, or start the run anew"
            )
        prefix = f"{counted} "
        tensors = load_tensors(self._path)
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
