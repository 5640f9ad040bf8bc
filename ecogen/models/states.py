"""Recurrent and convolution states of many requests at once: each request has a slot, a row of a slab for each state.

A state has no place for each token: a step replaces it. So it must run once only, and what a slot held before must be
forgotten when a request begins there.

Shapes: B rows that run together, T tokens of each, D channels, K how many tokens a convolution looks at.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ecogen.models.rows import Rows

StateName = tuple[str, int, int]
"""What kind of state, of which layer, and which of those that it has."""


class States:
    """Slabs [slots, ...], each made when it is written first: never those of another node's layers."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._slabs: dict[StateName, Tensor] = {}

    def read(self, name: StateName, rows: Rows) -> Tensor | None:
        """The rows' states [B, ...] where they lie, for kernels write into them; None where all rows begin.

        None and not zeros: transformers has other kernels for a prompt's first tokens, and these should always run,
        not only until a slab was made.
        """
        slab = self._slabs.get(name)
        return None if slab is None or rows.begin == 0 else slab[rows.part]

    def write(self, name: StateName, rows: Rows, states: Tensor) -> Tensor:
        """The rows' states become these [B, ...]; returns where they lie."""
        if name not in self._slabs:
            self._slabs[name] = states.new_zeros(self._num_slots, *states.shape[1:])
        return self._slabs[name][rows.part].copy_(states)

    def append(self, name: StateName, rows: Rows, inputs: Tensor, size: int) -> Tensor:
        """More inputs [B, D, T] of a convolution, of which the last K = `size` are kept.

        Returns:
            All that it looks at: what was kept, or zeros where a prompt's first chunk is shorter than K, and these.
        """
        before = self.read(name, rows)
        if before is None:
            inputs = functional.pad(inputs, (max(size - inputs.shape[-1], 0), 0))
        else:
            inputs = torch.cat([before, inputs], dim=-1)
        self.write(name, rows, inputs[..., -size:])
        return inputs

    def begin(self, rows: Rows) -> None:
        """What the slots of rows that begin held before is forgotten."""
        for slab in self._slabs.values() if rows.fresh else ():
            slab[rows.fresh] = 0

    def move(self, source: int, target: int) -> None:
        """A request goes to another slot."""
        for slab in self._slabs.values():
            slab[target] = slab[source]

    @property
    def nbytes(self) -> int:
        """Of all slabs."""
        return sum(slab.nbytes for slab in self._slabs.values())
