"""Pictures as files, and as the numbers that an image tokenizer takes.

Of one channel, the numbers are ink: 0 is the paper and 1 the darkest, as glyphs and handwritten digits are stored.

Shapes: N images, C channels, S side of an image.
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ecogen.errors import DataError

_MOST_PIXELS = 2**24  # of a picture's file


def read_picture(content: bytes, num_channels: int, side: int) -> Tensor:
    """A picture of any format and size, on white paper, as an image [C, S, S] in [0, 1].

    Raises:
        DataError: if it cannot be read, or is too large.
    """
    try:
        with Image.open(io.BytesIO(content)) as picture:
            if picture.width * picture.height > _MOST_PIXELS:
                raise DataError(f"has {picture.width} x {picture.height} pixels; {_MOST_PIXELS} at most")
            paper = Image.new("RGBA", picture.size, "white")
            paper.alpha_composite(_of_bytes(picture).convert("RGBA"))
    except UnidentifiedImageError as problem:
        raise DataError("is no picture that can be read") from problem
    except (OSError, Image.DecompressionBombError, ValueError, SyntaxError) as problem:
        raise DataError(f"is no picture that can be read ({problem})") from problem
    scaled = paper.convert("L" if num_channels == 1 else "RGB").resize((side, side), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(scaled, dtype=np.float32).reshape(side, side, num_channels) / 255)
    image = pixels.permute(2, 0, 1).contiguous()
    return 1 - image if num_channels == 1 else image


def _of_bytes(picture: Image.Image) -> Image.Image:
    """A picture whose grey has 16 bits, with 8: converted, all but the darkest would be white.

    Raises:
        DataError: if its grey is of another kind, as in some TIFF files.
    """
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise DataError(f"has pixels of {picture.mode!r}; save it with 8 or 16 bits a pixel")
    return picture


def png_of(image: Tensor) -> bytes:
    """An image [C, S, S] in [0, 1] as a PNG file."""
    light = 1 - image if len(image) == 1 else image
    pixels = (light.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if len(image) == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def grid_of(images: Tensor, columns: int | None = None, gap: int = 2) -> Tensor:
    """Images [N, C, S, S] in rows, as one image [C, height, width]; of one image that is the image itself.

    Args:
        columns: None for about as many as rows.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    _, channels, side, _ = images.shape
    paper = 0.0 if channels == 1 else 1.0
    step = side + gap
    sheet = torch.full((channels, rows * step - gap, columns * step - gap), paper)
    for index, image in enumerate(images):
        top, left = index // columns * step, index % columns * step
        sheet[:, top : top + side, left : left + side] = image
    return sheet
