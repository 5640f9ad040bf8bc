"""The tuned model on disk: an ordinary PEFT directory, and `load_tuned` for what PEFT does not know.

A saved folder holds `backbone/` (the foundation model), `tunables.safetensors` with everything that was tuned, and
`adapter/`, which `peft.PeftModel.from_pretrained` loads onto the whole model. Where edges know different labels,
`tunables.safetensors` holds what they share, and `edges/<edge>/` each edge's whole model: tunables and adapter.
Of a text model, all that is tuned is in `adapter/`; where edges stay alone, each has one in `edges/<edge>/`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, ViTConfig

from ecogen import config as recipes
from ecogen.errors import CheckpointError
from ecogen.models.checkpoint import Foundation, load_metadata, load_tensors, open_foundation, save_tensors
from ecogen.models.family import family_of, whole_segment
from ecogen.models.segmented import Segmented
from ecogen.models.tunables import (
    adapted_layers,
    adapter_config,
    attach_to,
    attach_tunables,
    check_targets,
    initialise_tunables,
    is_head,
    is_of_peft,
    set_tunables,
)
from ecogen.storage import copy_folder, write_atomically

BACKBONE, TUNABLES, ADAPTER, EDGES = "backbone", "tunables.safetensors", "adapter", "edges"


def classification_config(foundation: Foundation, labels: int | Sequence[int]) -> ViTConfig:
    """The foundation model's configuration with a head for the task.

    Args:
        labels: how many there are; or which, where they are not 0, 1, ...: `id2label` then tells them.
    """
    values = foundation.config.to_dict()
    values.pop("id2label", None), values.pop("label2id", None)
    known = range(labels) if isinstance(labels, int) else labels
    if list(known) == list(range(len(known))):
        return ViTConfig.from_dict(values | {"num_labels": len(known)})
    return ViTConfig.from_dict(values | {"id2label": {place: str(label) for place, label in enumerate(known)}})


def read_backbone(foundation: Foundation, config: PreTrainedConfig, names: Iterable[str]) -> dict[str, Tensor]:
    """Named tensors of the model: the foundation's, of a classifier with a head of zeros where it has none that fits.

    Raises:
        CheckpointError: if the folder lacks a tensor other than the head's.
    """
    wanted = list(names)
    tensors = foundation.read(wanted)
    for name, shape in {} if foundation.is_text else _head_shapes(config).items():
        if name in wanted and (name not in tensors or tensors[name].shape != shape):
            tensors[name] = torch.zeros(shape)
    missing = set(wanted) - tensors.keys()
    if missing:
        raise CheckpointError(f"{foundation.folder} lacks {len(missing)} tensors, {min(missing)!r} among them")
    return {name: tensors[name] if foundation.is_text else tensors[name].float() for name in wanted}


def load_whole(foundation: Foundation, config: PreTrainedConfig, spec: recipes.Tunables, seed: int) -> Segmented:
    """The whole model in one piece, with fresh tunables.

    Raises:
        CheckpointError: if a tensor is missing, or a layer that adapters are for is in no block.
    """
    segments, family = [whole_segment(config)], family_of(config.model_type)
    names = family.names(config, segments, foundation.offered)
    model = family.load(config, segments, read_backbone(foundation, config, names))
    check_targets(model.whole, spec)
    attach_tunables(model, spec)
    initialise_tunables(model, seed)
    return model


def save_tuned(
    folder: Path,
    foundation: Foundation,
    tunables: Mapping[str, Tensor],
    spec: recipes.Tunables,
    labels: int | Sequence[int],
) -> None:
    """Write `backbone/`, `tunables.safetensors` and, where there is LoRA or IA3, the PEFT directory `adapter/`.

    Args:
        labels: how many there are, or which.
    """
    _save_backbone(folder, foundation)
    known = range(labels) if isinstance(labels, int) else labels
    _save_model(folder, f"../{BACKBONE}", foundation, tunables, spec, known)


def save_text(
    folder: Path,
    foundation: Foundation,
    tunables: Mapping[str, Tensor],
    spec: recipes.Tunables,
    edges: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({}),
) -> None:
    """Write `backbone/` with its tokenizer, `tunables.safetensors` and the PEFT directory `adapter/` of a decoder.

    Args:
        tunables: empty where there is no model for all edges.
        edges: tunables of each edge that has a model of its own.
    """
    _save_backbone(folder, foundation)
    replace_text(folder, tunables, spec)
    for edge_id, own in edges.items():
        replace_text(folder, own, spec, edge_id)


def replace_text(folder: Path, tunables: Mapping[str, Tensor], spec: recipes.Tunables, edge: str | None = None) -> None:
    """Write `tunables.safetensors` and `adapter/` of a decoder, or of one edge's; each file atomically.

    Args:
        tunables: empty where there is no model for all edges.
    """
    own = tuned_folder(folder, edge)
    save_tensors(own / TUNABLES, tunables, _metadata(spec, ()))
    if tunables:
        _save_text_adapter(own, f"../{BACKBONE}" if edge is None else f"../../../{BACKBONE}", tunables, spec)


def tuned_folder(folder: Path, edge: str | None = None) -> Path:
    """Where a run folder has its tuned model, or that of an edge."""
    return folder if edge is None else folder / EDGES / edge


def save_by_edge(
    folder: Path,
    foundation: Foundation,
    shared: Mapping[str, Tensor],
    edges: Mapping[str, tuple[Mapping[str, Tensor], Sequence[int]]],
    spec: recipes.Tunables,
) -> None:
    """Write `backbone/`, `tunables.safetensors` with what the edges share, and each edge's whole model.

    Args:
        shared: what the cloud averaged last; empty where it averaged nothing.
        edges: tunables with the own head, and its labels.
    """
    _save_backbone(folder, foundation)
    save_tensors(folder / TUNABLES, shared, _metadata(spec, ()))
    for edge_id, (tunables, labels) in edges.items():
        _save_model(folder / EDGES / edge_id, f"../../../{BACKBONE}", foundation, tunables, spec, labels)


def tunables_file(folder: Path, edge: str | None = None) -> Path:
    """Where the tunables of a whole model are: of the run, or of one edge where each has its own head.

    Raises:
        CheckpointError: if there are none, or it does not say of which edge although each has its own.
    """
    if not (folder / TUNABLES).exists():
        raise CheckpointError(f"{folder / TUNABLES} is missing: {folder} holds no {TUNABLES}; give a finished run's")
    by_edge = {path.name: path / TUNABLES for path in sorted((folder / EDGES).glob("*"))}
    if not by_edge or (edge is None and (folder / ADAPTER).exists()):
        return folder / TUNABLES
    if edge not in by_edge:
        found = "" if edge is None else f", not {edge!r}"
        raise CheckpointError(f"{folder} has a model for each edge; name one: {', '.join(by_edge)}{found}")
    return by_edge[edge]


def load_tuned(folder: str | Path, *, edge: str | None = None) -> PreTrainedModel:
    """The whole tuned model of a run folder, with all that was tuned on: a `ViTForImageClassification`, or a decoder.

    Args:
        edge: whose head, where the edges know different labels; `config.id2label` tells them.

    Raises:
        CheckpointError: if the folder holds no tuned model, or a corrupt one; or `edge` is missing or unknown.
    """
    path = tunables_file(Path(folder), edge)
    metadata = load_metadata(path)
    try:
        spec = recipes.section_from_table(recipes.Tunables, json.loads(metadata["spec"]))
        labels = json.loads(metadata["labels"])
        foundation = open_foundation(Path(folder) / BACKBONE)
        if foundation.is_text:
            return _load_text(foundation, load_tensors(path), spec)
        model = load_whole(foundation, classification_config(foundation, labels), spec, seed=0)
    except (KeyError, ValueError) as problem:
        raise CheckpointError(f"{path} does not say what it holds ({problem}); save the run again") from problem
    set_tunables(model, load_tensors(path))
    return model.whole.eval()


def load_with(folder: str | Path, tunables: Mapping[str, Tensor]) -> PreTrainedModel:
    """The decoder of a run folder with other tunables than those that it was saved with.

    Raises:
        CheckpointError: if the folder holds no tuned model, or of other tunables.
    """
    metadata = load_metadata(tunables_file(Path(folder)))
    spec = recipes.section_from_table(recipes.Tunables, json.loads(metadata["spec"]))
    return _load_text(open_foundation(Path(folder) / BACKBONE), tunables, spec)


def _load_text(foundation: Foundation, tunables: Mapping[str, Tensor], spec: recipes.Tunables) -> PreTrainedModel:
    whole = AutoModelForCausalLM.from_pretrained(foundation.folder, dtype=torch.float32)
    attach_to(whole, range(foundation.config.num_hidden_layers), spec)
    set_tunables(whole, tunables)
    return whole.eval()


def _save_text_adapter(folder: Path, backbone: str, tunables: Mapping[str, Tensor], spec: recipes.Tunables) -> None:
    settings: Any = {"task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": backbone}
    if peft_config := adapter_config(spec, adapted_layers(tunables), **settings):
        _write_config(folder / ADAPTER, peft_config)
        _write_adapter(folder / ADAPTER, tunables)
        write_atomically(folder / ADAPTER / "README.md", _readme("AutoModelForCausalLM", f'"{backbone}"', []))


def _save_backbone(folder: Path, foundation: Foundation) -> None:
    if foundation.folder != folder / BACKBONE:
        copy_folder(foundation.folder, folder / BACKBONE)


def _save_model(
    folder: Path,
    backbone: str,
    foundation: Foundation,
    tunables: Mapping[str, Tensor],
    spec: recipes.Tunables,
    labels: Sequence[int],
) -> None:
    save_tensors(folder / TUNABLES, tunables, _metadata(spec, labels))
    if peft_config := _peft_config(spec, tunables):
        peft_config.base_model_name_or_path = backbone
        _save_adapter(folder / ADAPTER, foundation, peft_config, tunables, spec, len(labels))


def _peft_config(spec: recipes.Tunables, tunables: Mapping[str, Tensor]) -> PeftConfig | None:
    return adapter_config(spec, adapted_layers(tunables), modules_to_save=["classifier"], inference_mode=True)


def _metadata(spec: recipes.Tunables, labels: Sequence[int]) -> dict[str, str]:
    """What a file of tunables says of itself: how many labels, or which."""
    known: int | list[int] = len(labels) if list(labels) == list(range(len(labels))) else list(labels)
    return {"spec": json.dumps(recipes.section_table(spec)), "labels": json.dumps(known)}


def _save_adapter(
    folder: Path,
    foundation: Foundation,
    peft_config: PeftConfig,
    tunables: Mapping[str, Tensor],
    spec: recipes.Tunables,
    num_labels: int,
) -> None:
    _write_config(folder, peft_config)
    known = {name: tensor for name, tensor in tunables.items() if is_of_peft(name) or is_head(name)}
    config = classification_config(foundation, num_labels)
    head = read_backbone(foundation, config, _head_shapes(config))
    _write_adapter(folder, head | known)
    whole = f'"{peft_config.base_model_name_or_path}", num_labels={num_labels}'
    write_atomically(folder / "README.md", _readme("ViTForImageClassification", whole, _lacks(foundation, spec)))


def _write_config(folder: Path, peft_config: PeftConfig) -> None:
    table = json.dumps(_plain(peft_config.to_dict()), indent=2, sort_keys=True)
    write_atomically(folder / "adapter_config.json", table)


def _write_adapter(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """As PEFT names them, which names a magnitude vector without the parameter that holds it."""
    named = {n.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector"): t for n, t in tensors.items()}
    save_tensors(folder / "adapter_model.safetensors", {f"base_model.model.{n}": t for n, t in named.items()})


def _lacks(foundation: Foundation, spec: recipes.Tunables) -> list[str]:
    """What was tuned that PEFT has no format for."""
    blocks = [spec.of_block(index) for index in range(foundation.config.num_hidden_layers)]
    lacks = []
    if many := sorted({block.prompts for block in blocks} - {0}):
        numbers = f"{many[0]}" if len(many) == 1 else f"{many[0]} to {many[-1]}"
        each = " of each block" if spec.prompt_depth == "deep" else ""
        lacks.append(f"the {numbers} {spec.prompt_depth} visual prompts{each}")
    if any(block.bottleneck for block in blocks):
        lacks.append("the bottleneck adapters")
    if spec.backbone != "frozen" or any(block.backbone != "frozen" for block in blocks):
        lacks.append("what was tuned of the backbone")
    return lacks


def _head_shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    return {"classifier.weight": (config.num_labels, config.hidden_size), "classifier.bias": (config.num_labels,)}


def _plain(values: dict[str, object]) -> dict[str, object]:
    return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}


def _readme(kind: str, whole: str, lacks: list[str]) -> str:
    """How to load an adapter.

    Args:
        kind: the class of the whole model.
        whole: what it is loaded from, as arguments.
        lacks: what was tuned that is not in it.
    """
    missing = (
        f"\nPlain PEFT misses {' and '.join(lacks)}, which it has no format for: its "
        "outputs differ from the tuned model's. Load the run folder with `ecogen.load_tuned(DIR)` for all of it.\n"
        if lacks
        else "\nThis is the whole of what was tuned: plain PEFT gives the tuned model's outputs.\n"
    )
    return (
        "# A PEFT adapter written by EcoGen\n\n"
        "```python\n"
        f"from peft import PeftModel\nfrom transformers import {kind}\n\n"
        f"model = {kind}.from_pretrained({whole})\n"
        'model = PeftModel.from_pretrained(model, ".")\n'
        "```\n" + missing
    )
