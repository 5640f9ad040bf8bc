"""Many LoRA adapters on one backbone, each row of a batch with its own: PEFT's layers, told which row has which."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ecogen.errors import CheckpointError
from ecogen.models.checkpoint import load_tensors
from ecogen.models.decoder import SegmentedDecoder, block_index

logger = logging.getLogger(__name__)

_PREFIX, _BASE = "base_model.model.", "__base__"
_ROW = re.compile(r"\.lora_[AB]\.weight$")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as PEFT saves it.

    Attributes:
        config: what adapter_config.json says.
        tensors: by the whole model's names.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """What crosses a link to put it on one cluster."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def of_blocks(self, blocks: Sequence[int]) -> Adapter:
        """The part of some blocks."""
        return Adapter(self.config, {n: t for n, t in self.tensors.items() if block_index(n) in blocks})


def open_adapter(folder: Path) -> Adapter:
    """The adapter in a folder that PEFT saved.

    Raises:
        CheckpointError: if it is none, or of a kind that cannot share a batch with others.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{folder} is no adapter: adapter_config.json cannot be read ({problem})") from problem
    return adapter_of(config, load_tensors(folder / "adapter_model.safetensors"), str(folder))


def adapter_of(config: object, tensors: Mapping[str, Tensor], source: str) -> Adapter:
    """The adapter of what PEFT's two files hold.

    Args:
        source: what errors call it.

    Raises:
        CheckpointError: if it is none, or of a kind that cannot share a batch with others.
    """
    if not isinstance(config, dict):
        raise CheckpointError(f"{source} is no adapter: its configuration is no object")
    adapter = Adapter(config, {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()})
    if reason := _refusal(adapter):
        raise CheckpointError(f"{source} cannot be served: {reason}; merge it into its model and serve that")
    return adapter


def _refusal(adapter: Adapter) -> str | None:
    """Why an adapter cannot share a batch with others; None where it can."""
    if (kind := adapter.config.get("peft_type")) != "LORA":
        return f"it is {kind}, and only LoRA can share a batch with others"
    if adapter.config.get("use_dora"):
        return "DoRA cannot share a batch with others"
    strange = sorted(name for name in adapter.tensors if not _ROW.search(name) or block_index(name) is None)
    return f"{strange[0]!r} is no LoRA of a block" if strange else None


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
            with warnings.catch_warnings(action="ignore"):
                inject_adapter_in_model(_config(adapter), self._model.whole, adapter_id)
            self._fill(adapter_id, adapter)
        except (ValueError, KeyError, RuntimeError, TypeError) as problem:
            self._forget(adapter_id)
            raise CheckpointError(f"the adapter does not fit the model: {problem}") from problem
        finally:
            for layer in self._layers():
                if layer not in layers:
                    layer.register_forward_pre_hook(self._tell, with_kwargs=True)
        self._model.whole.requires_grad_(False)
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
            layer._active_adapter = []  # without rows, none is on
            layer.delete_adapter(adapter_id)

    @torch.no_grad()
    def _fill(self, adapter_id: str, adapter: Adapter) -> None:
        parameters = dict(self._model.whole.named_parameters())
        for name, tensor in adapter.tensors.items():
            parameters.pop(name.replace(".weight", f".{adapter_id}.weight")).copy_(tensor)
        lacking = [name for name in parameters if name.endswith(f".{adapter_id}.weight")]
        if lacking:
            raise ValueError(f"it has nothing for {lacking[0]!r}")
        for layer in self._layers():
            layer._active_adapter = []


def _config(adapter: Adapter) -> LoraConfig:
    """As it was saved, but for exactly the modules that it has tensors for."""
    values = {key: value for key, value in adapter.config.items() if key in LoraConfig.__dataclass_fields__}
    targets = sorted({_ROW.sub("", name) for name in adapter.tensors})
    values |= {"target_modules": targets, "layers_to_transform": None, "layers_pattern": None, "modules_to_save": None}
    return LoraConfig(**(values | {"exclude_modules": None, "inference_mode": True}))
