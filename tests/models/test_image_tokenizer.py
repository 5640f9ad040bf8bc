from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecogen.errors import CheckpointError, ProtocolError
from ecogen.models.image_tokenizer import (
    ImageTokenizer,
    ImageTokens,
    has_image_tokenizer,
    load_image_tokenizer,
    save_image_tokenizer,
)
from ecogen.models.pair_tokens import image_marks, pair_tokens
from ecogen.tuning.vocabulary import train_tokenizer

SMALL = ImageTokens(image_size=8, patch_size=4, codebook_size=11, hidden_size=8)


def images(count: int, config: ImageTokens = SMALL) -> torch.Tensor:
    return torch.rand(count, config.num_channels, config.image_size, config.image_size)


@pytest.mark.parametrize("config", [SMALL, ImageTokens(12, 3, 3, 5, 4, 6)])
def test_codes_stand_for_patches(config: ImageTokens) -> None:
    tokenizer = ImageTokenizer(config).eval()
    codes = tokenizer.encode(images(6, config))
    assert codes.shape == (6, config.num_codes)
    assert 0 <= int(codes.min()) <= int(codes.max()) < config.codebook_size
    drawn = tokenizer.decode(codes)
    assert drawn.shape == (6, config.num_channels, config.image_size, config.image_size)
    assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1


def test_what_a_folder_holds_is_the_same_again(tmp_path: Path) -> None:
    tokenizer, some = ImageTokenizer(SMALL).eval(), images(3)
    assert not has_image_tokenizer(tmp_path)
    save_image_tokenizer(tokenizer, tmp_path)
    again = load_image_tokenizer(tmp_path)
    assert has_image_tokenizer(tmp_path)
    assert again.config == SMALL
    assert torch.equal(again.decode(again.encode(some)), tokenizer.decode(tokenizer.encode(some)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("image_tokenizer.json", b"{}x"),
        ("image_tokenizer.json", b'{"image_size": 9, "patch_size": 4}'),
        ("image_tokenizer.json", b'{"codebook_size": 1000000000}'),
        ("image_tokenizer.json", b'{"codebook_size": 12}'),
        ("image_tokenizer.safetensors", b"damaged"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    save_image_tokenizer(ImageTokenizer(SMALL), tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="has no image tokenizer that can be read"):
        load_image_tokenizer(tmp_path)


@given(st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_codes_come_back_out_of_tokens(count: int, seed: int) -> None:
    marks = pair_tokens(train_tokenizer(["a word"], 300, SMALL.codebook_size), SMALL)
    codes = torch.randint(SMALL.codebook_size, (count, 4), generator=torch.Generator().manual_seed(seed))
    rows = marks.written(codes).tolist()
    assert {(row[0], row[-1]) for row in rows} == {(marks.begin, marks.end)}
    assert torch.equal(torch.cat([marks.read(row[1:-1]) for row in rows]), codes)


def test_tokens_that_are_no_image_are_refused() -> None:
    marks = pair_tokens(train_tokenizer(["a word"], 300, SMALL.codebook_size), SMALL)
    with pytest.raises(ProtocolError, match="4 tokens, 1 of them no codes, are no image of 4 codes"):
        marks.read([marks.first] * 3 + [marks.end])
    with pytest.raises(ProtocolError, match="3 tokens, 0 of them"):
        marks.read([marks.first] * 3)


def test_a_tokenizer_without_marks_for_images_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no 11 tokens for codes"):
        pair_tokens(train_tokenizer(["a word"], 300), SMALL)
    with pytest.raises(CheckpointError, match="no 11 tokens for codes"):
        pair_tokens(train_tokenizer(["a word"], 300, 10), SMALL)


def test_marks_are_in_no_ordinary_text() -> None:
    tokenizer = train_tokenizer(["a word"], 300, 4)
    marked = "".join(image_marks(4))
    assert len(tokenizer(marked, add_special_tokens=False)["input_ids"]) == 6
    split = tokenizer(marked, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not {*split} & {*tokenizer.convert_tokens_to_ids([*image_marks(4)])}
