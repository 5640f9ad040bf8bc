"""The codec: what goes in comes out, sizes are exact, and nonsense is a ProtocolError."""

from __future__ import annotations

import contextlib
import warnings

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecogen.errors import ProtocolError
from ecogen.transport.base import Message
from ecogen.transport.codec import (
    ALIGNMENT,
    DTYPES,
    Limits,
    Packed,
    decode,
    decode_prefix,
    encode,
    encode_prefix,
)


def roundtrip(message: Message) -> Message:
    received = decode(encode(message, "edge-1").data)
    assert received.sender_id == "edge-1"
    return received.message


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0,), (2, 0, 3)], ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_every_dtype_and_shape_comes_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    size = torch.Size(shape).numel() * dtype.itemsize
    limit = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, limit, (max(size, 1),), dtype=torch.uint8)
    tensor = raw.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
    back = roundtrip(Message("x", tensors={"before": torch.ones(1, dtype=torch.uint8), "t": tensor})).tensors["t"]
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert bits(back) == bits(tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(12)[::3],
        torch.ones(2).expand(5, 2),
        torch.tensor([1 + 2j, 3 - 4j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        torch.nn.Parameter(torch.randn(3)),
    ],
    ids=["transposed", "strided", "expanded", "conjugated", "negated", "parameter"],
)
def test_views_and_parameters_travel_as_their_numbers(tensor: torch.Tensor) -> None:
    back = roundtrip(Message("x", tensors={"t": tensor})).tensors["t"]
    assert torch.equal(back, tensor.detach().resolve_conj().resolve_neg())
    assert not back.requires_grad


def test_header_fields_come_back() -> None:
    message = Message("round.update", "tunables", b"\x81\xa1a\x01", {}, counted=False)
    assert roundtrip(message) == message


def test_sizes_are_exact_and_those_of_the_prefix() -> None:
    message = Message("x", "activations", b"body", {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(5)})
    frame, prefix = encode(message, "n"), encode_prefix(message, "n")
    assert frame.payload_bytes == prefix.payload_bytes == 3 + 20
    assert len(frame.data) == frame.payload_bytes + frame.header_bytes == prefix.total_bytes


def test_decoded_tensors_are_aligned_views_and_come_without_warnings() -> None:
    data = encode(Message("x", tensors={"a": torch.ones(1, dtype=torch.bool), "b": torch.randn(4)}), "n").data
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = decode(data).message.tensors
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors.values())
    assert tensors["b"].data_ptr() == decode(data).message.tensors["b"].data_ptr()


@given(st.lists(st.integers(0, 5), max_size=4))
def test_packed_tensors_are_written_as_any_others(sizes: list[int]) -> None:
    tensors = {str(index): torch.randn(size) for index, size in enumerate(sizes)}
    plain, packed = Message("x", tensors=tensors), Message("x", tensors=Packed(tensors))
    assert encode(packed, "n") == encode(packed, "n") == encode(plain, "n")
    assert encode_prefix(packed, "n") == encode_prefix(plain, "n")


def test_a_prefix_takes_tensors_by_reference() -> None:
    tensor = torch.randn(4, requires_grad=True)
    message = Message("x", tensors={"t": tensor})
    received = decode_prefix(encode_prefix(message, "n").data, message.tensors)
    assert received.message.tensors["t"].data_ptr() == tensor.data_ptr()
    assert not received.message.tensors["t"].requires_grad


def with_header(**fields: object) -> bytes:
    header = msgspec.msgpack.encode({"v": 1, "f": "n", "m": "x"} | fields)
    data = len(header).to_bytes(4, "little") + header
    return data + bytes(-len(data) % ALIGNMENT)


def test_fields_of_newer_nodes_are_ignored() -> None:
    assert decode(with_header(later={"a": [1]})).message == Message("x")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"v": 2}, "speaks protocol version 2, this one 1"),
        ({"v": 2, "m": ["of another form"]}, "speaks protocol version 2"),
        ({"k": "gossip"}, "header of a message cannot be read"),
        ({"t": [{"n": "a", "d": "object", "s": []}]}, "dtype unknown here, 'object'"),
        ({"t": [{"n": "a", "d": "int8", "s": [0]}] * 2}, "two tensors are called 'a'"),
        ({"t": [{"n": "a", "d": "int8", "s": [1] * 17}]}, "has 17 dims, but 16"),
        ({"t": [{"n": "a", "d": "int8", "s": [0, 2**40, 2**40]}]}, "impossible shape"),
        ({"t": [{"n": "a", "d": "int8", "s": [-1]}]}, "cannot be read"),
        ({"t": [{"n": "a", "d": "int8", "s": [9]}]}, "cut or damaged"),
    ],
)
def test_wrong_headers_are_named(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        decode(with_header(**fields))


def test_bytes_that_are_no_truth_values_are_refused() -> None:
    data = bytearray(encode(Message("x", tensors={"t": torch.ones(3, dtype=torch.bool)}), "n").data)
    data[-ALIGNMENT] = 7
    with pytest.raises(ProtocolError, match="truth values"):
        decode(bytes(data))


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (Limits(message_bytes=1000), "4.* bytes, but messages may have 1000"),
        (Limits(header_bytes=10), "but 10 are allowed"),
        (Limits(tensors=1), "2 tensors, but 1"),
        (Limits(dims=1), "2 dims, but 1"),
    ],
)
def test_limits_hold_at_both_ends(limits: Limits, says: str) -> None:
    message = Message("x", tensors={"a": torch.ones(32, 32), "b": torch.ones(1)})
    with pytest.raises(ProtocolError, match=says):
        encode(message, "n", limits)
    with pytest.raises(ProtocolError):
        decode(encode(message, "n").data, limits)


@pytest.mark.parametrize(
    "tensor", [torch.eye(2).to_sparse(), torch.empty(2, device="meta")], ids=["sparse", "without data"]
)
def test_tensors_without_plain_data_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ProtocolError, match=r"'t'.*make it dense"):
        encode(Message("x", tensors={"t": tensor}), "n")


VALID = encode(Message("x", "gradients", b"b", {"a": torch.arange(5), "b": torch.ones(2, 2)}), "n").data


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_protocol_errors(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=120).map(lambda header: len(header).to_bytes(4, "little") + header))
def test_random_headers_raise_nothing_but_protocol_errors(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data + bytes(-len(data) % ALIGNMENT))


@given(st.integers(0, len(VALID) - 1))
def test_truncated_messages_are_refused(size: int) -> None:
    with pytest.raises(ProtocolError):
        decode(VALID[:size])


@settings(deadline=None, max_examples=300)
@given(st.integers(0, len(VALID) - 1), st.integers(1, 255))
def test_a_flipped_byte_is_another_message_or_a_protocol_error(index: int, change: int) -> None:
    damaged = bytearray(VALID)
    damaged[index] ^= change
    with contextlib.suppress(ProtocolError):
        decode(bytes(damaged))


def test_deeply_nested_nonsense_is_a_protocol_error() -> None:
    nested = b"\x83\xa1v\x01\xa1f\xa1n\xa1z" + b"\x91" * 100_000 + b"\xc0"
    data = len(nested).to_bytes(4, "little") + nested
    with pytest.raises(ProtocolError):
        decode(data + bytes(-len(data) % ALIGNMENT))
