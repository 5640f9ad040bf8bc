"""Visual prompts (VPT): learned tokens after CLS, deep or shallow. PEFT has none.

Jia et al. 2022, section 3.2: https://arxiv.org/abs/2203.12119. Deep: each block has prompts of its own and drops the
outputs at their places, so they never cross a cut. Shallow: they enter before one block and go on through all above it,
so they cross the cuts there.

Shapes: B batch, T tokens with CLS, P prompts, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def attach_prompts(block: nn.Module, num_prompts: int, hidden_size: int, *, stay: bool = False) -> None:
    """Give a block `num_prompts` prompts of its own, as its parameter `prompts` [P, D].

    A hook inserts them after CLS before the block runs, and another one cuts them out of its output unless they stay:
    so the block and whoever calls it stay as they are.
    """
    like = next(block.parameters())
    prompts = torch.zeros(num_prompts, hidden_size, dtype=like.dtype, device=like.device)
    block.register_parameter("prompts", nn.Parameter(prompts))
    block.register_forward_pre_hook(_insert)
    if not stay:
        block.register_forward_hook(_drop)


def without_prompts(hidden: Tensor, num_tokens: int) -> Tensor:
    """CLS and the patches [B, T, D] of activations that shallow prompts may be among."""
    return torch.cat([hidden[:, :1], hidden[:, hidden.shape[1] - num_tokens + 1 :]], dim=1)


def _insert(block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, *rest = args
    prompts = block.prompts.expand(hidden.shape[0], -1, -1)
    return (torch.cat([hidden[:, :1], prompts, hidden[:, 1:]], dim=1), *rest)


def _drop(block: Any, _: tuple[Any, ...], hidden: Tensor) -> Tensor:
    return without_prompts(hidden, hidden.shape[1] - block.prompts.shape[0])
