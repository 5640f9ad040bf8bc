"""Checkpoints: the foundation model's folder, read tensor by tensor, and small safetensors files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor
from transformers import PreTrainedConfig, ViTConfig

from ecogen.errors import CheckpointError
from ecogen.models.decoder import open_config
from ecogen.models.profile import VISION
from ecogen.storage import write_atomically

_PREFIX = "vit."

FILE = "file:"
"""Before the names of small files that travel with a model's tensors, each as a tensor of its bytes."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
    "image_tokenizer.json",
    "image_tokenizer.safetensors",
)
"""What a text model's folder has besides its weights and configuration, as far as it has them."""

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
    """A model's folder as `save_pretrained` writes it, sharded or not; a vision transformer's with or without a head.

    Attributes:
        files: tensor name -> file and name in it. A vision transformer's have the classification model's names, a
            decoder's those of the files; a decoder's tokenizer is there too, file by file, as `FILE` and its name.
    """

    folder: Path
    config: PreTrainedConfig
    files: Mapping[str, tuple[Path, str]]

    @property
    def digest(self) -> str:
        """A fingerprint of the weights: the same for the same content."""
        digest = hashlib.sha256()
        if self.is_text:  # whose configuration says more than sizes
            digest.update((self.folder / "config.json").read_bytes())
        for path in sorted({path for path, _ in self.files.values()}):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    @property
    def is_text(self) -> bool:
        """Whether it is a decoder of text."""
        return self.config.model_type != VISION

    @property
    def offered(self) -> list[str]:
        """The names of all that a decoder's folder has; of a vision transformer its configuration tells them."""
        return list(self.files) if self.is_text else []

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
        if names[0].startswith(FILE):
            return {names[0]: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)}
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(self.files[name][1]) for name in names}
        except (OSError, safetensors.SafetensorError) as problem:
            raise CheckpointError(f"{path} is corrupt ({problem}); delete it and run again, or restore it") from problem


def open_foundation(folder: Path) -> Foundation:
    """The foundation model in a folder.

    Raises:
        CheckpointError: if the folder is no vision transformer's nor a known decoder's, or a file is missing or
            corrupt.
    """
    try:
        table = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as problem:
        raise CheckpointError(
            f"{folder} is no model folder: config.json cannot be read ({problem}); give one that save_pretrained wrote"
        ) from problem
    is_vision = isinstance(table, dict) and table.get("model_type") == VISION
    config = ViTConfig.from_dict(table) if is_vision else open_config(folder)
    files = {name: (path, name) for path in weight_files(folder) for name in _names_in(path)}
    if is_vision:
        return Foundation(folder, config, {_whole_name(name): place for name, place in files.items()})
    others = {FILE + name: (folder / name, name) for name in TOKENIZER_FILES if (folder / name).exists()}
    return Foundation(folder, config, files | others)


def write_files(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write those tensors that are files into a folder; returns the others."""
    files = {name: tensor for name, tensor in tensors.items() if name.startswith(FILE)}
    for name, tensor in files.items():
        if name.removeprefix(FILE) not in TOKENIZER_FILES:  # it came from another node
            raise CheckpointError(f"{name!r} is no file that a model's folder may have")
        write_atomically(folder / name.removeprefix(FILE), tensor.numpy().tobytes())
    return {name: tensor for name, tensor in tensors.items() if name not in files}


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
        content = path.read_bytes()
    except OSError as problem:
        raise CheckpointError(f"cannot read {path}: {problem.strerror}") from problem
    return tensors_of(content, str(path), "; delete it and run again, or restore it")


def tensors_of(content: bytes, source: str, advice: str = "") -> dict[str, Tensor]:
    """The tensors of a safetensors file that has been read.

    Args:
        source: what errors call it.
        advice: what they end with.

    Raises:
        CheckpointError: if it is corrupt.
    """
    try:
        return load_safetensors(content)
    except safetensors.SafetensorError as problem:
        raise CheckpointError(f"{source} is corrupt ({problem}){advice}") from problem


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
