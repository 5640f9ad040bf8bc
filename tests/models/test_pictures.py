"""Pictures of many kinds become the same numbers."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ecogen.errors import DataError
from ecogen.models.pictures import png_of, read_picture


def file_of(picture: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["L", "1", "RGB", "RGBA", "P", "LA", "16 bits"])
def test_ink_is_where_it_is_dark_whatever_the_file_holds(kind: str) -> None:
    light = np.full((8, 8), 255, np.uint8)
    light[2:4] = 0
    grey = Image.fromarray(light)
    picture = Image.fromarray(light.astype(np.uint16) * 257) if kind == "16 bits" else grey.convert(kind)
    image = read_picture(file_of(picture), 1, 8)
    assert torch.allclose(image, 1 - torch.from_numpy(light)[None] / 255)


def test_grey_of_16_bits_keeps_its_shades() -> None:
    shades = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    image = read_picture(file_of(Image.fromarray(shades)), 1, 8)
    assert torch.allclose(image, 1 - torch.from_numpy(shades.astype(np.float32))[None] / 65535, atol=1 / 255)


def test_grey_of_other_kinds_is_refused() -> None:
    picture = Image.fromarray(np.zeros((8, 8), np.float32))
    with pytest.raises(DataError, match="has pixels of 'F'; save it with 8 or 16 bits a pixel"):
        read_picture(file_of(picture, "TIFF"), 1, 8)


def test_what_is_written_is_read() -> None:
    image = (torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    assert torch.allclose(read_picture(png_of(image), 1, 8), image, atol=1e-6)
