"""Tiny text-image generators to test with: random decoders with both tokenizers, and a recipe of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ecogen import config as recipes
from ecogen.models.image_tokenizer import ImageTokenizer, ImageTokens, save_image_tokenizer
from ecogen.tuning.captions import digit_caption
from ecogen.tuning.vocabulary import train_tokenizer
from tests.models.decoders import save_decoder

SIZES = ImageTokens(image_size=8, patch_size=4, codebook_size=11, hidden_size=8)
LENGTH = 24


def save_pair_foundation(folder: Path) -> Path:
    """A random Llama of three blocks, a tokenizer of captions of digits, and one of images of 8 x 8 in 4 codes."""
    tokenizer = train_tokenizer([digit_caption(digit) for digit in range(10)], 320, SIZES.codebook_size)
    sizes = {"num_hidden_layers": 3, "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48}
    save_decoder("llama", folder, **sizes)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    save_image_tokenizer(ImageTokenizer(SIZES), folder)
    return folder


def pair_recipe(foundation: Path, **sections: Mapping[str, Any] | int) -> recipes.Recipe:
    """Two edges with five digits each, a cluster of two devices, one round; `sections` change single values."""
    table: dict[str, Any] = {
        "name": "tiny-pairs",
        "seed": 3,
        "model": {
            "source": str(foundation),
            "image_size": SIZES.image_size,
            "patch_size": SIZES.patch_size,
            "codebook_size": SIZES.codebook_size,
            "context_length": LENGTH,
        },
        "data": {
            "name": "pairs",
            "train": 24,
            "validation": 6,
            "test": 20,
            "sources": {
                "edge-0": {"name": "digits", "labels": [0, 1, 2, 3, 4]},
                "edge-1": {"name": "digits", "labels": [5, 6, 7, 8, 9]},
            },
            "partition": {"across_edges": "iid"},
        },
        "topology": {"edges": 2, "clusters_per_edge": 1, "devices_per_cluster": 2},
        "tunables": {"prompts": 0, "head": False, "lora_rank": 2, "lora_targets": ["attention", "mlp"]},
        "tuning": {
            "rounds": 1,
            "local_epochs": 1,
            "batch_size": 8,
            "microbatches": 2,
            "learning_rate": 1e-2,
            "augmentation": 0.0,
            "cloud_every": 0,
        },
        "evaluation": {"requests": 1, "drawings": 20},
    }
    for name, section in sections.items():
        table[name] = {**table.get(name, {}), **section} if isinstance(section, Mapping) else section
    return recipes.from_table(table)


def make_sure(patch: pytest.MonkeyPatch) -> None:
    """Random models are sure of nothing; let them hand on everything."""
    patch.setattr("ecogen.relay.teacher.kept_places", lambda asked, *_: list(range(len(asked))))


def rehearse_little(patch: pytest.MonkeyPatch) -> None:
    """What was known before takes most of the time otherwise."""
    for role in ("cloud_learner", "edge"):
        patch.setattr(f"ecogen.relay.{role}._REHEARSED", 30)
