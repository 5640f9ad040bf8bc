"""MNIST from a file: found, checked, and divided between the cloud and the devices."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ecogen import config as recipes
from ecogen.config import Data, Pretraining
from ecogen.errors import ConfigError, DataError
from ecogen.tuning.corpus import open_corpus
from ecogen.tuning.data import load_splits
from ecogen.tuning.datasets import FOLDER_VARIABLE, corpus_digest, divided, open_data, read_corpus
from ecogen.tuning.foundation import foundation_folder, obtain_foundation
from tests.command import Ran, save_recipe, started

EcoGen = Callable[..., Ran]
RecipeOf = Callable[..., recipes.Recipe]


def arrays_of(num_train: int = 600, num_test: int = 90, side: int = 8, seed: int = 0) -> dict[str, Any]:
    """Arrays as MNIST's, sorted by label as a file may be, each image another; a class is where it is bright."""
    draw = np.random.default_rng(seed)

    def part(count: int) -> tuple[Any, Any]:
        labels = np.sort(np.arange(count) % 10).astype(np.uint8)
        images = draw.integers(0, 60, (count, side, side), dtype=np.uint8)
        images[np.arange(count), labels % side, :] += 190 + 6 * (labels // side)[:, None]
        return images, labels

    (x_train, y_train), (x_test, y_test) = part(num_train), part(num_test)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def save(path: Path, **changes: Any) -> Path:
    arrays = arrays_of() | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("data") / "somewhere.npz")


def data_at(path: Path | str, **values: Any) -> Data:
    return Data(name="mnist", path=str(path), **({"train": 60, "validation": 20} | values))


def images_of(part: torch.Tensor) -> list[bytes]:
    return [np.rint((image.numpy() + 1) / 2 * 255).astype(np.uint8).tobytes() for image in part]


def test_the_cloud_the_devices_validation_and_the_test_have_no_image_in_common(path: Path) -> None:
    data, arrays = data_at(path, train=70, validation=30), arrays_of()
    splits = load_splits(data, 8, 0)
    corpus = [image.tobytes() for image in read_corpus(data).numpy()]
    owned = images_of(splits.train.images) + images_of(splits.validation.images)
    assert (len(corpus), len(owned)) == (500, 100)
    assert sorted(corpus + owned) == sorted(image.tobytes() for image in arrays["x_train"])
    assert len(set(corpus + owned)) == 600
    assert sorted(images_of(splits.test.images)) == sorted(image.tobytes() for image in arrays["x_test"])
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [70, 30, 90]


def test_every_class_is_in_every_part_of_a_file_that_is_sorted_by_label(path: Path) -> None:
    splits, (unlabelled, own) = load_splits(data_at(path), 8, 0), divided(600)
    labels = arrays_of()["y_train"]
    assert np.bincount(labels[unlabelled], minlength=10).min() > 40
    assert np.bincount(labels[own], minlength=10).min() > 4
    for part in (splits.train, splits.validation, splits.test):
        assert set(part.labels.tolist()) == set(range(10))


def test_images_keep_their_labels(path: Path) -> None:
    splits, arrays = load_splits(data_at(path), 8, 3), arrays_of()
    images, labels = (np.concatenate([arrays[f"{kind}_{part}"] for part in ("train", "test")]) for kind in "xy")
    known = dict(zip((image.tobytes() for image in images), labels.tolist(), strict=True))
    for part in (splits.train, splits.validation, splits.test):
        assert [known[image] for image in images_of(part.images)] == part.labels.tolist()
    assert splits.num_labels == 10


def test_the_seed_draws_what_is_tuned_on_and_never_what_is_tested_on(path: Path) -> None:
    one, other = (load_splits(data_at(path, test=40), 8, seed) for seed in (0, 1))
    assert images_of(one.train.images) != images_of(other.train.images)
    assert images_of(one.test.images) == images_of(other.test.images)
    assert np.bincount(one.test.labels, minlength=10).tolist() == [4] * 10
    more = load_splits(data_at(path, train=80, test=40), 8, 0)
    assert images_of(more.train.images)[:60] == images_of(one.train.images)


def test_one_process_holds_one_copy_and_another_file_is_read_anew(tmp_path: Path) -> None:
    path = save(tmp_path / "mnist.npz")
    first = load_splits(data_at(path), 8, 0)
    assert load_splits(data_at(path), 8, 0) is first
    arrays = arrays_of(seed=1)
    save(path, **arrays)
    os.utime(path, ns=(0, 1))
    assert images_of(load_splits(data_at(path), 8, 0).train.images) != images_of(first.train.images)


