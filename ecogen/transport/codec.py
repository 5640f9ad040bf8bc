"""Messages as bytes: a short typed header, then the raw bytes of the tensors. Nothing is ever unpickled.

    u32 little-endian      length of the header
    MessagePack map        the header: version, sender, method, kind, body, and name, dtype and shape of each tensor
    zeros, tensor, ...     each tensor in C order, little-endian, after zeros up to a multiple of 16 bytes

The header is a map with short names, so that a node ignores the fields that only a newer one knows. Everything that
is not a tensor's own bytes (length, header, zeros) counts as header bytes.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from ecogen.errors import ProtocolError
from ecogen.records import Kind
from ecogen.transport.base import PROTOCOL_VERSION, Message

# Where a tensor begins, relative to the frame; the widest scalar (complex128) has 16 bytes.
ALIGNMENT = 16
_LENGTH_BYTES = 4
_ZEROS = bytes(ALIGNMENT)

# The dtypes that hold numbers by themselves. Quantized and sub-byte dtypes need a scale or a packing beside them.
_DTYPE_NAMES = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
)
DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPE_NAMES if hasattr(torch, name)}
_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
# NumPy, through which the bytes are reached, lacks these; one of the same size stands in.
_STAND_INS: Mapping[torch.dtype, torch.dtype] = {
    dtype: {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    for name, dtype in DTYPES.items()
    if name.startswith(("bfloat", "float8", "float4", "complex32"))
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a node sends and accepts at most; more is a ProtocolError at either end."""

    message_bytes: int = 64 * 2**20
    header_bytes: int = 8 * 2**20
    tensors: int = 16_384
    dims: int = 16


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Prefix:
    """All of an encoded message but its tensors, and the sizes of the whole for the books."""

    data: bytes
    payload_bytes: int
    header_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.payload_bytes + self.header_bytes


@dataclass(frozen=True, slots=True)
class Frame:
    """An encoded message and its sizes: `len(data) == payload_bytes + header_bytes`."""

    data: bytes
    payload_bytes: int
    header_bytes: int


@dataclass(frozen=True, slots=True)
class Received:
    """A decoded message and who its header says sent it."""

    sender_id: str
    message: Message


class _TensorMeta(msgspec.Struct, frozen=True):
    n: str
    d: str
    s: tuple[Annotated[int, msgspec.Meta(ge=0, le=2**40)], ...] = ()

    @property
    def num_bytes(self) -> int:
        return math.prod(self.s) * DTYPES[self.d].itemsize


class _Header(msgspec.Struct, frozen=True, omit_defaults=True):
    """v version, f from, m method, k kind, b body, t tensors, u uncounted."""

    v: int
    f: str
    m: str
    k: Kind = "control"
    b: bytes = b""
    t: tuple[_TensorMeta, ...] = ()
    u: bool = False


class _Version(msgspec.Struct, frozen=True):
    v: int


_ENCODER = msgspec.msgpack.Encoder()
_HEADERS = msgspec.msgpack.Decoder(_Header)
_VERSIONS = msgspec.msgpack.Decoder(_Version)


class Packed(Mapping[str, Tensor]):
    """Tensors that go to several nodes: described and made bytes once for all of them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @cached_property
    def metas(self) -> tuple[_TensorMeta, ...]:
        """Name, dtype and shape of each."""
        return tuple(_describe(name, tensor) for name, tensor in self._tensors.items())

    @cached_property
    def payload(self) -> bytes:
        """All of them, each with its zeros."""
        return b"".join(_parts(self._tensors))


def encode(message: Message, sender_id: str, limits: Limits = DEFAULT_LIMITS) -> Frame:
    """The message as one `bytes`, tensors copied exactly once (after a copy from their device).

    Raises:
        ProtocolError: if it is larger than `limits`, or a tensor cannot travel (sparse, quantized, without data).
    """
    prefix = encode_prefix(message, sender_id, limits)
    tensors = message.tensors
    parts = [tensors.payload] if isinstance(tensors, Packed) else _parts(tensors)
    return Frame(b"".join([prefix.data, *parts]), prefix.payload_bytes, prefix.header_bytes)


def decode(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Received:
    """The message that `encode` wrote.

    The tensors are views of `data`, which nobody may write into; PyTorch has no read-only tensors that would say so.

    Raises:
        ProtocolError: if `data` is anything else, of another version or beyond `limits`.
    """
    if len(data) > limits.message_bytes:
        raise _too_large("a message", len(data), limits)
    header, start = _split(data, limits)
    offsets = [start]
    for meta in header.t:
        size = meta.num_bytes
        offsets.append(offsets[-1] + size + _padding(size))
    if len(data) != offsets[-1]:
        raise ProtocolError(f"{header.m}: {len(data)} bytes instead of {offsets[-1]}; the message was cut or damaged")
    _expect_read_only_buffers()
    tensors = {meta.n: _view(data, offset, meta) for meta, offset in zip(header.t, offsets, strict=False)}
    return Received(header.f, Message(header.m, header.k, header.b, tensors, not header.u))


def encode_prefix(message: Message, sender_id: str, limits: Limits = DEFAULT_LIMITS) -> Prefix:
    """What `encode` writes before the first tensor, with the sizes of the whole.

    Raises:
        ProtocolError: as `encode`.
    """
    tensors = message.tensors
    metas = tensors.metas if isinstance(tensors, Packed) else Packed(tensors).metas
    sizes = [tensor.nbytes for tensor in tensors.values()]
    header = _Header(
        PROTOCOL_VERSION, sender_id, message.method, message.kind, message.body, metas, not message.counted
    )
    written = _ENCODER.encode(header)
    start = _LENGTH_BYTES + len(written)
    data = len(written).to_bytes(_LENGTH_BYTES, "little") + written + bytes(_padding(start))
    prefix = Prefix(data, sum(sizes), len(data) + sum(map(_padding, sizes)))
    _check_limits(message.method, len(written), metas, limits)
    if prefix.total_bytes > limits.message_bytes:
        raise _too_large(message.method, prefix.total_bytes, limits)
    return prefix


def decode_prefix(data: bytes, tensors: Mapping[str, Tensor], limits: Limits = DEFAULT_LIMITS) -> Received:
    """The message whose prefix is `data` and whose tensors came another way: by reference.

    Raises:
        ProtocolError: as `decode`.
    """
    header, _ = _split(data, limits)
    own = {meta.n: tensors[meta.n].detach() for meta in header.t}
    return Received(header.f, Message(header.m, header.k, header.b, own, not header.u))


def _split(data: bytes, limits: Limits) -> tuple[_Header, int]:
    """The checked header, and where the first tensor begins."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    stop = _LENGTH_BYTES + length
    start = stop + _padding(stop)
    if length > limits.header_bytes or len(data) < start:
        raise ProtocolError(f"{len(data)} bytes with a header of {length} are not a message; is it an EcoGen node?")
    written = memoryview(data)[_LENGTH_BYTES:stop]
    header = _parse(written)
    _check_limits(header.m, length, header.t, limits)
    _check_tensors(header)
    return header, start


