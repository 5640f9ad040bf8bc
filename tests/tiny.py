"""Tiny things to test with: a foundation model of a few thousand weights, a recipe for it, a network that records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from ecogen import config as recipes
from ecogen.transport.base import Message, Peer
from ecogen.transport.codec import encode
from ecogen.transport.memory import MemoryNetwork, MemoryTransport

IMAGE, PATCH, HIDDEN = 8, 4, 16


def tiny_config(num_blocks: int = 3, *, image_size: int = IMAGE, num_labels: int = 10) -> ViTConfig:
    """A vision transformer of `num_blocks` blocks of width 16 on patches of 4 x 4."""
    return ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=num_blocks,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=image_size,
        patch_size=PATCH,
        num_channels=1,
        num_labels=num_labels,
    )


@torch.no_grad()
def tiny_vit(config: ViTConfig, seed: int = 0) -> ViTForImageClassification:
    """The model with weights large enough for every block to matter."""
    model = ViTForImageClassification(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.1 * noise if "layernorm" in name and name.endswith("weight") else 0.25 * noise)
    return model


def save_foundation(folder: Path, num_blocks: int = 3, *, seed: int = 0, **settings: Any) -> Path:
    """A backbone without a head, as a pre-training would leave it."""
    backbone: ViTModel = tiny_vit(tiny_config(num_blocks), seed).vit
    backbone.save_pretrained(folder, **settings)
    return folder


def tiny_recipe(foundation: Path, **sections: Mapping[str, Any] | int) -> recipes.Recipe:
    """One edge, two clusters of two devices, two rounds; `sections` change single values: `tuning={"rounds": 1}`."""
    table: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "model": {
            "source": str(foundation),
            "hidden_size": HIDDEN,
            "num_blocks": 3,
            "num_heads": 2,
            "intermediate_size": 24,
            "image_size": IMAGE,
            "patch_size": PATCH,
        },
        "data": {"train": 48, "validation": 20},
        "topology": {"edges": 1, "clusters_per_edge": 2, "devices_per_cluster": 2},
        "tunables": {"prompts": 2, "lora_rank": 2, "lora_alpha": 16.0},
        "tuning": {
            "rounds": 2,
            "local_epochs": 1,
            "batch_size": 8,
            "microbatches": 2,
            "learning_rate": 1e-2,
            "learning_rate_decay": 1.0,
            "augmentation": 0.0,
        },
        "evaluation": {"split": "validation", "requests": 2},
    }
    for name, section in sections.items():
        table[name] = table.get(name, {}) | section if isinstance(section, Mapping) else section
    return recipes.from_table(table)


@dataclass(frozen=True)
class Sent:
    """One message as it left a node."""

    sender_id: str
    receiver_id: str
    message: Message
    payload_bytes: int
    header_bytes: int

    @property
    def method(self) -> str:
        return self.message.method

    @property
    def data(self) -> bytes:
        """All that a listener on the link would see."""
        return encode(self.message, self.sender_id).data


class RecordingNetwork(MemoryNetwork):
    """Keeps every message of every link."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.sent: list[Sent] = []

    def join(self, peer: Peer) -> MemoryTransport:
        return _RecordingTransport(self, peer)

    def links(self, method: str) -> set[tuple[str, str]]:
        """Who sent a message of this method to whom."""
        return {(sent.sender_id, sent.receiver_id) for sent in self.sent if sent.method == method}


class _RecordingTransport(MemoryTransport):
    def pack(self, message: Message, receiver_id: str) -> Any:
        copy = Message(message.method, message.kind, message.body, _copies(message.tensors), message.counted)
        frame = encode(copy, self.peer.node_id)
        assert isinstance(self._network, RecordingNetwork)
        sent = Sent(self.peer.node_id, receiver_id, copy, frame.payload_bytes, frame.header_bytes)
        assert len(frame.data) == frame.payload_bytes + frame.header_bytes
        self._network.sent.append(sent)
        return super().pack(message, receiver_id)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
