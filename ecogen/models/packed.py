"""Matrices held so that products with a few rows, all that decoding asks for, take half as long or less.

Floating-point numbers are laid out in blocks, as oneDNN wants them; integers go to a kernel of PyTorch's own. PyTorch
does so in compiled models only; the same operators are called here without a compiler. A matrix stays the weight of its
layer: whoever does anything else with it than multiply gets it as it was.
"""

from __future__ import annotations

from abc import abstractmethod
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

_FEW_ROWS = 8
"""Up to so many rows are multiplied with integers as they are."""

_WIDTH = 16
"""PyTorch's kernel for integers takes inputs of multiples of this width, and reads beyond others (seen in 2.13)."""

_ROWS_OF_ONE = 4
"""One row is multiplied as often: oneDNN takes a single one for a vector, and is slower then."""


def pack_weights(model: SegmentedDecoder, worth: int = _WORTH) -> None:
    """Hold the matrices of all linear layers so that few rows are multiplied fast, where this machine's PyTorch can.

    A head that is the embedding too stays: it would have to be held twice.

    Args:
        worth: numbers that a matrix has at least.
    """
    embedding = getattr(model.whole.get_input_embeddings(), "weight", None)
    for module in model.whole.modules():
        if type(module) is not nn.Linear or module.weight is embedding or module.weight.numel() < worth:
            continue
        if module.weight.device.type == "cpu" and (held := _held(module.weight.detach())) is not None:
            module.weight = nn.Parameter(held, requires_grad=False)


def _held(weight: Tensor) -> HeldWeight | None:
    """A matrix as it is multiplied fast; None where it stays as it is."""
    if type(weight).__name__ == "Int8Tensor":  # torchao's; its library need not be here
        if weight.shape[1] % _WIDTH:
            return None
        return IntegerWeight(weight.qdata, weight.scale.flatten(), weight.dtype)  # type: ignore[attr-defined]
    if type(weight) is not Tensor or not torch.backends.mkldnn.is_available():
        return None
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return PackedWeight.of(weight) if weight.dtype in (torch.float32, torch.bfloat16) else None


class HeldWeight(Tensor):
    """A matrix [outputs, inputs] that is multiplied in a way of its own; to all else it looks like any other."""

    @abstractmethod
    def product(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """As `linear`: inputs [..., I] times this, transposed."""

    @abstractmethod
    def dense(self) -> Tensor:
        """It as an ordinary tensor."""

    @abstractmethod
    def again(self) -> HeldWeight:
        """Another one of the same numbers."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], _: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and not kwargs and isinstance(args[1], HeldWeight):
            return args[1].product(args[0], *args[2:])
        with torch._C.DisableTorchFunctionSubclass():  # what comes of it is a plain tensor
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], _: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0].again()
        args, kwargs = tree_map_only(HeldWeight, lambda held: held.dense(), (args, kwargs or {}))
        return func(*args, **kwargs)


class PackedWeight(HeldWeight):
    """In blocks, as oneDNN wants it."""

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

    def product(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        if inputs.numel() != inputs.shape[-1]:
            return torch.ops.mkldnn._linear_pointwise(inputs, self.blocks, bias, "none", [], "")
        rows = inputs.reshape(1, -1).expand(_ROWS_OF_ONE, -1)
        given = torch.ops.mkldnn._linear_pointwise(rows, self.blocks, bias, "none", [], "")
        return given[:1].view(*inputs.shape[:-1], self.shape[0])

    def dense(self) -> Tensor:
        return self.blocks.to_dense()

    def again(self) -> PackedWeight:
        return PackedWeight(self.blocks)


class IntegerWeight(HeldWeight):
    """Integers of eight bits and a scale for each output, as torchao made them.

    A few rows are rounded to bfloat16 and multiplied with the integers; for more it is faster to turn these into
    floating-point numbers first.
    """

    integers: Tensor
    scales: Tensor
    _ones: Tensor

    @staticmethod
    def __new__(cls, integers: Tensor, scales: Tensor, dtype: torch.dtype) -> IntegerWeight:
        held = Tensor._make_wrapper_subclass(cls, integers.shape, dtype=dtype)
        held.integers, held.scales = integers.contiguous(), scales.to(dtype)
        held._ones = torch.ones(len(scales), dtype=torch.bfloat16)
        return held

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["integers", "scales"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], _: None, __: object, ___: object) -> IntegerWeight:
        return IntegerWeight(parts["integers"], parts["scales"], parts["scales"].dtype)

    def product(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        if len(rows) <= _FEW_ROWS:
            given = torch._weight_int8pack_mm(rows.bfloat16(), self.integers, self._ones).to(inputs.dtype)
        else:
            given = functional.linear(rows, self.integers.to(inputs.dtype))
        given = given.mul_(self.scales)
        return (given if bias is None else given.add_(bias)).view(*inputs.shape[:-1], len(self.scales))

    def dense(self) -> Tensor:
        return self.integers.to(self.scales.dtype) * self.scales[:, None]

    def again(self) -> IntegerWeight:
        return IntegerWeight(self.integers, self.scales, self.dtype)
