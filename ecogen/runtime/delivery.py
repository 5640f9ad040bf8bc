"""Delivery: a node fetches the tensors of its segments from its parent, piece by piece, and no others.

Pieces are at most `PIECE_BYTES`, so that no message is large and a tensor of any size passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec
import torch
from torch import Tensor

from ecogen.errors import CheckpointError, ProtocolError
from ecogen.transport.base import Message, Transport

FETCH = "fetch"
PIECE_BYTES = 4 * 2**20


class Cursor(msgspec.Struct, frozen=True):
    """Where the next piece begins: the index of a name, and an element of its tensor."""

    index: int = 0
    element: int = 0


class Fetch(msgspec.Struct, frozen=True):
    """Ask for named tensors from a cursor on."""

    names: list[str]
    cursor: Cursor


class Piece(msgspec.Struct, frozen=True):
    """Elements [start, ...) of a flattened tensor of this shape."""

    name: str
    start: int
    shape: list[int]


class Pieces(msgspec.Struct, frozen=True):
    """An answer to `Fetch`; `tensors` of the message hold the pieces by their number. No cursor means all is sent."""

    pieces: list[Piece]
    cursor: Cursor | None


def serve_pieces(message: Message, read: Callable[[Iterable[str]], Mapping[str, Tensor]]) -> Message:
    """Answer one `Fetch` from a checkpoint.

    Args:
        read: gives named tensors of the checkpoint, those that it has.

    Raises:
        CheckpointError: if a name is not in the checkpoint.
        ProtocolError: if the cursor is outside.
    """
    fetch = message.read(Fetch)
    index, element, room = fetch.cursor.index, fetch.cursor.element, PIECE_BYTES
    if not 0 <= index < len(fetch.names) or element < 0:
        raise ProtocolError(f"{FETCH}: cursor {index}, {element} is outside of {len(fetch.names)} names")
    pieces: list[Piece] = []
    tensors: dict[str, Tensor] = {}
    while index < len(fetch.names) and room > 0:
        name = fetch.names[index]
        tensor = _read_one(name, read)
        if element > max(0, tensor.numel() - 1):
            raise ProtocolError(f"{FETCH}: element {element} is outside of {name!r}, which has {tensor.numel()}")
        count = room // tensor.element_size()
        if not count and pieces:
            break
        count = max(1, count)
        part = tensor.reshape(-1)[element : element + count]
        tensors[str(len(pieces))] = part
        pieces.append(Piece(name, element, list(tensor.shape)))
        room -= part.nbytes
        element += len(part)
        if element >= tensor.numel():
            index, element = index + 1, 0
    cursor = Cursor(index, element) if index < len(fetch.names) else None
    return Message.of(FETCH, Pieces(pieces, cursor), kind="backbone", tensors=tensors, counted=message.counted)


async def fetch_tensors(
    transport: Transport, parent_id: str, names: list[str], *, counted: bool = True
) -> dict[str, Tensor]:
    """The named tensors of a parent's checkpoint.

    Args:
        counted: False keeps it out of the books of both.

    Raises:
        CheckpointError: if the parent lacks one, or sent something else than was asked for.
        NodeLostError: if the parent is lost.
    """
    assembly = _Assembly(names)
    cursor: Cursor | None = Cursor() if names else None
    while cursor is not None:
        reply = await transport.call(parent_id, Message.of(FETCH, Fetch(names, cursor), counted=counted))
        answer = reply.read(Pieces)
        for number, piece in enumerate(answer.pieces):
            assembly.add(piece, reply.tensors.get(str(number)))
        if answer.cursor and (answer.cursor.index, answer.cursor.element) <= (cursor.index, cursor.element):
            raise CheckpointError(f"{parent_id} sends the same piece again and again")
        cursor = answer.cursor
    return assembly.whole(parent_id)


def _read_one(name: str, read: Callable[[Iterable[str]], Mapping[str, Tensor]]) -> Tensor:
    tensors = read([name])
    if name not in tensors:
        raise CheckpointError(f"the checkpoint has no tensor {name!r}")
    return tensors[name]


class _Assembly:
    """Tensors that are put together from pieces, each from its first element to its last."""

    def __init__(self, names: Iterable[str]) -> None:
        self._filled = dict.fromkeys(names, 0)
        self._tensors: dict[str, Tensor] = {}

    def add(self, piece: Piece, part: Tensor | None) -> None:
        """Copy the next piece into its tensor, which is made with the first one.

        Raises:
            CheckpointError: if it is not the next one, or does not fit.
        """
        if piece.name not in self._filled:
            raise CheckpointError(f"a tensor came that nobody asked for: {piece.name!r}")
        if part is None or piece.start != self._filled[piece.name]:
            raise CheckpointError(f"a piece of {piece.name!r} is missing before element {piece.start}")
        if piece.name not in self._tensors:
            self._tensors[piece.name] = _empty(piece, part)
        tensor = self._tensors[piece.name]
        end = piece.start + part.numel()
        if end > tensor.numel() or list(tensor.shape) != piece.shape or tensor.dtype != part.dtype:
            raise CheckpointError(f"a piece of {piece.name!r} does not fit its shape {piece.shape}")
        tensor.view(-1)[piece.start : end] = part.reshape(-1)
        self._filled[piece.name] = end

    def whole(self, parent_id: str) -> dict[str, Tensor]:
        """All tensors.

        Raises:
            CheckpointError: if one is not complete.
        """
        for name, filled in self._filled.items():
            if name not in self._tensors or filled < self._tensors[name].numel():
                raise CheckpointError(f"{parent_id} did not send {name!r} to its end")
        return self._tensors


def _empty(piece: Piece, part: Tensor) -> Tensor:
    try:
        return torch.empty(piece.shape, dtype=part.dtype)
    except (RuntimeError, TypeError, MemoryError) as problem:
        raise CheckpointError(f"{piece.name!r} came with an impossible shape, {piece.shape}") from problem
