"""The data sets that there are: scikit-learn's digits, which come along, and MNIST, which a file holds.

MNIST's training images are divided once, by lot and not by their order, since a file may be sorted by label: five
sixths are the cloud's, which learns from them without labels; devices own images of the other sixth, and validation
takes others of it. So the cloud sees no device's image.

Shapes: N images, S side of an image.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecogen.config import NUM_LABELS, Data
from ecogen.errors import DataError

Array = NDArray[np.generic]
Indices = NDArray[np.int64]

FOLDER_VARIABLE = "ECOGEN_DATA"
"""The environment variable that names the folder of data sets which do not come with EcoGen."""

_DIVISION_KEY = 6  # so that the lot is the same for every seed, and nobody else's

_PLACES = ("mnist/mnist.npz", "mnist.npz")  # below that folder
_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_REMEDY = (
    f"set {FOLDER_VARIABLE} to a folder that holds {_PLACES[0]}, an npz file with {', '.join(_ARRAYS)}; "
    "a recipe of data.name = 'mnist' may name that file as data.path, too"
)


@dataclass(frozen=True, eq=False)
class Pool:
    """Images [N, S, S] of whole numbers from 0, the ground, to `white`, and labels [N]."""

    images: Tensor
    labels: Tensor
    white: int

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class DataSet:
    """What devices may own and validation takes, and the test images where the data set keeps them apart."""

    own: Pool
    test: Pool | None = None


def open_data(data: Data) -> DataSet:
    """The data set of a recipe; one copy a process.

    Raises:
        DataError: if its file is missing or damaged.
    """
    return _digits() if data.name == "digits" else _mnist(*_found(data))


def read_corpus(data: Data) -> Tensor:
    """The unlabelled images [N, S, S] that are the cloud's, bytes from 0 to 255.

    Raises:
        DataError: if the data set's file is missing or damaged, or if it has no such images.
    """
    if data.name == "digits":
        raise DataError("all digits are the devices'; pre-train on glyphs: pretraining.corpus=glyphs")
    images = _checked(_found(data)[0])["x_train"]
    return torch.from_numpy(images[divided(len(images))[0]])


def corpus_digest(data: Data) -> str:
    """What tells two corpora apart, wherever their files are."""
    return _digest(*_found(data))


def resized(images: Tensor, size: int) -> Tensor:
    """Images [N, 1, S, S] at another size [N, 1, size, size], as they are if they have it."""
    if images.shape[-1] == size:
        return images
    shrinks = size < images.shape[-1]
    return torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear", antialias=shrinks)


@lru_cache(maxsize=1)
def _digits() -> DataSet:
    """scikit-learn's 1,797 handwritten digits of 8 x 8."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return DataSet(Pool(torch.tensor(digits.images, dtype=torch.uint8), torch.tensor(digits.target), white=16))


@lru_cache(maxsize=2)
def _mnist(path: Path, changed_ns: int) -> DataSet:
    """The parts of MNIST that are labelled: 18 MB, of 55."""
    arrays = _checked(path)
    _, own = divided(len(arrays["y_train"]))
    return DataSet(_pool(arrays["x_train"][own], arrays["y_train"][own]), _pool(arrays["x_test"], arrays["y_test"]))


@lru_cache(maxsize=2)
def _digest(path: Path, changed_ns: int) -> str:
    images = _checked(path)["x_train"]
    corpus = images[divided(len(images))[0]]
    return hashlib.sha256(repr(corpus.shape).encode() + corpus.tobytes()).hexdigest()


def _pool(images: Array, labels: Array) -> Pool:
    return Pool(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64)), white=255)


def divided(num_images: int) -> tuple[Indices, Indices]:
    """Which of the training images are the cloud's, of MNIST 50,000, and which may be the devices'."""
    order = np.random.default_rng(_DIVISION_KEY).permutation(num_images)
    unlabelled, own = np.split(order, [num_images * 5 // 6])
    return unlabelled, own


def _found(data: Data) -> tuple[Path, int]:
    """Where the file is, and when it was written: a file that was replaced is read anew.

    Raises:
        DataError: if it is nowhere.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    places = [Path(folder, place) for place in _PLACES] if folder else []
    if data.path:
        places = [Path(data.path).expanduser()]
    for path in places:
        if path.is_file():
            return path, path.stat().st_mtime_ns
    looked = f"there is no {' and no '.join(map(str, places))}" if places else "nothing says where it is"
    raise DataError(f"MNIST does not come with EcoGen, and {looked}; {_REMEDY}")


def _checked(path: Path) -> dict[str, Array]:
    """The arrays of an npz file.

    Raises:
        DataError: if it cannot be read, or with everything that is wrong with what it holds.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS if name in file}
    # numpy takes what is no archive for an array or a pickle: the one has no `with`, the other is a ValueError.
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as problem:
        raise DataError(f"{path} is no npz file, or is damaged ({problem}); {_REMEDY}") from problem
    if problems := list(_problems(arrays)):
        raise DataError(f"{path}: {'; '.join(problems)}; {_REMEDY}")
    return arrays


def _problems(arrays: Mapping[str, Array]) -> Iterator[str]:
    """What is wrong with a file's arrays."""
    yield from (f"{name} is missing" for name in _ARRAYS if name not in arrays)
    for part, fewest in (("train", 6), ("test", 1)):  # of six images one is the devices'
        images, labels = arrays.get(f"x_{part}"), arrays.get(f"y_{part}")
        images_fit, labels_fit = _are_images(images, fewest), _are_labels(labels)
        if images is not None and not images_fit:
            yield f"x_{part} should be {fewest} or more square images of uint8 [N, S, S], not {_described(images)}"
        if labels is not None and not labels_fit:
            yield f"y_{part} should be labels from 0 to {NUM_LABELS - 1} [N], not {_described(labels)}"
        if images is not None and labels is not None and images_fit and labels_fit and len(images) != len(labels):
            yield f"x_{part} has {len(images)} images, but y_{part} {len(labels)} labels"


def _are_images(array: Array | None, fewest: int) -> bool:
    if array is None or array.dtype != np.uint8 or array.ndim != 3:
        return False
    return len(array) >= fewest and array.shape[1] == array.shape[2] > 0


def _are_labels(array: Array | None) -> bool:
    if array is None or array.dtype.kind not in "iu" or array.ndim != 1:
        return False
    return set(np.unique(array).tolist()) <= set(range(NUM_LABELS))


def _described(array: Array) -> str:
    values = f" from {array.min()} to {array.max()}" if array.size and array.dtype.kind in "iuf" else ""
    return f"{array.dtype} {list(array.shape)}{values}"