def test_other_sizes_are_asked_for(path: Path) -> None:
    for size in (4, 12):
        images = load_splits(data_at(path), size, 0).train.images
        assert images.shape == (60, 1, size, size)
        assert -1 <= images.min() < images.max() <= 1


@pytest.mark.parametrize("place", ["mnist/mnist.npz", "mnist.npz"])
def test_it_is_found_under_the_folder_of_data_sets(
    place: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / place)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert torch.equal(open_data(data_at("")).own.images, open_data(data_at(path)).own.images)


def test_a_missing_file_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    remedy = "set ECOGEN_DATA to a folder that holds mnist/mnist.npz"
    with pytest.raises(DataError, match=f"nothing says where it is; .*{remedy}"):
        open_data(data_at(""))
    with pytest.raises(DataError, match=rf"there is no .*other\.npz; .*{remedy}"):
        open_data(data_at(tmp_path / "other.npz"))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(DataError, match=r"there is no .*mnist/mnist\.npz and no .*mnist\.npz"):
        open_data(data_at(""))


def contents(path: Path) -> list[bytes]:
    whole, array = path.read_bytes(), path.with_suffix(".npy")
    np.save(array, np.zeros(3))
    return [b"", b"nonsense", whole[:3000], whole[:5000] + bytes(2000) + whole[7000:], array.read_bytes()]


@pytest.mark.parametrize("which", range(5))
def test_what_is_no_archive_or_a_damaged_one_is_refused_by_name(which: int, path: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(contents(path)[which])
    with pytest.raises(DataError, match=r"bad\.npz is no npz file, or is damaged \(.*data\.path"):
        open_data(data_at(tmp_path / "bad.npz"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"y_test": None, "x_train": None}, "x_train is missing; y_test is missing"),
        ({"x_train": np.zeros((600, 64), np.uint8)}, r"x_train should be .*\[N, S, S\], not uint8 \[600, 64\] from 0"),
        ({"x_test": np.zeros((90, 8, 8))}, r"x_test should be .* of uint8 .*, not float64 \[90, 8, 8\] from 0.0 to"),
        ({"x_test": np.zeros((90, 8, 9), np.uint8)}, r"x_test should be 1 or more square images"),
        ({"y_train": np.full(600, 10, np.uint8)}, r"y_train should be labels from 0 to 9 \[N\], not .* from 10 to 10"),
        ({"y_train": np.zeros(600)}, "y_train should be labels .*, not float64"),
        ({"y_test": np.zeros(89, np.uint8)}, "x_test has 90 images, but y_test 89 labels"),
    ],
)
def test_arrays_that_do_not_fit_are_named_with_what_they_are(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said):
        open_data(data_at(save(tmp_path / "odd.npz", **changes)))


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    labels = np.array([{"any": "object"}] * 600, dtype=object)
    with pytest.raises(DataError, match="Object arrays cannot be loaded"):
        open_data(data_at(save(tmp_path / "objects.npz", y_train=labels)))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train": 90}, r"data.train 90 \+ data.validation 20 are more than the 100 images that devices may own"),
        ({"test": 91}, r"data.test 91 is more than the 90 test images"),
    ],
)
def test_more_examples_than_there_are_are_refused(values: dict[str, Any], said: str, path: Path) -> None:
    with pytest.raises(DataError, match=said):
        load_splits(data_at(path, **values), 8, 0)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.path=/a.npz", "data.path: digits come with scikit-learn, not from '/a.npz'"),
        ("pretraining.corpus=data", "pretraining.corpus: 'data' needs a data set with images that no device owns"),
        (
            "data.name=minst",
            "data.name: input should be 'digits', 'mnist', 'documentation', 'text' or 'pairs', not 'minst'",
        ),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipes.load("digits", [override])


# The corpus, and the model that is made of it.


def small(path: Path, *more: str) -> recipes.Recipe:
    sizes = ("hidden_size=16", "num_blocks=1", "num_heads=2", "intermediate_size=16", "image_size=8", "patch_size=4")
    overrides = [f"model.{size}" for size in sizes] + ["pretraining.steps=2", "pretraining.batch_size=4"]
    own = ["data.name=mnist", f"data.path={path}", "data.train=60", "data.validation=20", "pretraining.corpus=data"]
    return recipes.load("digits", [*overrides, *own, *more])


