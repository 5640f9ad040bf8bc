"""Labelled examples: scikit-learn's digits, split once and partitioned over clusters.

Every node makes the same split and partition from the seed, and reads only its own part.
Shapes: N examples, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecogen.config import Data, Partition
from ecogen.errors import DataError

Indices = NDArray[np.int64]

_SPLIT_KEY, _PARTITION_KEY = 1, 2  # so that the same seed draws different numbers for different purposes
_LABELLED_KEY = 6  # 3 to 5 are `tuning.device`'s

UNLABELLED = -1


@dataclass(frozen=True)
class Examples:
    """Images [N, C, H, W] in [-1, 1] and labels [N], below zero where there is none.

    Attributes:
        keys: of the images, where they come again and again [N].
    """

    images: Tensor
    labels: Tensor
    keys: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Sequence[int] | Indices | Tensor) -> Examples:
        chosen = torch.as_tensor(np.asarray(indices))
        return Examples(self.images[chosen], self.labels[chosen], None if self.keys is None else self.keys[chosen])


@dataclass(frozen=True)
class Splits:
    """Training, validation and test examples; together the whole data set, disjoint."""

    train: Examples
    validation: Examples
    test: Examples
    num_labels: int


def load_splits(data: Data, image_size: int, seed: int) -> Splits:
    """The data set, shuffled by the seed and split with each class in proportion.

    Raises:
        DataError: if the data set has too few examples for the splits.
    """
    images, labels = _digits(image_size)
    left = len(labels) - data.train - data.validation
    num_test = data.test or left
    if not 1 <= num_test <= left:
        raise DataError(
            f"data.train {data.train} + data.validation {data.validation} leave {max(0, left) or 'no'} test examples "
            f"of {len(labels)}{f', not the {data.test} of data.test' if data.test else ''}; lower one of them"
        )
    order = _stratified_order(labels, np.random.default_rng([seed, _SPLIT_KEY]))
    kept, test = np.split(order, [len(order) - num_test])
    parts = (kept[: data.train], kept[len(kept) - data.validation :], test)
    train, validation, test_examples = (Examples(images[part], labels[part]) for part in parts)
    return Splits(train, validation, test_examples, num_labels=int(labels.max()) + 1)


def partition_examples(
    labels: Tensor, partition: Partition, clusters_of_edges: Sequence[int], seed: int
) -> list[list[Indices]]:
    """Indices of the training examples by edge and cluster: every example once.

    Args:
        labels: [N] class indices.
        clusters_of_edges: how many clusters each edge has.

    Raises:
        DataError: if there are fewer examples than clusters.
    """
    rng = np.random.default_rng([seed, _PARTITION_KEY])
    numbers = labels.numpy()
    if len(numbers) < sum(clusters_of_edges):
        raise DataError(f"{len(numbers)} training examples cannot be divided over {sum(clusters_of_edges)} clusters")
    edges = _divide(np.arange(len(numbers)), numbers, partition.across_edges, clusters_of_edges, partition.alpha, rng)
    return [
        _divide(edge, numbers, partition.within_edge, [1] * count, partition.alpha, rng)
        for edge, count in zip(edges, clusters_of_edges, strict=True)
    ]


def hide_labels(examples: Examples, share: float, key: Sequence[int]) -> Examples:
    """The same examples, of which this share keep their labels, each class in proportion; at least one does.

    Args:
        key: what the random numbers are drawn from.
    """
    order = _stratified_order(examples.labels, np.random.default_rng([*key, _LABELLED_KEY]))
    hidden = order[max(1, round(share * len(order))) :]
    labels = examples.labels.clone()
    labels[torch.from_numpy(hidden)] = UNLABELLED
    return Examples(examples.images, labels)


def _divide(
    indices: Indices, labels: Indices, how: str, sizes: Sequence[int], alpha: float, rng: np.random.Generator
) -> list[Indices]:
    """Divide examples into parts, alike or with each class's shares drawn from a Dirichlet distribution."""
    if how == "iid":
        bounds = np.cumsum(sizes)[:-1] * len(indices) // sum(sizes)
        return [np.sort(part) for part in np.split(rng.permutation(indices), bounds)]
    while True:  # draw again where a part would be left with too little to learn from
        parts = _dirichlet(indices, labels, len(sizes), alpha, rng)
        if min(len(part) for part in parts) >= min(10, len(indices) // (2 * len(sizes))):
            return parts


def _dirichlet(
    indices: Indices, labels: Indices, num_parts: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    """Hsu et al. 2019, section 3: https://arxiv.org/abs/1909.06335, with the shares drawn class by class."""
    parts: list[list[Indices]] = [[] for _ in range(num_parts)]
    for label in np.unique(labels[indices]):
        members = rng.permutation(indices[labels[indices] == label])
        bounds = np.cumsum(rng.dirichlet([alpha] * num_parts))[:-1] * len(members)
        for part, share in zip(parts, np.split(members, bounds.astype(int)), strict=True):
            part.append(share)
    return [np.sort(np.concatenate(part)) for part in parts]


def _stratified_order(labels: Tensor, rng: np.random.Generator) -> Indices:
    """An order of all examples in which every stretch has about the classes' proportions."""
    numbers = labels.numpy()
    position = np.empty(len(numbers))
    for label in np.unique(numbers):
        members = rng.permutation(np.flatnonzero(numbers == label))
        position[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(position, kind="stable")


@lru_cache(maxsize=2)
def _digits(image_size: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8, enlarged bilinearly."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    enlarged = torch.nn.functional.interpolate(images, size=(image_size, image_size), mode="bilinear")
    return enlarged * 2 - 1, torch.tensor(digits.target, dtype=torch.int64)


def load_pictures(paths: Sequence[Path], image_size: int) -> Tensor:
    """PNG files as the model wants them: [N, 1, image_size, image_size] in [-1, 1], light strokes on a dark ground.

    A picture with a light ground is inverted, as people draw digits that way.

    Raises:
        DataError: if a file is missing or no picture.
    """
    return torch.cat([_picture(path, image_size) for path in paths])


def _picture(path: Path, image_size: int) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L"), dtype=np.float32) / 255
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as problem:
        raise DataError(f"cannot read the picture {path}: {problem}; give a PNG file") from problem
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    light = torch.from_numpy(1 - pixels if np.median(border) > 0.5 else pixels)[None, None]
    scaled = torch.nn.functional.interpolate(light, size=(image_size, image_size), mode="bilinear", antialias=True)
    return scaled * 2 - 1
