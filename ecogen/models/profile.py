"""The sizes of a model that planning and metering need, read off its configuration. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ecogen.config import Tunables as TunablesSpec
from ecogen.planning.cost import ModelShape

if TYPE_CHECKING:
    from transformers import ViTConfig

_BYTES = {"float32": 4, "bfloat16": 2}


def model_shape(config: ViTConfig, spec: TunablesSpec, dtype: str = "float32") -> ModelShape:
    """The shape of a vision transformer with its tunables."""
    patches = (config.image_size // config.patch_size) ** 2
    return ModelShape(
        num_blocks=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_tokens=patches + 1,
        patch_dim=config.num_channels * config.patch_size**2,
        num_labels=config.num_labels,
        prompts_per_block=spec.prompts,
        lora_rank=spec.lora_rank,
        num_lora_targets=len(spec.lora_targets),
        first_tunable_block=spec.first_block,
        head_trains=spec.head,
        backbone=spec.backbone,
        bytes_per_parameter=_BYTES[dtype],
    )
