"""Deep visual prompts (VPT-deep): learned tokens that each block sees and drops again.

Jia et al. 2022, section 3.2: https://arxiv.org/abs/2203.12119. Since the outputs at the prompts' places are
dropped, prompts never cross a cut.

Shapes: B batch, T tokens with CLS, P prompts, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def attach_prompts(block: nn.Module, num_prompts: int, hidden_size: int) -> None:
    """Give a block `num_prompts` prompts of its own, as its parameter `prompts` [P, D].

    Hooks insert them after CLS before the block runs and cut them out of its output, so the block and whoever calls
    it stay as they are.
    """
    like = next(block.parameters())
    prompts = torch.zeros(num_prompts, hidden_size, dtype=like.dtype, device=like.device)
    block.register_parameter("prompts", nn.Parameter(prompts))
    block.register_forward_pre_hook(_insert)
    block.register_forward_hook(_drop)


def _insert(block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, *rest = args
    prompts = block.prompts.expand(hidden.shape[0], -1, -1)
    return (torch.cat([hidden[:, :1], prompts, hidden[:, 1:]], dim=1), *rest)


def _drop(block: Any, _: tuple[Any, ...], hidden: Tensor) -> Tensor:
    return torch.cat([hidden[:, :1], hidden[:, 1 + block.prompts.shape[0] :]], dim=1)
