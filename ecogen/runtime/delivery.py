"""Delivery: a node fetches the tensors of its segments from its parent, piece by piece, and no others.

Pieces are at most `PIECE_BYTES`, so that no message is large and a tensor of any size passes.
"""

from __future__ import annotations

import math
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
        count = max(1, room // tensor.element_size())
        part = tensor.reshape(-1)[element : element + count]
        tensors[str(len(pieces))] = part
        pieces.append(Piece(name, element, list(tensor.shape)))
        room -= part.nbytes
        element += len(part)
        if element >= tensor.numel():
            index, element = index + 1, 0
    cursor = Cursor(index, element) if index < len(fetch.names) else None
    return Message.of(FETCH, Pieces(pieces, cursor), kind="backbone", tensors=tensors)


async def fetch_tensors(transport: Transport, parent_id: str, names: list[str]) -> dict[str, Tensor]:
    """The named tensors of a parent's checkpoint.

    Raises:
        CheckpointError: if the parent lacks one, or sent something else than was asked for.
        NodeLostError: if the parent is lost.
    """
    flat: dict[str, Tensor] = {}
    cursor: Cursor | None = Cursor() if names else None
    while cursor is not None:
        reply = await transport.call(parent_id, Message.of(FETCH, Fetch(names, cursor)))
        answer = reply.read(Pieces)
        for number, piece in enumerate(answer.pieces):
            _place(flat, piece, reply.tensors[str(number)], set(names))
        cursor = answer.cursor
    if set(names) - flat.keys():
        raise CheckpointError(f"{parent_id} did not send {sorted(set(names) - flat.keys())[0]!r}")
    return flat


def _read_one(name: str, read: Callable[[Iterable[str]], Mapping[str, Tensor]]) -> Tensor:
    tensors = read([name])
    if name not in tensors:
        raise CheckpointError(f"the checkpoint has no tensor {name!r}")
    return tensors[name]


def _place(flat: dict[str, Tensor], piece: Piece, part: Tensor, wanted: set[str]) -> None:
    """Copy a piece into its tensor, which is made with the first one."""
    if piece.name not in wanted:
        raise CheckpointError(f"a tensor came that nobody asked for: {piece.name!r}")
    if piece.name not in flat:
        flat[piece.name] = torch.empty(piece.shape, dtype=part.dtype)
    if piece.start + part.numel() > math.prod(piece.shape) or list(flat[piece.name].shape) != piece.shape:
        raise CheckpointError(f"a piece of {piece.name!r} does not fit its shape {piece.shape}")
    flat[piece.name].view(-1)[piece.start : piece.start + part.numel()] = part
