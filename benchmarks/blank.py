"""An untrained foundation model of any size, for benchmarks in which what it has learned does not matter."""

from __future__ import annotations

from pathlib import Path

from ecogen.config import Model
from ecogen.tuning.making import vit_config
from ecogen.tuning.pretrain import new_model


def save_blank(model: Model, folder: Path) -> Path:
    """Write an untrained model of this architecture where a recipe's `model.source` can point."""
    new_model(vit_config(model), seed=0).save_pretrained(folder)
    return folder
