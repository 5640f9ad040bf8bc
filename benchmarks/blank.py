"""An untrained foundation model of any size, for benchmarks in which what it has learned does not matter."""

from __future__ import annotations

from pathlib import Path

from transformers import ViTConfig

from ecogen.config import Model
from ecogen.tuning.pretrain import new_model


def save_blank(model: Model, folder: Path) -> Path:
    """Write an untrained model of this architecture where a recipe's `model.source` can point."""
    config = ViTConfig(
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_blocks,
        num_attention_heads=model.num_heads,
        intermediate_size=model.intermediate_size,
        image_size=model.image_size,
        patch_size=model.patch_size,
        num_channels=model.num_channels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    new_model(config, seed=0).save_pretrained(folder)
    return folder
