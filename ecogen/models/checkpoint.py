"""Checkpoints: the foundation model's folder, read tensor by tensor, and small safetensors files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor
from transformers import ViTConfig

from ecogen.errors import CheckpointError
from ecogen.storage import write_atomically

_PREFIX = "vit."

_FILE_NAMES = (
    # transformers 5 writes vision transformers under the names of version 4, and renames them as it loads.
    ("encoder.layer.", "layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)


@dataclass(frozen=True)
class Foundation:
    """A vision transformer's folder as `save_pretrained` writes it, sharded or not, with or without a head.

    Attributes:
        files: tensor name, under the classification model's names, -> file and name in it.
    """

    folder: Path
    config: ViTConfig
    files: Mapping[str, tuple[Path, str]]

    @property
    def digest(self) -> str:
        """A fingerprint of the weights: the same for the same content."""
        digest = hashlib.sha256()
        for path in sorted({path for path, _ in self.files.values()}):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those of the named tensors that the folder has; no other tensor is read.

        Raises:
            CheckpointError: if a file is corrupt.
        """
        wanted: dict[Path, list[str]] = {}
        for name in names:
            if name in self.files:
                wanted.setdefault(self.files[name][0], []).append(name)
        return {name: tensor for path, own in wanted.items() for name, tensor in self._read_file(path, own).items()}

    def _read_file(self, path: Path, names: list[str]) -> dict[str, Tensor]:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(self.files[name][1]) for name in names}
        except (OSError, safetensors.SafetensorError) as problem:
            raise CheckpointError(f"{path} is corrupt ({problem}); delete it and run again, or restore it") from problem


def open_foundation(folder: Path) -> Foundation:
    """The foundation model in a folder.

    Raises:
        CheckpointError: if the folder is not a vision transformer's, or a file is missing or corrupt.
    """
    try:
        config = ViTConfig.from_dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError) as problem:
        raise CheckpointError(
            f"{folder} is no model folder: config.json cannot be read ({problem}); give one that save_pretrained wrote"
        ) from problem
    if config.model_type != "vit":
        raise CheckpointError(f"{folder} holds a {config.model_type!r} model; only 'vit' is supported for images")
    files = {_whole_name(name): (path, name) for path in weight_files(folder) for name in _names_in(path)}
    return Foundation(folder, config, files)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    content = save_safetensors({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata or {}))
    write_atomically(path, content)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: if it is missing or corrupt.
    """
    try:
        return load_safetensors(path.read_bytes())
    except OSError as problem:
        raise CheckpointError(f"cannot read {path}: {problem.strerror}") from problem
    except safetensors.SafetensorError as problem:
        raise CheckpointError(f"{path} is corrupt ({problem}); delete it and run again, or restore it") from problem


def load_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError) as problem:
        raise CheckpointError(f"{path} is missing or corrupt ({problem}); restore it, or run again") from problem


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder, sharded or not.

    Raises:
        CheckpointError: if its index is corrupt.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    try:
        names = json.loads(index.read_text())["weight_map"].values()
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as problem:
        raise CheckpointError(f"{index} is corrupt ({problem}); restore it") from problem
    return [folder / name for name in sorted(set(names))]


def _names_in(path: Path) -> list[str]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, safetensors.SafetensorError) as problem:
        raise CheckpointError(f"{path} is missing or corrupt ({problem}); restore it, or run again") from problem


def _whole_name(name: str) -> str:
    """The classification model's name of a tensor; a bare `ViTModel` saves without the prefix `vit.`."""
    for old, new in _FILE_NAMES:
        name = name.replace(old, new)
    return name if name.startswith((_PREFIX, "classifier.")) else _PREFIX + name
