"""Examples: split once, partitioned without loss, and the same for everybody who has the seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ecogen.config import Data, Partition
from ecogen.errors import DataError
from ecogen.tuning.data import Examples, hide_labels, load_pictures, load_splits, partition_examples

LABELS = torch.from_numpy(np.random.default_rng(0).integers(0, 10, 400))

ways = st.sampled_from(["iid", "dirichlet"])
partitions = st.builds(Partition, across_edges=ways, within_edge=ways, alpha=st.floats(0.2, 10))
clusters = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(partition=partitions, clusters=clusters, seed=st.integers(0, 1000))
@settings(max_examples=40)
def test_every_example_is_in_one_cluster(partition: Partition, clusters: list[int], seed: int) -> None:
    parts = partition_examples(LABELS, partition, clusters, seed)
    assert [len(edge) for edge in parts] == clusters
    everything = np.concatenate([part for edge in parts for part in edge])
    assert sorted(everything) == list(range(len(LABELS)))
    assert min(len(part) for edge in parts for part in edge) > 0


@given(partition=partitions, clusters=clusters, seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_the_seed_alone_decides(partition: Partition, clusters: list[int], seed: int) -> None:
    one, other = (partition_examples(LABELS, partition, clusters, seed) for _ in range(2))
    assert all(np.array_equal(a, b) for e, f in zip(one, other, strict=True) for a, b in zip(e, f, strict=True))


@given(clusters=clusters)
def test_iid_parts_are_equally_large(clusters: list[int]) -> None:
    parts = partition_examples(LABELS, Partition(across_edges="iid", within_edge="iid"), clusters, 0)
    sizes = [len(part) for edge in parts for part in edge]
    assert max(sizes) - min(sizes) <= 2


def test_another_seed_is_another_partition() -> None:
    one, other = (partition_examples(LABELS, Partition(), [2, 2], seed)[0][0] for seed in (0, 1))
    assert not np.array_equal(one, other)


def unevenness(partition: Partition) -> float:
    """Mean total variation between the classes of a cluster and of all."""
    parts = [part for edge in partition_examples(LABELS, partition, [3, 3], 0) for part in edge]
    everywhere = np.bincount(LABELS, minlength=10) / len(LABELS)
    here = [np.bincount(LABELS[part], minlength=10) / len(part) for part in parts]
    return float(np.mean([np.abs(shares - everywhere).sum() / 2 for shares in here]))


def test_a_small_alpha_is_less_even_than_a_large_one_and_that_than_iid() -> None:
    iid = unevenness(Partition("iid", "iid"))
    small, large = (unevenness(Partition("dirichlet", "dirichlet", alpha)) for alpha in (0.2, 5.0))
    assert small > 1.5 * large > 1.5 * iid


def test_fewer_examples_than_clusters_are_refused() -> None:
    with pytest.raises(DataError, match="3 training examples cannot be divided over 4 clusters"):
        partition_examples(LABELS[:3], Partition(), [2, 2], 0)


def test_splits_are_disjoint_and_together_everything() -> None:
    splits = load_splits(Data(train=1000, validation=200), 8, 0)
    parts = (splits.train, splits.validation, splits.test)
    rows = [tuple(image.flatten().tolist()) for part in parts for image in part.images]
    assert len(rows) == 1797
    assert [len(splits.train), len(splits.validation)] == [1000, 200]
    assert len(set(rows)) == 1797  # no digit is there twice, so none is in two splits
    assert splits.num_labels == 10


def test_a_number_of_test_examples_gives_the_same_ones_whatever_is_trained_on() -> None:
    few, many = (load_splits(Data(train=train, validation=147, test=450), 8, 0) for train in (200, 1200))
    assert torch.equal(few.test.images, many.test.images)
    assert torch.equal(few.validation.images, many.validation.images)
    assert torch.equal(few.train.images, many.train.images[:200])
    assert [len(part) for part in (few.train, few.validation, few.test)] == [200, 147, 450]
    rows = {
        tuple(image.flatten().tolist()) for part in (many.train, many.validation, many.test) for image in part.images
    }
    assert len(rows) == 1797
    everything_else = load_splits(Data(train=1200, validation=147), 8, 0)
    assert torch.equal(everything_else.test.images, many.test.images)


def test_each_split_has_about_the_proportions_of_the_whole() -> None:
    splits = load_splits(Data(train=1000, validation=200), 8, 0)
    for part in (splits.train, splits.validation, splits.test):
        shares = np.bincount(part.labels, minlength=10) / len(part)
        assert np.abs(shares - 0.1).max() < 0.02


def test_splits_follow_the_seed() -> None:
    one, same, other = (load_splits(Data(train=100), 8, seed).train for seed in (0, 0, 1))
    assert torch.equal(one.images, same.images)
    assert not torch.equal(one.images, other.images)


def test_images_are_in_minus_one_to_one_and_of_the_size_asked_for() -> None:
    images = load_splits(Data(train=50), 14, 0).train.images
    assert images.shape == (50, 1, 14, 14)
    assert images.min() >= -1
    assert images.max() <= 1


def test_splits_without_test_examples_are_refused() -> None:
    with pytest.raises(DataError, match=r"data.train 1700 \+ data.validation 97 leave no test examples of 1797"):
        load_splits(Data(train=1700, validation=97), 8, 0)


def test_more_test_examples_than_are_left_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"leave 450 test examples of 1797, not the 451 of data.test; lower one of them"
    ):
        load_splits(Data(train=1200, validation=147, test=451), 8, 0)


# Labels that are hidden.


@given(share=st.floats(0.001, 1), size=st.integers(1, 400), seed=st.integers(0, 100))
@settings(max_examples=40)
def test_a_share_of_the_labels_is_kept_in_each_classs_proportion(share: float, size: int, seed: int) -> None:
    examples = Examples(torch.arange(size).float()[:, None, None, None], LABELS[:size])
    few = hide_labels(examples, share, [seed, 0])
    assert torch.equal(few.images, examples.images)
    kept = few.labels >= 0
    assert int(kept.sum()) == max(1, round(share * size))
    assert torch.equal(few.labels[kept], examples.labels[kept])
    assert torch.equal(few.labels, hide_labels(examples, share, [seed, 0]).labels)
    fair = share * np.bincount(examples.labels, minlength=10)
    # Whole numbers that must also add up to a whole number may be off by one and the rounding of the sum.
    assert np.abs(np.bincount(few.labels[kept], minlength=10) - fair).max() < 2


def test_another_device_keeps_other_labels_and_a_share_of_one_all() -> None:
    examples = Examples(torch.zeros(400, 1, 1, 1), LABELS)
    one, other = (hide_labels(examples, 0.1, [0, index]).labels >= 0 for index in (0, 1))
    assert not torch.equal(one, other)
    assert torch.equal(hide_labels(examples, 1.0, [0, 0]).labels, LABELS)


# Pictures of people.


def draw(path: Path, *, ink: int, ground: int, mode: str = "L") -> Path:
    pixels = np.full((40, 40), ground, dtype=np.uint8)
    pixels[10:30, 18:22] = ink
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_dark_on_light_and_light_on_dark_look_the_same_to_the_model(tmp_path: Path) -> None:
    dark = draw(tmp_path / "dark.png", ink=0, ground=255)
    light = draw(tmp_path / "light.png", ink=255, ground=0, mode="RGB")
    pictures = load_pictures([dark, light], 8)
    assert pictures.shape == (2, 1, 8, 8)
    assert torch.allclose(pictures[0], pictures[1], atol=1e-2)
    assert pictures[0, 0, 0, 0] == -1
    assert pictures[0, 0, 4, 4] > -0.5


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_picture_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read the picture .*bad\.png"):
        load_pictures([path], 8)


def test_a_picture_that_is_missing_or_cut_off_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        load_pictures([tmp_path / "missing.png"], 8)
    whole = draw(tmp_path / "whole.png", ink=0, ground=255).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot read the picture"):
        load_pictures([tmp_path / "cut.png"], 8)
