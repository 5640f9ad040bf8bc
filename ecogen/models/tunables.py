"""Tunables: what trains and travels: prompts, adapters, the head and, where asked for, the backbone or its biases.

Names are the whole model's parameter names, without what PEFT puts between: `vit.layers.2.prompts`,
`vit.layers.2.attention.q_proj.lora_A.weight`, `vit.layers.2.mlp.bottleneck.down.bias`,
`vit.layers.2.attention.q_proj.bias`, `classifier.bias`; of a decoder `model.layers.2.mlp.up_proj.lora_B.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, inject_adapter_in_model
from torch import Tensor, nn

from ecogen.config import Tunables as TunablesSpec
from ecogen.config import TunedBlock
from ecogen.errors import CheckpointError
from ecogen.models.bottleneck import attach_bottleneck
from ecogen.models.decoder import block_index
from ecogen.models.prompts import attach_prompts
from ecogen.models.segmented import Segmented
from ecogen.models.targets import linear_paths, target_paths
from ecogen.placement import Segment

Tunables = dict[str, Tensor]
"""Name -> tensor of everything that trains and travels."""

_PROMPT_DEVIATION = 0.12  # about the uniform draw of VPT's code for our sizes; chosen on validation digits

_MAGNITUDES = ".lora_magnitude_vector.weight"

_BELOW, _ABOVE = -1, float("inf")

_ADAPTED = re.compile(r"(?P<layer>.+?)\.(?:lora|ia3)_")

_IA3_SCALED, _IA3_SECOND = ("k_proj", "v_proj"), ("fc2", "down_proj")
"""Keys and values, and the second product of an MLP, in the families of which IA3 is known."""


def attach_tunables(model: Segmented, spec: TunablesSpec) -> None:
    """Add the prompts and adapters of the held blocks, and let them and the head train."""
    attach_to(model.whole, [index for segment in model.segments for index in segment.blocks], spec)


def attach_to(whole: Any, held: Sequence[int], spec: TunablesSpec) -> None:
    """The same to some blocks of a model of transformers.

    Raises:
        CheckpointError: if PEFT cannot adapt a layer.
    """
    layers = _layers_to_adapt(whole, held, spec)
    for index in held:
        _attach_own(whole.base_model.layers[index], spec, index, whole.config.hidden_size)
    peft_config = adapter_config(spec, layers)
    if peft_config is not None:
        _inject(peft_config, whole, layers)
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(is_tunable(name, spec))


def _inject(peft_config: PeftConfig, whole: Any, layers: Sequence[str]) -> None:
    """Add PEFT's adapters to these layers; in some mixtures of experts it takes them for others."""
    kind = whole.config.model_type
    try:
        inject_adapter_in_model(peft_config, whole)
    except ValueError as problem:
        raise CheckpointError(f"PEFT cannot adapt a {kind!r} model so ({problem:.80}); tune 'attention'") from problem
    if adapted_layers(name for name, _ in whole.named_parameters()) != sorted(layers):
        raise CheckpointError(f"PEFT adapts other layers of a {kind!r} model than those asked for; tune 'attention'")


def _layers_to_adapt(whole: Any, held: Iterable[int], spec: TunablesSpec) -> list[str]:
    """The names of the layers that get an adapter of PEFT."""
    blocks, prefix = whole.base_model.layers, f"{whole.base_model_prefix}.layers"
    return [
        f"{prefix}.{index}.{path}"
        for index in held
        for path in target_paths(blocks[index], _targets(spec.of_block(index)))
    ]


def check_targets(whole: Any, spec: TunablesSpec) -> None:
    """Check that each of the linear layers that adapters are for is in some block of the whole model.

    Raises:
        CheckpointError: if one is nowhere; says which there are.
    """
    blocks = list(whole.base_model.layers)
    kind = whole.config.model_type
    tuned = [spec.of_block(index) for index in range(len(blocks))]
    for target in sorted({target for block in tuned for target in block.lora_targets}):
        if not any(target_paths(block, [target]) for block in blocks):
            names = sorted({path.rpartition(".")[2] for block in blocks for path in linear_paths(block)})
            raise CheckpointError(
                f"tunables.lora_targets: no block of this {kind!r} model has a linear layer {target!r}; name some of "
                f"{', '.join(names)}, 'attention' or 'mlp'"
            )
    if any(block.ia3 for block in tuned) and not _layers_to_adapt(whole, range(len(blocks)), spec):
        raise CheckpointError(f"tunables.ia3: it is not known which layers of a {kind!r} model to scale; use LoRA")


def _targets(tuned: TunedBlock) -> Sequence[str]:
    """The linear layers of a block that PEFT's adapters are for."""
    return (*_IA3_SCALED, *_IA3_SECOND) if tuned.ia3 else tuned.lora_targets


