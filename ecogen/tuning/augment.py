"""Augmentation of a device's images: small random shifts, rotations and scales from a keyed generator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MAX_ANGLE = math.radians(15)
_MAX_SHIFT = 0.15  # of half the image's width
_MAX_SCALE = 0.15


def augment(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Images [B, C, H, W] under random affine maps; `strength` 0 returns them as they are, 1 is the strongest."""
    if strength == 0:
        return images
    draws = (torch.rand(len(images), 4, generator=generator) * 2 - 1) * strength
    angle, scale = draws[:, 0] * _MAX_ANGLE, 1 + draws[:, 1] * _MAX_SCALE
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = draws[:, 2:] * _MAX_SHIFT
    maps = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = torch.nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