def test_labels_devices_images_and_test_images_have_no_part_in_the_model(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    one, _ = obtain_foundation(small(path), lambda *_: None)
    changed = arrays_of(seed=7)
    unlabelled, _ = divided(600)
    changed["x_train"][unlabelled] = arrays_of()["x_train"][unlabelled]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    other, _ = obtain_foundation(small(save(tmp_path / "changed.npz", **changed)), lambda *_: None)
    assert one.digest == other.digest


def test_the_cache_knows_a_corpus_by_its_content_wherever_it_is(path: Path, tmp_path: Path) -> None:
    copied, arrays = save(tmp_path / "copy.npz"), arrays_of()
    assert corpus_digest(data_at(copied)) == corpus_digest(data_at(path))
    assert foundation_folder(small(copied)) == foundation_folder(small(path))
    arrays["x_train"][divided(600)[0][0], 0, 0] ^= 1
    other = save(tmp_path / "other.npz", **arrays)
    assert foundation_folder(small(other)) != foundation_folder(small(path))
    assert foundation_folder(small(path, "pretraining.corpus=glyphs")) != foundation_folder(small(path))


def test_views_are_of_their_images_and_in_the_devices_range(path: Path) -> None:
    corpus = open_corpus(Pretraining(corpus="data"), data_at(path))
    views = corpus.views(torch.tensor([0, 1, 0]), 12, torch.Generator().manual_seed(0))
    assert views.shape == (3, 1, 12, 12)
    assert -1 <= views.min() < views.max() <= 1
    assert not torch.equal(views[0], views[2])


def test_what_features_are_standardised_over_are_the_images_as_devices_would_have_them(path: Path) -> None:
    corpus = open_corpus(Pretraining(corpus="data"), data_at(path))
    examples = corpus.examples(7, 8, torch.Generator())
    assert images_of(examples) == [image.tobytes() for image in arrays_of()["x_train"][divided(600)[0][:7]]]
    assert corpus.examples(2, 12, torch.Generator()).shape == (2, 1, 12, 12)


# Whole runs.


def mnist_recipe(recipe_of: RecipeOf, path: Path | str, **sections: Any) -> recipes.Recipe:
    data = {"name": "mnist", "path": str(path), "train": 48, "validation": 20, "test": 30}
    return recipe_of(data=data, evaluation={"split": "test", "requests": 1}, **sections)


def test_a_run_without_its_data_set_ends_with_two_and_says_what_to_set(
    ecogen: EcoGen, recipe_of: RecipeOf, tmp_path: Path
) -> None:
    recipe = mnist_recipe(recipe_of, tmp_path / "nowhere.npz")
    ran = ecogen("run", save_recipe(recipe, tmp_path / "recipe.toml"), "--out", tmp_path / "run")
    assert ran.code == 2
    assert "set ECOGEN_DATA to a folder" in ran.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # two whole runs
def test_every_process_of_a_local_run_finds_it(
    ecogen: EcoGen, recipe_of: RecipeOf, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    file, found = save_recipe(mnist_recipe(recipe_of, path), tmp_path / "recipe.toml"), []
    for engine in ("inproc", "local"):
        ran = ecogen("run", file, "--engine", engine, "--out", tmp_path / engine, "--json")
        assert ran.code == 0, ran.err
        found.append(ran.figures["accuracy"])
    assert found[0] == found[1]


@pytest.mark.slow  # a command of its own, since a fork server keeps the environment that it was started in
def test_every_process_of_a_local_run_finds_it_by_the_environment(
    recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(save(tmp_path / "mnist.npz").parent))
    file = save_recipe(mnist_recipe(recipe_of, ""), tmp_path / "recipe.toml")
    with started("run", file, "--engine", "local", "--out", tmp_path / "local") as command:
        assert command.wait(timeout=90) == 0
    assert json.loads((tmp_path / "local" / "summary.json").read_text())["rounds"] == 2


@pytest.mark.skipif(FOLDER_VARIABLE not in os.environ, reason=f"{FOLDER_VARIABLE} names no folder with MNIST")
def test_the_real_file_is_mnist() -> None:
    source = open_data(Data(name="mnist"))
    assert source.test is not None
    assert (len(source.own), len(source.test), source.own.images.shape[1:]) == (10_000, 10_000, (28, 28))
    assert np.bincount(source.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert len(read_corpus(Data(name="mnist"))) == 50_000
    assert np.bincount(source.own.labels, minlength=10).min() > 800