def _attach_own(block: nn.Module, spec: TunablesSpec, index: int, hidden_size: int) -> None:
    """What PEFT has no format for."""
    tuned = spec.of_block(index)
    if tuned.prompts:
        attach_prompts(block, tuned.prompts, hidden_size, stay=spec.prompt_depth == "shallow")
    if tuned.bottleneck:
        attach_bottleneck(block.get_submodule("mlp"), tuned.bottleneck, hidden_size)


def adapter_config(spec: TunablesSpec, layers: Sequence[str], **settings: object) -> PeftConfig | None:
    """PEFT's configuration of LoRA or IA3 on these layers of the whole model; None where there are none."""
    if not layers:
        return None
    tuned = {name: spec.of_block(block_index(name) or 0) for name in layers}
    if any(block.ia3 for block in tuned.values()):
        return _ia3_config(layers, settings)
    return _lora_config(spec, {name: block.lora_rank for name, block in tuned.items()}, settings)


def adapted_layers(names: Iterable[str]) -> list[str]:
    """The layers that have an adapter of PEFT, by the names of its parameters."""
    found = (_ADAPTED.match(name) for name in names)
    return sorted({match["layer"] for match in found if match})


def _lora_config(spec: TunablesSpec, ranks: Mapping[str, int], settings: Mapping[str, object]) -> LoraConfig:
    """LoRA, each layer of its block's rank; the scale is alpha / rank, with rsLoRA alpha / sqrt(rank)."""
    most = max(ranks.values())
    return LoraConfig(
        r=most,
        rank_pattern={re.escape(name): rank for name, rank in ranks.items() if rank != most},
        lora_alpha=spec.lora_alpha,
        lora_dropout=0.0,
        bias="none",
        use_rslora=spec.lora_kind == "rslora",
        use_dora=spec.lora_kind == "dora",
        target_modules=list(ranks),
        **settings,
    )


def _ia3_config(layers: Sequence[str], settings: Mapping[str, object]) -> IA3Config:
    """IA3 as Liu et al. 2022, section 3.3, have it: factors on keys, on values and on what enters the MLP's second
    product, https://arxiv.org/abs/2205.05638
    """
    second = [name for name in layers if name.endswith(_IA3_SECOND)]
    return IA3Config(target_modules=list(layers), feedforward_modules=second, **settings)


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
    whole = model.whole if isinstance(model, Segmented) else model
    for name, parameter in sorted(whole.named_parameters()):
        if parameter.requires_grad:  # the name that travels has nothing of PEFT's
            yield name.replace(".default", "").replace(".base_layer", ""), parameter


def normalised_matrices(model: Segmented) -> Iterator[nn.Parameter]:
    """The frozen matrices that DoRA divides by the norms of their rows."""
    for name, _ in named_tunables(model):
        if name.endswith(_MAGNITUDES):
            yield _frozen_of(model, name)


def _frozen_of(model: Segmented, magnitudes: str) -> nn.Parameter:
    weight: nn.Parameter = model.whole.get_submodule(magnitudes.removesuffix(_MAGNITUDES)).get_base_layer().weight
    return weight


@torch.no_grad()
def initialise_tunables(model: Segmented, seed: int) -> None:
    """Set the starting values, with which the model computes what it did, but for small random prompts.

    LoRA's A and a bottleneck's first product are random, LoRA's B (Hu et al. 2021), a bottleneck's second product and
    the head zero; IA3's factors are one; DoRA's magnitudes the norms of the frozen weights' rows (Liu et al. 2024,
    equation 2). The backbone begins as it is. Only what holds the whole model does this: devices are sent the values.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in named_tunables(model):
        if is_adapter(name) or is_head(name):
            parameter.copy_(_starting_value(model, name, parameter, generator))


def _starting_value(model: Segmented, name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    if name.endswith(_MAGNITUDES):
        return torch.linalg.vector_norm(_frozen_of(model, name), dim=1)
    value = torch.full(parameter.shape, 1.0 if name.endswith(".ia3_l") else 0.0)
    if name.endswith(".prompts"):
        nn.init.normal_(value, std=_PROMPT_DEVIATION, generator=generator)
    elif name.endswith((".lora_A.weight", ".bottleneck.down.weight")):
        nn.init.kaiming_uniform_(value, a=5**0.5, generator=generator)
    return value


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
    block = _block_of(name)  # the embedding goes with the first block, the last norm with what the run says
    backbone = spec.backbone if block == _ABOVE else spec.of_block(max(0, int(block))).backbone
    return backbone == "all" or (backbone == "biases" and name.endswith(".bias"))


def is_adapter(name: str) -> bool:
    """Whether it was added for tuning: a prompt's, LoRA's, IA3's or a bottleneck's."""
    return name.endswith(".prompts") or any(mark in name for mark in (".lora_", ".ia3_l", ".bottleneck."))


def is_of_peft(name: str) -> bool:
    """Whether PEFT has a format for it."""
    return ".lora_" in name or ".ia3_l" in name


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
    block = block_index(name)
    if block is not None:
        return block
    return _BELOW if name.startswith("vit.embeddings.") else _ABOVE
