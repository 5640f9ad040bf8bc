"""Weights in eight bits: a quarter of the bytes that each token reads. Activations stay in floating point."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ecogen.errors import ConfigError
from ecogen.models.decoder import SegmentedDecoder


def quantize_weights(model: SegmentedDecoder) -> None:
    """Hold the matrices of blocks and head as integers, with a scale for each row; embedding and norms stay.

    Raises:
        ConfigError: if the library for it is missing.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as problem:
        raise ConfigError(["compute.dtype = 'int8' needs torchao: pip install 'ecogen[serve]'"]) from problem
    quantize_(model.whole, Int8WeightOnlyConfig(), filter_fn=_is_linear)


def held_bytes(model: SegmentedDecoder) -> int:
    """Of all parameters, as they lie in memory."""
    return sum(_nbytes(parameter.data) for parameter in model.parameters() if not parameter.is_meta)


def _nbytes(tensor: Tensor) -> int:
    """A quantised tensor says how large it would be; its parts say how large it is."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_nbytes(getattr(tensor, name)) for name in names)


def _is_linear(module: nn.Module, _: str) -> bool:
    return type(module) is nn.Linear and not module.weight.is_meta
