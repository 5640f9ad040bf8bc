"""Activations and gradients in fewer bytes on the wire: rounded to bfloat16, or to int8 with a scale for each token.

Rounding is to nearest, and gradients pass it as if it were not there (straight-through, Bengio et al. 2013,
https://arxiv.org/abs/1308.3432). Scales are per token, as activations differ more between tokens than within one
(Dettmers et al. 2022, section 2.1, vector-wise: https://arxiv.org/abs/2208.07339).

Shapes: B rows, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ecogen.config import WireType
from ecogen.errors import ProtocolError

TENSOR, SCALE = "tensor", "scale"
_LARGEST = 127


def compress(tensor: Tensor, wire_type: WireType) -> dict[str, Tensor]:
    """What travels instead of a tensor [..., D]: itself, or fewer bytes.

    int8 adds scales [..., 1]: a 127th of each token's largest number, in bfloat16, whose rounding costs nothing, since
    the numbers are rounded by the scale that is sent.
    """
    if wire_type == "float32":
        return {TENSOR: tensor}
    if wire_type == "bfloat16":
        return {TENSOR: tensor.bfloat16()}
    scale = (tensor.abs().amax(dim=-1, keepdim=True).float() / _LARGEST).bfloat16()
    rounded = (tensor / scale.float().clamp_min(torch.finfo(torch.float32).tiny)).round()
    return {TENSOR: rounded.to(torch.int8), SCALE: scale}


def restore(tensors: Mapping[str, Tensor]) -> Tensor:
    """The tensor that `compress` made smaller, but for rounding.

    Raises:
        ProtocolError: if scales and numbers do not belong together.
    """
    tensor, scale = tensors[TENSOR], tensors.get(SCALE)
    if (tensor.dtype == torch.int8) != (scale is not None):
        raise ProtocolError(f"numbers of {tensor.dtype} {'without' if scale is None else 'with'} scales")
    if scale is None:
        return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    if scale.shape != (*tensor.shape[:-1], 1):
        raise ProtocolError(f"scales {tuple(scale.shape)} do not fit numbers {tuple(tensor.shape)}")
    return tensor * scale.float()
