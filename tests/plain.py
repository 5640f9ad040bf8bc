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
    """A whole vision transformer with prompts, adapters and parameters of its own that train, frozen but for those.

    Args:
        lora_alpha: what LoRA is scaled by, over its rank, or over the root of it with `root_of_rank` (rsLoRA).
        prompts_stay: prompts go on through the blocks above.
    """

    def __init__(
        self,
        whole: ViTForImageClassification,
        tunables: Mapping[str, Tensor],
        *,
        lora_alpha: float = 1.0,
        root_of_rank: bool = False,
        prompts_stay: bool = False,
    ) -> None:
        self.whole = whole.requires_grad_(False)
        self.tunables = {name: tensor.detach().clone().requires_grad_() for name, tensor in tunables.items()}
        self._alpha, self._root_of_rank, self._prompts_stay = lora_alpha, root_of_rank, prompts_stay
        for name in tunables.keys() & dict(whole.named_parameters()).keys():
            module, _, own = name.rpartition(".")
            self.tunables[name] = torch.nn.Parameter(self.tunables[name].detach())
            setattr(whole.get_submodule(module), own, self.tunables[name])
        for name in tunables:
            if name.endswith(".lora_A.weight"):
                self._add_lora(name.removesuffix(".lora_A.weight"))
            if name.endswith(".ia3_l"):
                self._add_factors(name.removesuffix(".ia3_l"))
            if name.endswith(".bottleneck.up.weight"):
                self._add_bottleneck(name.removesuffix(".bottleneck.up.weight"))

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
        if self._prompts_stay:
            return longer
        return torch.cat([longer[:, :1], longer[:, 1 + len(prompts) :]], dim=1)

    def _add_lora(self, name: str) -> None:
        """y = (W + s B A) x + b; with DoRA m (W + s B A) / |W + s B A| by rows, the norms taken as constants."""
        a, b = self.tunables[f"{name}.lora_A.weight"], self.tunables[f"{name}.lora_B.weight"]
        magnitudes = self.tunables.get(f"{name}.lora_magnitude_vector.weight")
        scale = self._alpha / (len(a) ** 0.5 if self._root_of_rank else len(a))

        def replace(module: torch.nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
            if magnitudes is None:
                return out + args[0] @ a.T @ b.T * scale
            weight = module.weight + scale * b @ a
            norms = weight.square().sum(1, keepdim=True).sqrt().detach()
            return args[0] @ (magnitudes[:, None] * weight / norms).T + module.bias

        self.whole.get_submodule(name).register_forward_hook(replace)

    def _add_factors(self, name: str) -> None:
        """IA3: factors on what enters the MLP's second product, and on what keys and values are."""
        factors, module = self.tunables[f"{name}.ia3_l"], self.whole.get_submodule(name)
        if name.endswith("fc2"):
            module.register_forward_pre_hook(lambda _, args: (args[0] * factors.reshape(-1),))
        else:
            module.register_forward_hook(lambda _, __, out: out * factors.reshape(-1))

    def _add_bottleneck(self, name: str) -> None:
        down, v, up, u = (
            self.tunables[f"{name}.bottleneck.{part}"] for part in ("down.weight", "down.bias", "up.weight", "up.bias")
        )
        hook = lambda _, __, h: h + (h @ down.T + v).clamp(min=0) @ up.T + u  # noqa: E731
        self.whole.get_submodule(name).register_forward_hook(hook)


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
