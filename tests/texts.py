"""Tiny language models to test with: decoders of some thousand weights with a tokenizer, text, and a recipe of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ecogen import config as recipes
from ecogen.tuning.documentation import cloud_topics
from ecogen.tuning.vocabulary import train_tokenizer
from tests.models.decoders import save_decoder

VOCABULARY, LENGTH, NUM_BLOCKS = 320, 12, 3
SMALL = {"num_hidden_layers": NUM_BLOCKS, "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48}

OF_KIND = {"qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}}


def save_text_foundation(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """A random decoder of three blocks and a tokenizer, as `save_pretrained` leaves them."""
    save_decoder(kind, folder, **SMALL | OF_KIND.get(kind, {}) | changes)
    train_tokenizer(cloud_topics()[-20:], VOCABULARY).save_pretrained(folder)
    return folder


def write_text(folder: Path, num_words: int = 700) -> Path:
    """A file of some text."""
    words = " ".join(cloud_topics()[-1:] + cloud_topics()[5:6]).split()
    (folder / "own.txt").write_text(" ".join(words[:num_words]))
    return folder / "own.txt"


def text_recipe(foundation: Path, path: Path, **sections: Mapping[str, Any] | int) -> recipes.Recipe:
    """One edge, two clusters of two devices, two rounds; `sections` change single values: `tuning={"rounds": 1}`."""
    table: dict[str, Any] = {
        "name": "tiny-text",
        "seed": 3,
        "model": {"source": str(foundation), "context_length": LENGTH},
        "data": {
            "name": "text",
            "path": str(path),
            "train": 24,
            "validation": 6,
            "test": 8,
            "partition": {"across_edges": "iid"},
        },
        "topology": {"edges": 1, "clusters_per_edge": 2, "devices_per_cluster": 2},
        "tunables": {"prompts": 0, "head": False, "lora_rank": 2, "lora_targets": ["attention", "mlp"]},
        "tuning": {
            "rounds": 2,
            "local_epochs": 1,
            "batch_size": 6,
            "microbatches": 2,
            "learning_rate": 1e-2,
            "learning_rate_decay": 1.0,
            "augmentation": 0.0,
        },
        "evaluation": {"requests": 2},
    }
    for name, section in sections.items():
        table[name] = table.get(name, {}) | section if isinstance(section, Mapping) else section
    return recipes.from_table(table)
