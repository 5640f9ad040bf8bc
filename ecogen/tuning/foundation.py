"""Where the foundation model comes from: pre-trained here and cached, a folder, or the hub."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedConfig

from ecogen import config as recipes
from ecogen.errors import CheckpointError, ConfigError, StorageError
from ecogen.models.checkpoint import Foundation, open_foundation, save_tensors, write_files
from ecogen.runtime.delivery import fetch_tensors
from ecogen.storage import cache_folder, make_folder, put_folder, write_atomically
from ecogen.transport.base import Transport
from ecogen.tuning.making import OnStep, identity_of, make_model
from ecogen.tuning.parallel import on_one_thread

Compute = Callable[..., Awaitable[Any]]


def obtain_foundation(recipe: recipes.Recipe, on_step: OnStep) -> tuple[Foundation, str]:
    """The foundation model of a recipe, and in words how it came about.

    Raises:
        CheckpointError: if a folder is no model's, or the hub cannot be reached.
        ConfigError: if it is a model of text for images, or the other way round.
        DataError: if the data set that it learns from is missing or damaged.
        StorageError: if the cache cannot be written.
    """
    source = recipe.model.source
    if source.startswith("hf:"):
        downloaded = open_foundation(_download(source.removeprefix("hf:")))
        return of_kind(downloaded, recipe), f"from the hub: {source}"
    if source not in recipes.MADE_HERE:
        return of_kind(open_foundation(Path(source)), recipe), f"from the folder {source}"
    folder = foundation_folder(recipe)
    if (folder / "made.json").exists():
        return open_foundation(folder), _how(folder, "from the cache; made in")
    _make(recipe, folder, on_step)
    return open_foundation(folder), _how(folder, "made in")


async def fetch_foundation(
    transport: Transport,
    node_id: str,
    config: PreTrainedConfig,
    names: list[str],
    folder: Path,
    compute: Compute,
    *,
    counted: bool = True,
) -> Foundation:
    """The named tensors of the backbone from another node, written into a folder.

    Args:
        compute: runs a function on a thread.
        counted: False keeps it out of the books of both.

    Raises:
        CheckpointError: if it was not sent whole.
        NodeLostError: if the node is lost.
    """
    tensors = await fetch_tensors(transport, node_id, names, counted=counted)
    weights = await compute(write_files, folder, tensors)
    await compute(save_tensors, folder / "model.safetensors", weights, {"format": "pt"})
    write_atomically(folder / "config.json", json.dumps(config.to_dict()))
    return open_foundation(folder)


def foundation_folder(recipe: recipes.Recipe) -> Path:
    """Where the model is cached, by everything that makes it what it is.

    Raises:
        DataError: if the data set that it learns from is missing or damaged.
    """
    return cache_folder() / "foundation" / identity_of(recipe)


def of_kind(foundation: Foundation, recipe: recipes.Recipe) -> Foundation:
    """The foundation model, if it is one for the recipe's examples.

    Raises:
        ConfigError: if it is a decoder of text for images, or the other way round.
    """
    if foundation.is_text == recipe.data.is_text:
        return foundation
    kind, examples = ("text", "images") if foundation.is_text else ("images", "text")
    raise ConfigError(
        [
            f"model.source: {recipe.model.source} is a {foundation.config.model_type!r} model of {kind}, but data.name "
            f"{recipe.data.name!r} is of {examples}; change one of them"
        ]
    )


def known_folder(recipe: recipes.Recipe) -> Path | None:
    """Where the foundation model is already; None where it has to be made or fetched first."""
    source = recipe.model.source
    if source in recipes.MADE_HERE:
        folder = foundation_folder(recipe)
        return folder if (folder / "made.json").exists() else None
    return None if source.startswith("hf:") else Path(source)


def _make(recipe: recipes.Recipe, folder: Path, on_step: OnStep) -> None:
    """Make the model, and put the finished folder in place in one step: another process may do the same."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    with on_one_thread():
        model = make_model(recipe, on_step)
    made = {"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s, "time_s": time.time()}
    make_folder(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        finished = make_folder(Path(temporary) / "model")  # the temporary folder itself is nobody else's to read
        try:
            model.save(finished)
        except (OSError, SafetensorError) as problem:
            raise StorageError(f"cannot write to the cache {folder.parent}: {problem}; set XDG_CACHE_HOME") from problem
        write_atomically(finished / "made.json", json.dumps(made))
        _put_in_place(finished, folder)


def _put_in_place(finished: Path, folder: Path) -> None:
    if folder.exists() and not (folder / "made.json").exists():
        shutil.rmtree(folder)
    try:
        put_folder(finished, folder)
    except StorageError:
        if not (folder / "made.json").exists():  # or else another process was first
            raise


def _how(folder: Path, verb: str) -> str:
    made = json.loads((folder / "made.json").read_text())
    return f"{verb} {made['wall_s']:.0f} s ({made['cpu_s']:.0f} CPU s)"


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repository, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
            )
        )
    except Exception as problem:
        raise CheckpointError(
            f"cannot get {repository!r} from the hub ({type(problem).__name__}: {problem}); "
            "download it where there is a network, then give its folder as model.source"
        ) from problem
