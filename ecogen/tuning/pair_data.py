"""The pairs of each edge: handwritten digits with captions, or a folder of images that says what they show.

Every node makes the same division from the seed. Several edges may have pairs of one source: each label's examples are
dealt over those that know it, so that no two edges have the same. Where an edge's domain changes with the rounds, what
it has then is dealt as that of one more edge would be: all of it is new.

Shapes: N pairs, C channels, S side of an image.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ecogen.config import NUM_LABELS, Data, PairSource, Recipe
from ecogen.errors import DataError
from ecogen.models.image_tokenizer import ImageTokenizer, ImageTokens
from ecogen.models.pictures import read_picture
from ecogen.tuning.captions import digit_caption
from ecogen.tuning.datasets import FOLDER_VARIABLE, open_data, resized
from ecogen.tuning.pairs import Pairs, PairWriter
from ecogen.tuning.passages import Passages
from ecogen.tuning.text import TextSplits

CAPTIONS = "captions.jsonl"
"""Beside the images of a folder: a line for each, such as {"file": "72x72/1f302.png", "caption": "closed umbrella"}."""

WRITTEN = ("digits", "mnist")
"""The sources that are handwritten digits."""

_Share = tuple[str, int]
"""Whose pairs: an edge's, in one of its domains."""

_DEAL_KEY, _SPLIT_KEY = 10, 11  # so that the same seed draws different numbers for different purposes


class _Line(msgspec.Struct):
    file: str
    caption: str


@dataclass(frozen=True)
class PairSplits:
    """An edge's pairs, disjoint."""

    train: Pairs
    validation: Pairs
    test: Pairs


def domains_of(data: Data, edge_id: str) -> Sequence[PairSource]:
    """What an edge's pairs are of, at first and then."""
    return data.sources.get(edge_id, PairSource()).domains


def domain_at(data: Data, edge_id: str, round_index: int) -> int:
    """Which of its domains an edge has in a round."""
    later = data.sources.get(edge_id, PairSource()).later
    return int(later is not None and round_index + 1 >= later.round)


def source_of(data: Data, edge_id: str, domain: int = 0) -> str:
    """Where an edge's pairs are from: one of `WRITTEN`, or a folder's path."""
    return domains_of(data, edge_id)[domain].name


def read_pairs(
    data: Data, edge_ids: Sequence[str], edge_id: str, size: tuple[int, int], seed: int, domain: int = 0
) -> PairSplits:
    """An edge's pairs.

    Args:
        size: C and S.
        domain: which of the edge's domains they are of.

    Raises:
        DataError: if its source is missing or damaged, or has too few.
    """
    source, own_share = source_of(data, edge_id, domain), (edge_id, domain)
    shares = {(name, place): own for name in edge_ids for place, own in enumerate(domains_of(data, name))}
    sharing = {share: own.labels or range(NUM_LABELS) for share, own in shares.items() if own.name == source}
    if source in WRITTEN:
        own = _written(source, sharing, own_share, size, seed)
    else:
        pairs = _of_folder(_folder(source), size)
        order = np.random.default_rng([seed, _DEAL_KEY]).permutation(len(pairs))
        own = pairs[np.sort(order[list(sharing).index(own_share) :: len(sharing)])]
    key = [seed, edge_ids.index(edge_id), _SPLIT_KEY, domain]
    return _split(own, data, edge_id, key[:-1] if domain == 0 else key)


def _written(
    source: str, known: Mapping[_Share, Sequence[int]], own: _Share, size: tuple[int, int], seed: int
) -> Pairs:
    """An edge's share of the digits that it knows.

    Args:
        known: the labels of everyone who has a share.
    """
    pool = open_data(Data(name="mnist" if source == "mnist" else "digits")).own
    generator, shares = np.random.default_rng([seed, _DEAL_KEY]), list[NDArray[np.int64]]()
    for label in range(NUM_LABELS):
        knowing = [share for share, labels in known.items() if label in labels]
        order = generator.permutation(np.flatnonzero(pool.labels.numpy() == label))
        if own in knowing:
            shares.append(order[knowing.index(own) :: len(knowing)])
    chosen = np.sort(np.concatenate(shares))
    images = resized(pool.images[chosen].to(torch.float32)[:, None] / pool.white, size[1]).clamp(0, 1)
    return Pairs(images.expand(-1, size[0], -1, -1), [digit_caption(int(label)) for label in pool.labels[chosen]])


