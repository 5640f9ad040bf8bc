"""A model's folder, as `save_pretrained` writes it: its tensors by name, sharded or not, each read alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from ecogen.errors import CheckpointError
from ecogen.models.checkpoint import save_tensors, weight_files
from ecogen.storage import write_atomically

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "image_tokenizer.json",
    "image_tokenizer.safetensors",
)
"""What turns text into a model's tokens and back, and says which tokens end it."""

CONFIG, INDEX = "config.json", "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelFolder:
    """Any model's folder.

    Attributes:
        config: what config.json says.
        files: where each tensor is.
        sizes: how many numbers each has.
    """

    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, Path]
    sizes: Mapping[str, int]

    @cached_property
    def digest(self) -> str:
        """A fingerprint of configuration and weights: the same for the same content."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for path in sorted(set(self.files.values())):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    @property
    def nbytes(self) -> int:
        """Of the files of its tensors."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those of the named tensors that the folder has; no other tensor is read.

        Raises:
            CheckpointError: if a file is corrupt.
        """
        wanted: dict[Path, list[str]] = {}
        for name in names:
            if name in self.files:
                wanted.setdefault(self.files[name], []).append(name)
        return {name: tensor for path, own in wanted.items() for name, tensor in _read(path, own).items()}


def open_folder(path: Path) -> ModelFolder:
    """The model in a folder.

    Raises:
        CheckpointError: if there is none, or a file is missing or corrupt.
    """
    try:
        config = json.loads((path / CONFIG).read_text())
        if not isinstance(config, dict):
            raise ValueError(f"it is no object but {str(config)[:40]}")
    except (OSError, ValueError) as problem:
        raise CheckpointError(
            f"{path} is no model folder: {CONFIG} cannot be read ({problem}); give one that save_pretrained wrote"
        ) from problem
    files, sizes = {}, {}
    for file in weight_files(path):
        for name, size in _sizes(file).items():
            files[name], sizes[name] = file, size
    return ModelFolder(path, config, files, sizes)


def read_text_files(path: Path) -> dict[str, bytes]:
    """Those of `TEXT_FILES` that a folder has."""
    return {name: (path / name).read_bytes() for name in TEXT_FILES if (path / name).is_file()}


def write_text_files(path: Path, files: Mapping[str, bytes]) -> None:
    """Put such files into a folder; others are left out."""
    for name in set(TEXT_FILES) & files.keys():
        write_atomically(path / name, files[name])


def write_shard(path: Path, shard: str, tensors: Mapping[str, Tensor]) -> None:
    """Add some tensors of a model to a folder; `write_index` makes a model of its shards."""
    save_tensors(path / f"{shard}.safetensors", tensors, {"format": "pt"})


def has_shard(path: Path, shard: str, names: Iterable[str]) -> bool:
    """Whether a shard is there, whole, with these tensors and no others."""
    file = path / f"{shard}.safetensors"
    try:
        return file.exists() and _sizes(file).keys() == set(names)
    except CheckpointError:
        return False


def write_index(path: Path, config: Mapping[str, Any], names: Mapping[str, Iterable[str]]) -> None:
    """Make a model folder of shards that are there.

    Args:
        names: of the tensors in each shard.
    """
    weight_map = {name: f"{shard}.safetensors" for shard, own in names.items() for name in own}
    write_atomically(path / INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_atomically(path / CONFIG, json.dumps(config))


def _read(path: Path, names: list[str]) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (OSError, safetensors.SafetensorError) as problem:
        raise CheckpointError(f"{path} is corrupt ({problem}); restore it") from problem


def _names(file: Any) -> list[str]:
    return list(file.keys())


def _sizes(path: Path) -> dict[str, int]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: math.prod(file.get_slice(name).get_shape()) for name in _names(file)}
    except (OSError, safetensors.SafetensorError) as problem:
        raise CheckpointError(f"{path} is missing or corrupt ({problem}); restore it") from problem
