"""Many LoRA adapters on one backbone, each row of a batch with its own: PEFT's layers, told which row has which."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ecogen.errors import CheckpointError
from ecogen.models.checkpoint import load_tensors
from ecogen.models.decoder import SegmentedDecoder, block_index
from ecogen.models.lora_config import read_settings

logger = logging.getLogger(__name__)

_PREFIX, _BASE = "base_model.model.", "__base__"
_HALVES = ("lora_A", "lora_B")
_ROW = re.compile(r"\.lora_[AB]\.weight$")
_LONGEST = 256
"""Of names that others give."""

_WHOLE = "whole"

_MISFITS = (ValueError, LookupError, RuntimeError, TypeError, AttributeError)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        scalings: by how much the product of each module's two tensors counts.
        tensors: by the whole model's names.
    """

    scalings: Mapping[str, float]
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """What crosses a link to put it on one cluster."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def blocks(self) -> set[int]:
        """Those that it is for."""
        return {block for name in self.tensors if (block := block_index(name)) is not None}

    def of_blocks(self, blocks: Sequence[int]) -> Adapter:
        """The part of some blocks."""
        scalings = {name: scaling for name, scaling in self.scalings.items() if block_index(f"{name}.") in blocks}
        return Adapter(scalings, {n: t for n, t in self.tensors.items() if block_index(n) in blocks})


def open_adapter(folder: Path) -> Adapter:
    """The adapter in a folder that PEFT saved.

    Raises:
        CheckpointError: if it is none, or of a kind that cannot share a batch with others.
    """
    try:
        config = (folder / "adapter_config.json").read_bytes()
    except OSError as problem:
        raise CheckpointError(f"{folder} is no adapter: adapter_config.json cannot be read ({problem})") from problem
    return adapter_of(config, load_tensors(folder / "adapter_model.safetensors"), str(folder))


def adapter_of(config: bytes, tensors: Mapping[str, Tensor], source: str) -> Adapter:
    """The adapter of what PEFT's two files hold.

    Args:
        config: adapter_config.json.
        source: what errors call it.

    Raises:
        CheckpointError: if it is none, or of a kind that cannot share a batch with others.
    """
    named = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    if not named:
        raise CheckpointError(f"{source} cannot be served: it has no tensors; save it again")
    try:
        return Adapter(read_settings(config).scalings(_ranks(named)), named)
    except CheckpointError as problem:
        raise CheckpointError(f"{source} cannot be served: {problem}") from problem


def _ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Of each module, as its two tensors have it.

    Raises:
        CheckpointError: if there is a tensor that cannot share a batch with others, or one lacks its other.
    """
    for name, tensor in tensors.items():
        if len(name) > _LONGEST or not _ROW.search(name) or block_index(name) is None:
            raise CheckpointError(f"{name[:_LONGEST]!r} is no LoRA of a block; merge it into its model and serve that")
        if tensor.ndim != 2 or not tensor.numel() or not tensor.is_floating_point():
            raise CheckpointError(f"{name!r} is no matrix of floating-point numbers")
    ranks = {}
    for module in sorted({_ROW.sub("", name) for name in tensors}):
        a, b = (tensors.get(f"{module}.{half}.weight") for half in _HALVES)
        if a is None or b is None or a.shape[0] != b.shape[1]:
            raise CheckpointError(f"the two tensors of {module!r} are not there or of unlike ranks")
        ranks[module] = a.shape[0]
    return ranks


class MixedLora:
    """The adapters of one node's segments.

    Not thread-safe: one compute thread calls it.
    """

    def __init__(self, model: SegmentedDecoder) -> None:
        self._model, self._ids = model, set[str]()
        self._rows: list[str] | None = None

    def hold(self, adapter_id: str, adapter: Adapter) -> None:
        """Add an adapter, of which `adapter` is the part of the own blocks; one that is held is replaced.

        Args:
            adapter_id: a name without a dot.

        Raises:
            CheckpointError: if it does not fit the model.
        """
        self.drop(adapter_id)
        if not adapter.tensors:
            return  # none of it is in this node's blocks
        layers = set(self._layers())
        try:
            self._add(adapter_id, adapter)
        except BaseException as problem:
            self._forget(adapter_id)
            if not isinstance(problem, _MISFITS):
                raise
            raise CheckpointError(f"the adapter does not fit the model: {problem}") from problem
        finally:
            for layer in self._layers():
                if layer not in layers:
                    layer.register_forward_pre_hook(self._tell, with_kwargs=True)
        self._ids.add(adapter_id)

    def drop(self, adapter_id: str) -> None:
        """Remove an adapter; one that is not held changes nothing."""
        if adapter_id in self._ids:
            self._ids.discard(adapter_id)
            self._forget(adapter_id)

    @contextmanager
    def rows(self, adapter_ids: Sequence[str]) -> Iterator[None]:
        """Within it, a forward gives each row its adapter; an empty name, or one of which nothing is held, is none."""
        held = [adapter_id if adapter_id in self._ids else _BASE for adapter_id in adapter_ids]
        self._rows = held if self._ids.intersection(held) else None
        try:
            yield
        finally:
            self._rows = None

    def _tell(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return (args, kwargs) if self._rows is None else (args, kwargs | {"adapter_names": self._rows})

    def _layers(self) -> Iterator[LoraLayer]:
        return (module for module in self._model.whole.modules() if isinstance(module, LoraLayer))

    def _forget(self, adapter_id: str) -> None:
        for layer in self._layers():
            layer._active_adapter = []
            layer.delete_adapter(adapter_id)

    def _add(self, adapter_id: str, adapter: Adapter) -> None:
        self._check_places(adapter)
        # PEFT makes the layers and nothing else: of rank one, with what it is told by us alone, and in a plain module,
        # in which it does not take names for those of an older transformers
        names = [f"{_WHOLE}.{module}" for module in adapter.scalings]
        config = LoraConfig(r=1, target_modules=names, init_lora_weights=False, inference_mode=True)
        with warnings.catch_warnings(action="ignore"):
            inject_adapter_in_model(config, nn.ModuleDict({_WHOLE: self._model.whole}), adapter_id)
        self._model.whole.requires_grad_(False)
        for module, scaling in adapter.scalings.items():
            layer = self._model.whole.get_submodule(module)
            assert isinstance(layer, LoraLayer)
            layer._active_adapter = []  # without rows, none is on
            self._fill(layer, adapter_id, [adapter.tensors[f"{module}.{half}.weight"] for half in _HALVES], module)
            layer.scaling[adapter_id] = scaling

    def _check_places(self, adapter: Adapter) -> None:
        """Before anything is changed."""
        modules = dict(self._model.whole.named_modules())
        for module in adapter.scalings:
            found = modules.get(module)
            found = found.base_layer if isinstance(found, LoraLayer) else found
            if not isinstance(found, (nn.Linear, Conv1D)):
                raise ValueError(f"it has no linear layer {module!r}")

    def _fill(self, layer: LoraLayer, adapter_id: str, tensors: Sequence[Tensor], module: str) -> None:
        a, b = (getattr(layer, half)[adapter_id].weight for half in _HALVES)
        own_a, own_b = tensors
        rank = own_a.shape[0]
        if own_a.shape != (rank, a.shape[1]) or own_b.shape != (b.shape[0], rank):
            shapes = f"{tuple(own_a.shape)} and {tuple(own_b.shape)}"
            raise ValueError(f"{module!r} takes {a.shape[1]} features and gives {b.shape[0]}, not as {shapes}")
        a.data, b.data = own_a.to(a, copy=True), own_b.to(b, copy=True)
        layer.r[adapter_id] = rank