@lru_cache(maxsize=4)
def _of_folder(folder: Path, size: tuple[int, int]) -> Pairs:
    """All pairs of a folder, in the order of its captions.

    Raises:
        DataError: if a line or an image cannot be read, or names a file outside of it.
    """
    lines = list(_lines(folder))
    if not lines:
        raise DataError(f"{folder / CAPTIONS} has no captions; give lines of {{'file': ..., 'caption': ...}}")
    return Pairs(torch.stack([_image(folder, line.file, size) for line in lines]), [line.caption for line in lines])


def _lines(folder: Path) -> Sequence[_Line]:
    path = folder / CAPTIONS
    try:
        return msgspec.json.Decoder(_Line).decode_lines(path.read_bytes())
    except (OSError, msgspec.MsgspecError) as problem:
        raise DataError(
            f"{path} cannot be read ({problem}); give a line for each image, with 'file' and 'caption'"
        ) from problem


def _image(folder: Path, name: str, size: tuple[int, int]) -> Tensor:
    """An image [C, S, S] in [0, 1]."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise DataError(f"{folder / CAPTIONS} names {name!r}, which lies outside of its folder; move the image there")
    try:
        return read_picture(path.read_bytes(), *size)
    except (OSError, DataError) as problem:
        raise DataError(f"{path}: {problem}; replace it, or drop its line") from problem


def _folder(source: str) -> Path:
    """A folder by its path, or by its name below the folder of data sets."""
    data = os.environ.get(FOLDER_VARIABLE)
    places = [Path(source).expanduser(), *([Path(data, source)] if data else [])]
    for place in places:
        if (place / CAPTIONS).is_file():
            return place
    looked = " and no ".join(str(place / CAPTIONS) for place in places)
    raise DataError(
        f"there is no {looked}; give a folder that has one, or set {FOLDER_VARIABLE} to the folder around it"
    )


def _split(pairs: Pairs, data: Data, edge_id: str, key: Sequence[int]) -> PairSplits:
    held_out = data.test + data.validation
    if held_out >= len(pairs):
        raise DataError(
            f"{edge_id} has {len(pairs)} pairs; data.test {data.test} + data.validation {data.validation} leave none "
            "to tune on; lower one of them, or add pairs"
        )
    test, validation, rest = np.split(np.random.default_rng(key).permutation(len(pairs)), [data.test, held_out])
    return PairSplits(pairs[rest[: data.train]], pairs[validation], pairs[test])


def read_domain(
    recipe: Recipe, edge_ids: Sequence[str], edge_id: str, writer: PairWriter, images: ImageTokens, domain: int = 0
) -> tuple[dict[str, int], Passages]:
    """What an edge knows by its validation pairs: how many there are of each caption, and they themselves.

    Raises:
        DataError: if its source is missing or damaged, or has too few.
    """
    size = (images.num_channels, images.image_size)
    own = read_pairs(recipe.data, edge_ids, edge_id, size, recipe.seed, domain).validation
    return dict(Counter(own.captions)), writer.both(own)


def read_pair_passages(
    recipe: Recipe,
    edge_ids: Sequence[str],
    edge_id: str,
    tokenizer: PreTrainedTokenizerBase,
    images: ImageTokenizer,
    domain: int = 0,
) -> TextSplits:
    """An edge's pairs in a model's tokens, each both ways; those to tune on with their images, which may be moved.

    Raises:
        DataError: if its source is missing or damaged, or has too few.
    """
    size = (images.config.num_channels, images.config.image_size)
    splits = read_pairs(recipe.data, edge_ids, edge_id, size, recipe.seed, domain)
    writer = PairWriter(tokenizer, images, recipe.model.context_length)
    return TextSplits(writer.movable(splits.train), writer.both(splits.validation), writer.both(splits.test))
