"""Tunables: what trains and travels: prompts, LoRA, the head and, where asked for, the backbone or its biases.

Names are the whole model's parameter names, without what PEFT puts between: `vit.layers.2.prompts`,
`vit.layers.2.attention.q_proj.lora_A.weight`, `vit.layers.2.attention.q_proj.bias`, `classifier.bias`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from ecogen.config import Tunables as TunablesSpec
from ecogen.errors import CheckpointError
from ecogen.models.prompts import attach_prompts
from ecogen.models.vit import SegmentedViT
from ecogen.placement import Segment

Tunables = dict[str, Tensor]
"""Name -> tensor of everything that trains and travels."""

_PROMPT_DEVIATION = 0.12  # about the uniform draw of VPT's code for our sizes; chosen on validation digits

_BELOW, _ABOVE = -1, float("inf")
_BLOCK = re.compile(r"vit\.layers\.(\d+)\.")


def attach_tunables(model: SegmentedViT, spec: TunablesSpec) -> None:
    """Add the prompts and LoRA of the held blocks, and let them and the head train."""
    config = model.whole.config
    tuned = [i for segment in model.segments for i in segment.blocks if i >= spec.first_block]
    if spec.prompts:
        for index in tuned:
            attach_prompts(model.whole.vit.layers[index], spec.prompts, config.hidden_size)
    if spec.lora_rank and tuned:
        inject_adapter_in_model(lora_config(spec, tuned), model.whole)
    for name, parameter in model.whole.named_parameters():
        parameter.requires_grad_(is_tunable(name, spec))


def lora_config(spec: TunablesSpec, blocks: Sequence[int], **settings: object) -> LoraConfig:
    """PEFT's configuration of LoRA on some blocks."""
    numbers, targets = "|".join(map(str, blocks)), "|".join(map(re.escape, spec.lora_targets))
    return LoraConfig(
        r=spec.lora_rank,
        lora_alpha=spec.lora_alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=rf"vit\.layers\.({numbers})\.attention\.({targets})",
        **settings,
    )


def get_tunables(model: nn.Module) -> Tunables:
    """A copy of what trains in the held segments, on the CPU in float32 or the model's own type."""
    return copy_of(dict(named_tunables(model)))


def set_tunables(model: nn.Module, tunables: Mapping[str, Tensor]) -> None:
    """Overwrite what trains.

    Raises:
        CheckpointError: if a name is missing or a shape differs; names of other segments are ignored.
    """
    overwrite(dict(named_tunables(model)), tunables)


def copy_of(named: Mapping[str, Tensor]) -> Tunables:
    """A copy on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in named.items()}


@torch.no_grad()
def overwrite(named: Mapping[str, nn.Parameter], tunables: Mapping[str, Tensor]) -> None:
    """As `set_tunables`, of parameters that were looked up before."""
    for name, parameter in named.items():
        if name not in tunables or tunables[name].shape != parameter.shape:
            found = tuple(tunables[name].shape) if name in tunables else "nothing"
            raise CheckpointError(f"tunable {name!r} should be {tuple(parameter.shape)} but is {found}")
        parameter.copy_(tunables[name])


def named_tunables(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What trains, under its travelling name, in a fixed order."""
    whole = model.whole if isinstance(model, SegmentedViT) else model
    for name, parameter in sorted(whole.named_parameters()):
        if parameter.requires_grad:  # the name that travels has nothing of PEFT's
            yield name.replace(".default.", ".").replace(".base_layer.", "."), parameter


@torch.no_grad()
def initialise_tunables(model: SegmentedViT, seed: int) -> None:
    """Set the starting values: small random prompts, LoRA's A random and B zero (Hu et al. 2021), a head of zeros.

    The backbone begins as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in named_tunables(model):
        if not (is_adapter(name) or is_head(name)):
            continue
        value = torch.zeros(parameter.shape)
        if name.endswith("prompts"):
            nn.init.normal_(value, std=_PROMPT_DEVIATION, generator=generator)
        elif "lora_A" in name:
            nn.init.kaiming_uniform_(value, a=5**0.5, generator=generator)
        parameter.copy_(value)


def tunables_of(names: Mapping[str, Tensor], segments: Sequence[Segment]) -> Tunables:
    """The part of the tunables that belongs to some segments."""
    blocks = {block for segment in segments for block in segment.blocks}
    return {name: tensor for name, tensor in names.items() if _belongs(name, blocks, segments)}


def is_tunable(name: str, spec: TunablesSpec) -> bool:
    """Whether the parameter of that name trains and travels."""
    if is_adapter(name):
        return True
    if is_head(name):
        return spec.head
    is_asked_for = spec.backbone == "all" or (spec.backbone == "biases" and name.endswith(".bias"))
    return is_asked_for and max(0, _block_of(name)) >= spec.first_block  # the embedding goes with the first block


def is_adapter(name: str) -> bool:
    """Whether it is a prompt's or LoRA's."""
    return name.endswith(".prompts") or ".lora_" in name


def is_head(name: str) -> bool:
    """Whether it is the task's own head's."""
    return name.startswith("classifier.")


def _belongs(name: str, blocks: set[int], segments: Sequence[Segment]) -> bool:
    block = _block_of(name)
    if block == _BELOW:
        return any(segment.has_embedding for segment in segments)
    return any(segment.has_head for segment in segments) if block == _ABOVE else block in blocks


def _block_of(name: str) -> float:
    """The index of the block that a parameter is in; the embedding is below all, the last norm and head above."""
    block = _BLOCK.match(name)
    return int(block[1]) if block else _BELOW if name.startswith("vit.embeddings.") else _ABOVE