def _parse(written: memoryview) -> _Header:
    try:
        header = _HEADERS.decode(written)
    except (msgspec.MsgspecError, ValueError, RecursionError) as problem:
        _check_version(written)
        raise ProtocolError(f"the header of a message cannot be read: {problem}") from problem
    if header.v != PROTOCOL_VERSION:
        raise _other_version(header.v)
    return header


def _check_version(written: memoryview) -> None:
    """Nothing, unless the header, whatever else is in it, names another version."""
    with contextlib.suppress(msgspec.MsgspecError, ValueError, RecursionError):
        version = _VERSIONS.decode(written).v
        if version != PROTOCOL_VERSION:
            raise _other_version(version)


def _other_version(version: int) -> ProtocolError:
    return ProtocolError(
        f"the other node speaks protocol version {version}, this one {PROTOCOL_VERSION}; "
        "install the same release of EcoGen on both"
    )


def _check_limits(method: str, header_bytes: int, metas: Sequence[_TensorMeta], limits: Limits) -> None:
    if header_bytes > limits.header_bytes:
        raise ProtocolError(f"{method}: a header of {header_bytes} bytes, but {limits.header_bytes} are allowed")
    if len(metas) > limits.tensors:
        raise ProtocolError(f"{method}: {len(metas)} tensors, but {limits.tensors} are allowed")
    for meta in metas:
        if len(meta.s) > limits.dims:
            raise ProtocolError(f"{method}: tensor {meta.n!r} has {len(meta.s)} dims, but {limits.dims} are allowed")


def _check_tensors(header: _Header) -> None:
    names = [meta.n for meta in header.t]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ProtocolError(f"{header.m}: two tensors are called {twice!r}")
    for meta in header.t:
        if meta.d not in DTYPES:
            raise ProtocolError(f"{header.m}: tensor {meta.n!r} has a dtype unknown here, {meta.d!r}")
        if 0 in meta.s and math.prod(filter(None, meta.s)) > 2**40:  # any other is too large for its message
            raise ProtocolError(f"{header.m}: tensor {meta.n!r} has an impossible shape, {meta.s}")


def _too_large(what: str, num_bytes: int, limits: Limits) -> ProtocolError:
    return ProtocolError(
        f"{what} has {num_bytes} bytes, but messages may have {limits.message_bytes}; "
        "raise transport.message_mib in the recipe, or --message-mib of each `ecogen node`"
    )


def _padding(num_bytes: int) -> int:
    return -num_bytes % ALIGNMENT


def _describe(name: str, tensor: Tensor) -> _TensorMeta:
    if tensor.dtype not in _NAMES or tensor.layout != torch.strided or tensor.is_meta:
        kind = "without data" if tensor.is_meta else f"{tensor.layout}, {tensor.dtype}"
        raise ProtocolError(f"tensor {name!r} ({kind}) cannot be sent; make it dense and plain first")
    return _TensorMeta(name, _NAMES[tensor.dtype], tuple(tensor.shape))


def _parts(tensors: Mapping[str, Tensor]) -> list[Any]:
    parts: list[Any] = []
    for tensor in tensors.values():
        parts += (_raw_array(tensor), _ZEROS[: _padding(tensor.nbytes)])
    return parts


def _raw_array(tensor: Tensor) -> Any:
    """The tensor's numbers in C order as an array; a copy only if it is not on the CPU or not contiguous."""
    dense = tensor.contiguous()
    if dense.dtype in _STAND_INS:
        dense = dense.resolve_conj().resolve_neg().view(_STAND_INS[dense.dtype])
    try:
        return dense.numpy()
    except (RuntimeError, TypeError):  # on another device, of a graph, conjugated or negated
        return dense.numpy(force=True)


@cache
def _expect_read_only_buffers() -> None:
    """Take PyTorch's warning of a buffer that is not writable, which it gives once a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(bytes(1), dtype=torch.uint8)


def _view(data: bytes, offset: int, meta: _TensorMeta) -> Tensor:
    dtype, count = DTYPES[meta.d], math.prod(meta.s)
    if not count:
        return torch.empty(meta.s, dtype=dtype)
    flat = torch.frombuffer(data, dtype=dtype, count=count, offset=offset)
    if dtype is torch.bool and int(flat.view(torch.uint8).max()) > 1:
        raise ProtocolError(f"tensor {meta.n!r} is of truth values but holds other bytes; the message is damaged")
    return flat.view(meta.s)
