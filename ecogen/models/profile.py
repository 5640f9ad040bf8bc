"""The sizes of a model that planning and metering need, read off its configuration. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ecogen.config import Tunables as TunablesSpec
from ecogen.planning.cost import ModelShape

if TYPE_CHECKING:
    from transformers import ViTConfig


def model_shape(config: ViTConfig, spec: TunablesSpec, tokens: Literal["needed", "all"] = "needed") -> ModelShape:
    """The shape of a vision transformer with its tunables.

    Args:
        tokens: that the last block computes for a head.
    """
    patches = (config.image_size // config.patch_size) ** 2
    return ModelShape(
        num_blocks=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_tokens=patches + 1,
        patch_dim=config.num_channels * config.patch_size**2,
        num_labels=config.num_labels,
        tuned=tuple(spec.of_block(index) for index in range(config.num_hidden_layers)),
        prompts_stay=spec.prompt_depth == "shallow",
        head_trains=spec.head,
        norm=spec.backbone,
        all_tokens=tokens == "all",
    )
