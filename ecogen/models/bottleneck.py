"""Bottleneck adapters: a small network after a block's MLP, before its residual is added. PEFT has none of this shape.

Houlsby et al. 2019, https://arxiv.org/abs/1902.00751, put one after attention too; Pfeiffer et al. 2021,
https://arxiv.org/abs/2005.00247, found one a block to be as good: h <- h + U relu(V h + v) + u.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import relu


class Bottleneck(nn.Module):
    """Adds U relu(V h + v) + u to h [..., D]; with U and u zero, as it begins, it changes nothing."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, size)
        self.up = nn.Linear(size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        change: Tensor = self.up(relu(self.down(hidden)))
        return hidden + change


def attach_bottleneck(mlp: nn.Module, size: int, hidden_size: int) -> None:
    """Put a bottleneck of that inner size after an MLP, as its module `bottleneck`."""
    like = next(mlp.parameters())
    mlp.add_module("bottleneck", Bottleneck(hidden_size, size).to(like))
    mlp.register_forward_hook(_adapt)


def _adapt(mlp: Any, _: tuple[Any, ...], hidden: Tensor) -> Tensor:
    adapted: Tensor = mlp.bottleneck(hidden)
    return adapted
