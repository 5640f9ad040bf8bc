"""Making the foundation model: what is put into the cache, and who else may read it."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError
from transformers import ViTModel

from ecogen import config as recipes
from ecogen.errors import StorageError
from ecogen.storage import make_folder
from ecogen.tuning.foundation import foundation_folder, obtain_foundation


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> recipes.Recipe:
    """Of a model that is made in no time, in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes = ("hidden_size=16", "num_blocks=1", "num_heads=2", "intermediate_size=16", "image_size=8", "patch_size=4")
    return recipes.load(
        "digits", [f"model.{size}" for size in sizes] + ["pretraining.steps=2", "pretraining.batch_size=4"]
    )


def test_others_may_read_what_was_made(recipe: recipes.Recipe) -> None:
    obtain_foundation(recipe, lambda *_: None)
    folder = foundation_folder(recipe)
    assert folder.stat().st_mode & 0o055 == 0o055
    assert {path.name for path in folder.iterdir() if not path.stat().st_mode & 0o044} == set()
    assert [*folder.parent.iterdir()] == [folder]


def test_of_two_that_make_the_same_the_first_is_kept(recipe: recipes.Recipe) -> None:
    first = list[int]()

    def on_step(*_: object) -> None:
        if not first:
            first.append(1)
            obtain_foundation(recipe, on_step)  # as another process would, meanwhile
            first.append((foundation_folder(recipe) / "made.json").stat().st_mtime_ns)

    _, how = obtain_foundation(recipe, on_step)
    assert how.startswith("made in")
    assert (foundation_folder(recipe) / "made.json").stat().st_mtime_ns == first[1]


def test_a_full_disk_is_told_as_one(recipe: recipes.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are written by a library that has an error of its own for it."""

    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(ViTModel, "save_pretrained", full)
    with pytest.raises(StorageError, match=r"cannot write to the cache .*No space left.*; set XDG_CACHE_HOME"):
        obtain_foundation(recipe, lambda *_: None)
    assert not [*foundation_folder(recipe).parent.iterdir()]


def test_what_a_crash_left_is_made_anew(recipe: recipes.Recipe) -> None:
    (make_folder(foundation_folder(recipe)) / "config.json").write_text("{")
    foundation, _ = obtain_foundation(recipe, lambda *_: None)
    assert foundation.config.hidden_size == 16
