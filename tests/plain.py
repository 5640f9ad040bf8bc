"""The truth that chains are compared with: the whole model and its fine-tuning, as a textbook writes them.

Nothing of EcoGen is used here but the names of the tunables: no segments, no PEFT, no hooks on blocks, no stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import ViTForImageClassification


class PlainModel:
    """A whole vision transformer with deep prompts, LoRA and parameters of its own that train, frozen but for those.

    Args:
        lora_scale: alpha / rank.
    """

    def __init__(
        self, whole: ViTForImageClassification, tunables: Mapping[str, Tensor], *, lora_scale: float = 1.0
    ) -> None:
        self.whole = whole.requires_grad_(False)
        self.tunables = {name: tensor.detach().clone().requires_grad_() for name, tensor in tunables.items()}
        self._scale = lora_scale
        for name in tunables.keys() & dict(whole.named_parameters()).keys():
            module, _, own = name.rpartition(".")
            self.tunables[name] = torch.nn.Parameter(self.tunables[name].detach())
            setattr(whole.get_submodule(module), own, self.tunables[name])
        for name in tunables:
            if name.endswith("lora_A.weight"):
                self._add_lora(name.removesuffix(".lora_A.weight"))

    def logits(self, images: Tensor) -> Tensor:
        vit = self.whole.vit
        hidden = vit.embeddings(images)
        for index, layer in enumerate(vit.layers):
            hidden = self._block(index, layer, hidden)
        logits: Tensor = self.whole.classifier(vit.layernorm(hidden)[:, 0])
        return logits

    def _block(self, index: int, layer: torch.nn.Module, hidden: Tensor) -> Tensor:
        prompts = self.tunables.get(f"vit.layers.{index}.prompts")
        if prompts is None:
            return layer(hidden)
        many = prompts.expand(len(hidden), *prompts.shape)
        longer = layer(torch.cat([hidden[:, :1], many, hidden[:, 1:]], dim=1))
        return torch.cat([longer[:, :1], longer[:, 1 + len(prompts) :]], dim=1)

    def _add_lora(self, name: str) -> None:
        a, b = self.tunables[f"{name}.lora_A.weight"], self.tunables[f"{name}.lora_B.weight"]
        module = self.whole.get_submodule(name)
        module.register_forward_hook(lambda _, args, out: out + args[0] @ a.T @ b.T * self._scale)


def supervised(model: PlainModel, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of images and labels."""
    images, labels = batch
    return cross_entropy(model.logits(images).float(), labels)


def fine_tune(
    model: PlainModel,
    batches: Iterable[Any],
    *,
    objective: Callable[[PlainModel, Any], Tensor] = supervised,
    learning_rate: float,
    weight_decay: float,
    clip_norm: float,
    proximal: float = 0.0,
    epsilon: float = 1e-8,
) -> list[float]:
    """AdamW on whole batches, with FedProx's term in what it descends; returns the loss of each step without it."""
    parameters = list(model.tunables.values())
    begun = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, eps=epsilon)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = objective(model, batch)
        away = sum(((p - b) ** 2).sum() for p, b in zip(parameters, begun, strict=True))
        (loss + proximal / 2 * away).backward()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses
