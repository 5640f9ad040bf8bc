"""Augmentation of a device's images: small random shifts, rotations and scales from a keyed generator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MAX_ANGLE = math.radians(15)
_MAX_SHIFT = 0.15  # of half the image's width
_MAX_SCALE = 0.15
_LARGEST_HOLE = 0.5  # of the image's side, as in FixMatch's appendix D


def augment(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Images [B, C, H, W] under random affine maps; `strength` 0 returns them as they are, 1 is the strongest."""
    if strength == 0:
        return images
    return _moved(images, strength, generator)


def strongly_augment(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """FixMatch's other view: maps of up to twice that range, then a square of each image made grey (Cutout).

    DeVries & Taylor 2017, https://arxiv.org/abs/1708.04552; parts of a square may lie outside the image.
    """
    if strength == 0:
        return images
    return _cut_out(_moved(images, 2 * strength, generator), _LARGEST_HOLE * strength, generator)


def _cut_out(images: Tensor, largest: float, generator: torch.Generator) -> Tensor:
    """A square hole in each image, of up to this share of its side."""
    height, width = images.shape[-2:]
    draws = torch.rand(len(images), 3, 1, generator=generator)
    half, row, column = draws[:, 0] * largest / 2, draws[:, 1], draws[:, 2]
    rows = ((torch.arange(height) + 0.5) / height - row).abs() < half
    columns = ((torch.arange(width) + 0.5) / width - column).abs() < half
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def _moved(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    draws = (torch.rand(len(images), 4, generator=generator) * 2 - 1) * strength
    angle, scale = draws[:, 0] * _MAX_ANGLE, 1 + draws[:, 1] * _MAX_SCALE
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = draws[:, 2:] * _MAX_SHIFT
    maps = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = torch.nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
