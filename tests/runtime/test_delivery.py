"""Tensors arrive bit for bit in pieces of any size, only those that were asked for, and no parent can send others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ecogen.errors import AuthenticationError, CheckpointError, ProtocolError
from ecogen.runtime import delivery
from ecogen.runtime.delivery import FETCH, Cursor, Fetch, Piece, Pieces, fetch_tensors, serve_pieces
from ecogen.transport.base import Message, Peer, Stream
from ecogen.transport.memory import MemoryNetwork

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8]


class Parent:
    """Serves a checkpoint, and keeps what was read of it and how large its answers were."""

    def __init__(self, checkpoint: Mapping[str, Tensor]) -> None:
        self.checkpoint = checkpoint
        self.read_names: set[str] = set()
        self.sizes: list[int] = []

    async def handle(self, _: Peer, message: Message) -> Message:
        answer = serve_pieces(message, self._read)
        assert answer.kind == "backbone"
        self.sizes.append(sum(part.nbytes for part in answer.tensors.values()))
        return answer

    async def accept(self, peer: Peer, stream: Stream) -> None:
        raise AuthenticationError("nobody streams to a parent")

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        self.read_names |= set(names)
        return {name: self.checkpoint[name] for name in names if name in self.checkpoint}


class Liar(Parent):
    """Answers anything with the same pieces."""

    def __init__(self, *pieces: tuple[str, int, list[int], int], cursor: Cursor | None = None) -> None:
        super().__init__({})
        body = Pieces([Piece(name, start, shape) for name, start, shape, _ in pieces], cursor)
        tensors = {str(index): torch.ones(size) for index, (*_, size) in enumerate(pieces)}
        self.answer = Message.of(FETCH, body, tensors=tensors)

    async def handle(self, _: Peer, __: Message) -> Message:
        return self.answer


async def fetch(parent: Parent, *names: str) -> dict[str, Tensor]:
    network = MemoryNetwork()
    await network.join(Peer("edge", "edge")).serve(parent)
    return await asyncio.wait_for(fetch_tensors(network.join(Peer("end", "end")), "edge", list(names)), 5)


async def test_what_is_fetched_out_of_the_books_is_in_neither_ones() -> None:
    network, parent = MemoryNetwork(), Parent({"a": torch.zeros(9)})
    edge, operator = network.join(Peer("edge", "edge")), network.join(Peer("operator", "operator"))
    await edge.serve(parent)
    await fetch_tensors(operator, "edge", ["a"], counted=False)
    assert (edge.counter.take(), operator.counter.take()) == ((), ())
    await fetch_tensors(operator, "edge", ["a"])
    assert [(line.kind, line.payload_bytes) for line in edge.counter.take()] == [("backbone", 36)]
    assert len(operator.counter.take()) == 1


def noise(shape: Iterable[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 200, tuple(shape), generator=generator).to(dtype)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES)), min_size=1, max_size=4),
    st.integers(1, 100),
)
def test_tensors_of_any_shape_arrive_whole_in_pieces_of_any_size(
    kinds: list[tuple[list[int], torch.dtype]], piece_bytes: int
) -> None:
    tensors = {f"t{seed}": noise(shape, dtype, seed) for seed, (shape, dtype) in enumerate(kinds)}
    parent = Parent(tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delivery, "PIECE_BYTES", piece_bytes)
        fetched = asyncio.run(fetch(parent, *tensors))
    assert fetched.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert fetched[name].dtype == tensor.dtype
        assert torch.equal(fetched[name], tensor)
    assert sum(parent.sizes) == sum(tensor.nbytes for tensor in tensors.values())
    assert max(parent.sizes) < piece_bytes + 8  # one element is the least that a piece can hold


async def test_small_tensors_share_an_answer_and_a_large_one_has_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "PIECE_BYTES", 400)
    parent = Parent({"a": torch.ones(10), "b": torch.ones(10), "c": torch.ones(15, 15)})
    await fetch(parent, "a", "b")
    assert parent.sizes == [80]
    await fetch(parent, "c")
    assert parent.sizes == [80, 400, 400, 100]


async def test_a_tensor_whose_memory_is_not_contiguous_arrives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "PIECE_BYTES", 20)
    transposed = torch.arange(12.0).reshape(3, 4).T
    assert torch.equal((await fetch(Parent({"w": transposed}), "w"))["w"], transposed)


async def test_only_what_is_asked_for_is_read_and_sent() -> None:
    parent = Parent({name: torch.ones(3) for name in "abc"})
    assert (await fetch(parent, "c", "a")).keys() == {"a", "c"}
    assert parent.read_names == {"a", "c"}


async def test_what_arrives_shares_no_memory_with_the_checkpoint() -> None:
    parent = Parent({"a": torch.zeros(3)})
    (await fetch(parent, "a"))["a"].fill_(1)
    assert parent.checkpoint["a"].tolist() == [0, 0, 0]


async def test_asking_for_nothing_asks_nobody() -> None:
    parent = Parent({})
    assert await fetch(parent) == {}
    assert not parent.sizes


async def test_a_name_that_the_parent_lacks_is_told() -> None:
    with pytest.raises(CheckpointError, match="the checkpoint has no tensor 'b'"):
        await fetch(Parent({"a": torch.ones(1)}), "a", "b")


@pytest.mark.parametrize("cursor", [Cursor(2, 0), Cursor(-1, 0), Cursor(0, -1), Cursor(99, 5)])
def test_a_cursor_outside_is_refused(cursor: Cursor) -> None:
    message = Message.of(FETCH, Fetch(["a", "b"], cursor))
    with pytest.raises(ProtocolError, match=rf"cursor {cursor.index}, {cursor.element} is outside of 2 names"):
        serve_pieces(message, lambda names: {name: torch.ones(3) for name in names})


@pytest.mark.parametrize(
    ("parent", "reason"),
    [
        (Liar(), "edge did not send 'w'"),
        (Liar(("w", 0, [4], 4), ("v", 0, [4], 4)), "nobody asked for: 'v'"),
        (Liar(("w", 0, [4], 5)), r"'w' does not fit its shape \[4\]"),
        (Liar(("w", 1, [4], 4)), "a piece of 'w' is missing before element 1"),
        (Liar(("w", 2**40, [4], 1)), "a piece of 'w' is missing before element 1099511627776"),
        (Liar(("w", 0, [4], 2), ("w", 2, [2, 2], 2)), r"'w' does not fit its shape \[2, 2\]"),
        (Liar(("w", 0, [4], 2), ("w", 2, [8], 4)), r"'w' does not fit its shape \[8\]"),
    ],
)
async def test_what_was_not_asked_for_is_refused(parent: Liar, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        await fetch(parent, "w")


@pytest.mark.parametrize(
    "parent",
    [
        pytest.param(Liar(("w", 0, [4], 2)), id="the end is missing"),
        pytest.param(Liar(("w", 2, [4], 2)), id="the beginning is missing"),
        pytest.param(Liar(("w", -3, [4], 2)), id="before the beginning"),
        pytest.param(Liar(("w", -2, [4], 2)), id="across the beginning"),
        pytest.param(Liar(("w", 0, [-2, -2], 4)), id="a shape that cannot be"),
        pytest.param(Liar(("w", 0, [2**50], 4)), id="more than any memory"),
    ],
)
async def test_a_tensor_that_is_not_sent_whole_is_refused(parent: Liar) -> None:
    with pytest.raises(CheckpointError, match="'w'"):
        await fetch(parent, "w")


async def test_a_piece_without_its_tensor_is_refused() -> None:
    parent = Liar(("w", 0, [4], 4))
    parent.answer = Message(FETCH, body=parent.answer.body)
    with pytest.raises((CheckpointError, ProtocolError)):
        await fetch(parent, "w")


async def test_a_parent_that_sends_nothing_for_ever_is_refused() -> None:
    parent = Liar(("w", 0, [4], 0))
    parent.answer = Message.of(FETCH, Pieces([], Cursor(0, 0)))
    with pytest.raises(CheckpointError, match="again and again"):
        await asyncio.wait_for(fetch(parent, "w"), 5)


async def test_a_cursor_beyond_a_tensor_is_refused() -> None:
    with pytest.raises(ProtocolError, match="element 4 is outside"):
        serve_pieces(Message.of(FETCH, Fetch(["w"], Cursor(0, 4))), lambda _: {"w": torch.zeros(4)})
