"""Labelled examples: a data set split once, and partitioned over clusters.

Every node makes the same split and partition from the seed, and reads only its own part.
Shapes: N examples, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecogen.config import NUM_LABELS, Data, Partition
from ecogen.errors import DataError
from ecogen.tuning.datasets import DataSet, Pool, open_data, resized

Indices = NDArray[np.int64]

_SPLIT_KEY, _PARTITION_KEY, _TEST_KEY = 1, 2, 5  # so that the same seed draws different numbers for different purposes
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

    @property
    def inputs(self) -> Tensor:
        """What enters a model."""
        return self.images

    @property
    def is_known(self) -> Tensor:
        """Which have a label [N]."""
        return self.labels >= 0

    def trimmed(self) -> Examples:
        """The same; of images nothing is padding."""
        return self

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Sequence[int] | Indices | Tensor) -> Examples:
        chosen = torch.as_tensor(np.asarray(indices))
        return Examples(self.images[chosen], self.labels[chosen], None if self.keys is None else self.keys[chosen])

    def split(self, count: int) -> list[Examples]:
        """So many parts of nearly equal size, in order; they share the memory."""
        keys = [None] * count if self.keys is None else self.keys.tensor_split(count)
        parts = zip(self.images.tensor_split(count), self.labels.tensor_split(count), keys, strict=True)
        return [Examples(*part) for part in parts]


class Splits:
    """Training, validation and test examples, disjoint; pixels are converted when a part is first asked for.

    Args:
        parts: for each, where it is from and which images it has.
    """

    num_labels = NUM_LABELS

    def __init__(self, parts: Sequence[tuple[Pool, Indices]], image_size: int) -> None:
        self._parts, self._image_size = parts, image_size

    @cached_property
    def train(self) -> Examples:
        """What the devices own."""
        return self._examples(0)

    @cached_property
    def validation(self) -> Examples:
        """What hyper-parameters are chosen by."""
        return self._examples(1)

    @cached_property
    def test(self) -> Examples:
        """What results are told of."""
        return self._examples(2)

    def _examples(self, part: int) -> Examples:
        pool, chosen = self._parts[part]
        images = pool.images[chosen].to(torch.float32)[:, None] / pool.white
        return Examples(resized(images, self._image_size) * 2 - 1, pool.labels[chosen])


def load_splits(data: Data, image_size: int, seed: int) -> Splits:
    """The data set, shuffled by the seed and split with each class in proportion; one copy a process.

    Test examples are of the data set's own test images where it has some: the same for every seed.

    Raises:
        DataError: if the data set is missing or damaged, or has too few examples for the splits.
    """
    source = open_data(data)
    return _split(source, data.train, data.validation, _num_test(source, data), image_size, seed)


def _num_test(source: DataSet, data: Data) -> int:
    """How many test examples there are to be.

    Raises:
        DataError: if the splits ask for more examples than there are.
    """
    asked = f"data.train {data.train} + data.validation {data.validation}"
    left = len(source.own) - data.train - data.validation
    if source.test is not None:
        if left < 0:
            raise DataError(f"{asked} are more than the {len(source.own)} images that devices may own; lower one")
        if data.test > len(source.test):
            raise DataError(f"data.test {data.test} is more than the {len(source.test)} test images; lower it")
        return data.test or len(source.test)
    if not 1 <= (data.test or left) <= left:
        raise DataError(
            f"{asked} leave {max(0, left) or 'no'} test examples of {len(source.own)}"
            f"{f', not the {data.test} of data.test' if data.test else ''}; lower one of them"
        )
    return data.test or left


@lru_cache(maxsize=2)
def _split(source: DataSet, num_train: int, num_validation: int, num_test: int, image_size: int, seed: int) -> Splits:
    own, tested_on = source.own, source.own if source.test is None else source.test
    kept = _stratified_order(own.labels, np.random.default_rng([seed, _SPLIT_KEY]))
    if source.test is None:
        kept, test = np.split(kept, [len(kept) - num_test])
    else:
        test = _stratified_order(tested_on.labels, np.random.default_rng([_TEST_KEY]))[:num_test]
    validation = kept[len(kept) - num_validation :]
    return Splits(((own, kept[:num_train]), (own, validation), (tested_on, test)), image_size)


def partition_examples(
    labels: Tensor,
    partition: Partition,
    clusters_of_edges: Sequence[int],
    seed: int,
    known: Sequence[Sequence[int]] | None = None,
) -> list[list[Indices]]:
    """Indices of the training examples by edge and cluster: every example once that an edge knows the label of.

    Args:
        labels: [N] class indices.
        clusters_of_edges: how many clusters each edge has.
        known: the labels that each edge knows; None for all. Labels that the same edges know are divided together.

    Raises:
        DataError: if there are fewer examples than clusters.
    """
    rng = np.random.default_rng([seed, _PARTITION_KEY])
    numbers = labels.numpy()
    if len(numbers) < sum(clusters_of_edges):
        raise DataError(f"{len(numbers)} training examples cannot be divided over {sum(clusters_of_edges)} clusters")
    parts: list[list[Indices]] = [[np.arange(0)] for _ in clusters_of_edges]
    for members, group in _by_who_knows(numbers, known or [np.unique(numbers).tolist()] * len(parts)):
        sizes = [clusters_of_edges[edge] for edge in group]
        shares = _divide(members, numbers, partition.across_edges, sizes, partition.alpha, rng)
        for edge, share in zip(group, shares, strict=True):
            parts[edge].append(share)
    edges = [np.sort(np.concatenate(part)) for part in parts]
    for edge, (own, count) in enumerate(zip(edges, clusters_of_edges, strict=True)):
        if len(own) < count:
            raise DataError(f"edge {edge} has {len(own)} training examples of its labels, for {count} clusters")
    return [
        _divide(edge, numbers, partition.within_edge, [1] * count, partition.alpha, rng)
        for edge, count in zip(edges, clusters_of_edges, strict=True)
    ]


def _by_who_knows(labels: Indices, known: Sequence[Sequence[int]]) -> list[tuple[Indices, tuple[int, ...]]]:
    """Examples by the edges that know their labels; those that nobody knows are left out."""
    knowing = {int(label): tuple(e for e, own in enumerate(known) if label in own) for label in np.unique(labels)}
    groups = sorted(set(knowing.values()) - {()})
    return [(np.flatnonzero(np.isin(labels, [n for n in knowing if knowing[n] == group])), group) for group in groups]


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
