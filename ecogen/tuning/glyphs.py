"""The unlabelled corpus of the demo: glyphs rendered from matplotlib's fonts, and random views of them.

A corpus is the 62 letters and digits in each of 21 fonts, one image a glyph, without a word on which character it
shows. `augment` draws a new view of each image it is given: rotated, sheared, scaled, bent, thicker or thinner,
coarser, noisier. All of it is a function of a `torch.Generator`.

Shapes: B batch, S side of a rendered glyph, R side of a view, K resampling operators. Pixels are in [0, 1], ink is 1.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

# matplotlib's fonts that draw all 62 characters as such: cmsy10 and LastResort draw symbols, cmmi10 old-style digits.
FONTS = (
    *(f"DejaVu{family}" for family in ("Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique")),
    *(f"DejaVuSans{family}" for family in ("Mono", "Mono-Bold", "Mono-Oblique", "Mono-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *(f"cm{style}10" for style in ("b", "r", "ss", "ti", "tt")),
)

RENDER_SIZE = 56
INK_SIZE = 40
BLUR_SIGMA = 1.5


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How far a view may stray from its glyph; each amount is drawn uniformly, per image.

    `rotation` in radians, `shear` and `stretch` as fractions, `scale` as the ink's longer side over the view's,
    `shift` and `elastic` (standard deviation) as fractions of half a side, `threshold` of the blurred ink (low is
    thick), `resolution` the coarsest grid that a view is reduced to and enlarged from, `noise` a standard deviation.
    """

    rotation: float = 0.3
    shear: float = 0.2
    scale: tuple[float, float] = (0.65, 1.0)
    stretch: float = 0.25
    shift: float = 0.1
    elastic: float = 0.07
    threshold: tuple[float, float] = (0.15, 0.6)
    resolution: int = 6
    contrast: float = 0.2
    noise: float = 0.05


def render_glyphs(fonts: tuple[str, ...] = FONTS, characters: str = CHARACTERS) -> Tensor:
    """Render every character in every font, centred, its longer side `INK_SIZE`, softly blurred: [N, 1, S, S].

    The blur makes the stroke's edge a slope, so that a view's threshold sets the stroke's thickness.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    typefaces = [ImageFont.truetype(str(folder / f"{name}.ttf"), 2 * INK_SIZE) for name in fonts]
    glyphs = torch.stack([_render(typeface, character) for typeface in typefaces for character in characters])
    return blur(glyphs.unsqueeze(1), BLUR_SIGMA)


def _render(typeface: ImageFont.FreeTypeFont, character: str) -> Tensor:
    left, top, right, bottom = (int(edge) for edge in typeface.getbbox(character))
    ink = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(ink).text((-left, -top), character, fill=255, font=typeface)
    ratio = INK_SIZE / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * ratio)), max(1, round(ink.height * ratio))), Image.Resampling.LANCZOS)
    canvas = Image.new("L", (RENDER_SIZE, RENDER_SIZE))
    canvas.paste(ink, ((RENDER_SIZE - ink.width) // 2, (RENDER_SIZE - ink.height) // 2))
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, one axis after the other: [B, 1, S, S] -> [B, 1, S, S]."""
    offsets = torch.arange(-4.0, 5.0)
    kernel = torch.softmax(-offsets.square() / (2 * sigma**2), dim=0)
    rows = F.conv2d(images, kernel.view(1, 1, -1, 1), padding=(4, 0))
    return F.conv2d(rows, kernel.view(1, 1, 1, -1), padding=(0, 4))


def augment(
    glyphs: Tensor, *, generator: torch.Generator, amounts: Augmentation = Augmentation(), size: int = 28
) -> Tensor:
    """A random view of each rendered glyph: [B, 1, S, S] -> [B, 1, R, R] in [0, 1]."""
    n = len(glyphs)
    grid = _affine_grid(n, size, amounts, generator) + _elastic(n, size, amounts.elastic, generator)
    views = F.grid_sample(glyphs, grid, align_corners=False)
    views = _set_thickness(views, amounts.threshold, generator)
    views = _lose_resolution(views, amounts.resolution, generator)
    return _degrade(views, amounts, generator)


def _uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator) * (high - low) + low


def _affine_grid(n: int, size: int, amounts: Augmentation, generator: torch.Generator) -> Tensor:
    """Where each view's pixels lie in its glyph: [B, R, R, 2], rotated, sheared, stretched, scaled and shifted."""
    angle = _uniform(n, -amounts.rotation, amounts.rotation, generator)
    shear = _uniform(n, -amounts.shear, amounts.shear, generator)
    zoom = INK_SIZE / RENDER_SIZE / _uniform(n, *amounts.scale, generator)
    stretch = torch.exp(_uniform(n, -amounts.stretch, amounts.stretch, generator))
    shift = _uniform(2 * n, -amounts.shift, amounts.shift, generator).view(n, 2, 1)
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = torch.stack([cos * stretch, (shear * cos - sin) / stretch, sin * stretch, (shear * sin + cos) / stretch], -1)
    linear = rows.view(n, 2, 2) * zoom.view(n, 1, 1)
    return F.affine_grid(torch.cat([linear, shift], -1), [n, 1, size, size], align_corners=False)


def _elastic(n: int, size: int, amount: float, generator: torch.Generator) -> Tensor:
    """A smooth random displacement [B, R, R, 2]: noise on a 4 x 4 grid, enlarged."""
    coarse = torch.randn(n, 2, 4, 4, generator=generator) * amount
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def _set_thickness(views: Tensor, threshold: tuple[float, float], generator: torch.Generator) -> Tensor:
    levels = _uniform(len(views), *threshold, generator).view(-1, 1, 1, 1)
    return torch.sigmoid((views - levels) * 12) * (views > 0.01)


def _lose_resolution(views: Tensor, coarsest: int, generator: torch.Generator) -> Tensor:
    """Reduce each view to a random number of cells a side and enlarge it again, as `R V R^T`."""
    size = views.shape[-1]
    table = torch.stack([_resampler(cells, size) for cells in range(min(coarsest, size), size + 1)])
    # Squared, so that coarse grids, which change an image most, are drawn most often.
    draws = _uniform(len(views), 0, 1, generator).square() * len(table)
    operators = table[draws.long()].unsqueeze(1)
    return operators @ views @ operators.transpose(-1, -2)


def _resampler(cells: int, size: int) -> Tensor:
    """The linear map [R, R] that averages a line over `cells` and interpolates it back."""
    lines = torch.eye(size).unsqueeze(1)
    coarse = (
        F.interpolate(lines, size=cells, mode="linear", antialias=False)
        if cells > size
        else F.adaptive_avg_pool1d(lines, cells)
    )
    return F.interpolate(coarse, size=size, mode="linear", align_corners=False).squeeze(1).T


def _degrade(views: Tensor, amounts: Augmentation, generator: torch.Generator) -> Tensor:
    """Fade the ink and add noise, its strength drawn per image."""
    n = len(views)
    ink = _uniform(n, 1 - amounts.contrast, 1, generator).view(-1, 1, 1, 1)
    noise = _uniform(n, 0, amounts.noise, generator).view(-1, 1, 1, 1) * torch.randn(views.shape, generator=generator)
    return (views * ink + noise).clamp(0, 1)
