"""Matrices as oneDNN wants them: laid out in blocks, so that products with a few rows take half as long.

PyTorch lays them out so in compiled models only; the operators that do it are called here without a compiler. A packed
matrix stays the weight of its layer: products go to oneDNN, and whoever does anything else with it gets it as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from ecogen.models.decoder import SegmentedDecoder

_WORTH = 2**16
"""From so many numbers on; below, the call costs more than the product."""

_ROWS = 16
"""How many rows oneDNN chooses the blocks for: those of a few requests that decode together."""

_ROWS_OF_ONE = 4
"""One row is multiplied as often: oneDNN takes a single one for a vector, and is slower then."""


def pack_weights(model: SegmentedDecoder, worth: int = _WORTH) -> None:
    """Pack the matrices of all linear layers that are worth it, where this machine's PyTorch can.

    A head that is the embedding too stays: it would have to be held twice.

    Args:
        worth: numbers that a matrix has at least.
    """
    embedding = getattr(model.whole.get_input_embeddings(), "weight", None)
    for module in model.whole.modules():
        if type(module) is not nn.Linear or module.weight is embedding or module.weight.numel() < worth:
            continue
        if _is_packable(module.weight):
            module.weight = nn.Parameter(PackedWeight.of(module.weight.detach()), requires_grad=False)


class PackedWeight(Tensor):
    """A matrix [outputs, inputs] in blocks; to all but products it looks as it was."""

    blocks: Tensor

    @staticmethod
    def __new__(cls, blocks: Tensor) -> PackedWeight:
        packed = Tensor._make_wrapper_subclass(cls, blocks.shape, dtype=blocks.dtype)
        packed.blocks = blocks
        return packed

    @classmethod
    def of(cls, weight: Tensor) -> PackedWeight:
        """Pack a matrix."""
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], _: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and not kwargs and isinstance(args[1], cls):
            return _product(*args)
        with torch._C.DisableTorchFunctionSubclass():  # what comes of it is a plain tensor
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], _: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].blocks)
        args, kwargs = tree_map_only(cls, lambda weight: weight.blocks.to_dense(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _is_packable(weight: Tensor) -> bool:
    if type(weight.data) is not Tensor or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _product(inputs: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    if inputs.numel() != inputs.shape[-1]:
        return torch.ops.mkldnn._linear_pointwise(inputs, weight.blocks, bias, "none", [], "")
    rows = inputs.reshape(1, -1).expand(_ROWS_OF_ONE, -1)
    given = torch.ops.mkldnn._linear_pointwise(rows, weight.blocks, bias, "none", [], "")
    return given[:1].view(*inputs.shape[:-1], -1)
