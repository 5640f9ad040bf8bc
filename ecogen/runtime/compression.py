"""Tensors in fewer bytes on the wire: rounded to bfloat16, or to int8 with scales.

Activations and gradients have a scale for each token, as activations differ more between tokens than within one
(Dettmers et al. 2022, section 2.1, vector-wise: https://arxiv.org/abs/2208.07339). Rounding is to nearest, and
gradients pass it as if it were not there (straight-through, Bengio et al. 2013, https://arxiv.org/abs/1308.3432).
Tunables have a scale for each vector along their longest dimension: each row of LoRA's A and column of its B, each
prompt, each label of the head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ecogen.config import WireType
from ecogen.errors import ProtocolError

TENSOR, SCALE = "tensor", "scale"
SCALE_OF = "scale of "
"""Before the names of tunables whose scales they are."""
_LARGEST = 127


def compress(tensor: Tensor, wire_type: WireType, dim: int = -1) -> dict[str, Tensor]:
    """What travels instead of a tensor [..., D]: itself, or fewer bytes.

    int8 adds scales [..., 1]: a 127th of each token's largest number, in bfloat16, whose rounding costs nothing, since
    the numbers are rounded by the scale that is sent.

    Args:
        dim: along which numbers share a scale.
    """
    if wire_type == "float32":
        return {TENSOR: tensor}
    if wire_type == "bfloat16":
        return {TENSOR: tensor.bfloat16()}
    scale = (tensor.abs().amax(dim=dim, keepdim=True).float() / _LARGEST).bfloat16()
    rounded = (tensor / scale.float().clamp_min(torch.finfo(torch.float32).tiny)).round()
    return {TENSOR: rounded.to(torch.int8), SCALE: scale}


def restore(tensors: Mapping[str, Tensor], dim: int = -1) -> Tensor:
    """The tensor that `compress` made smaller, but for rounding.

    Raises:
        ProtocolError: if scales and numbers do not belong together.
    """
    tensor, scale = tensors[TENSOR], tensors.get(SCALE)
    if (tensor.dtype == torch.int8) != (scale is not None):
        raise ProtocolError(f"numbers of {tensor.dtype} {'without' if scale is None else 'with'} scales")
    if scale is None:
        return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    one_each = [1 if axis == dim % tensor.ndim else size for axis, size in enumerate(tensor.shape)]
    if list(scale.shape) != one_each:
        raise ProtocolError(f"scales {tuple(scale.shape)} do not fit numbers {tuple(tensor.shape)}")
    return tensor * scale.float()


def compress_all(tensors: Mapping[str, Tensor], wire_type: WireType) -> dict[str, Tensor]:
    """What travels instead of tunables."""
    parts = {name: compress(tensor, wire_type, _longest(tensor)) for name, tensor in tensors.items()}
    scales = {SCALE_OF + name: part[SCALE] for name, part in parts.items() if SCALE in part}
    return {name: part[TENSOR] for name, part in parts.items()} | scales


def restore_all(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tunables that `compress_all` made smaller, but for rounding.

    Raises:
        ProtocolError: if scales and numbers do not belong together.
    """
    scales = {name.removeprefix(SCALE_OF): tensor for name, tensor in tensors.items() if name.startswith(SCALE_OF)}
    parts = {name: {TENSOR: tensor} for name, tensor in tensors.items() if not name.startswith(SCALE_OF)}
    for name, part in parts.items():
        if not part[TENSOR].ndim:
            raise ProtocolError(f"{name!r} is a single number, and no tunable")
    for name, scale in scales.items():
        if name not in parts:
            raise ProtocolError(f"scales of {name!r}, of which there are no numbers")
        parts[name][SCALE] = scale
    return {name: restore(part, _longest(part[TENSOR])) for name, part in parts.items()}


def _longest(tensor: Tensor) -> int:
    """The dimension along which numbers of tunables share a scale; the last of several as long."""
    return max(range(tensor.ndim), key=lambda dim: (tensor.shape[dim], dim))
