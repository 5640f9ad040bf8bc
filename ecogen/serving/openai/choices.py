"""Answers as they come: the tokens of one or many generations, turned into pieces of text that may be shown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ecogen.serving.generation import Finish, GenerationRequest, Serving
from ecogen.serving.openai.pieces import TextStream
from ecogen.serving.openai.stops import StopSearch
from ecogen.serving.sampling import Chosen

Reason = Literal["stop", "length"]
Answering = AsyncGenerator[Chosen | Finish, bool | None]

# Pieces of several choices that may wait for a slow reader; each of them waits with its next when that many do.
_BUFFERED = 32


class Told(NamedTuple):
    """A token, and where its text begins in the answer's."""

    chosen: Chosen
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """More of a choice's text, and the tokens that it came of.

    Attributes:
        index: of the choice.
        reason: why the choice ends here; None where it goes on.
        num_tokens: of the choice so far, those included whose text is not shown.
        finish: what it took; None before its end, and where that is not known.
    """

    index: int
    text: str
    told: tuple[Told, ...]
    num_tokens: int
    reason: Reason | None = None
    finish: Finish | None = None


class Telling:
    """One answer's text as far as it may be shown: whole characters, and nothing that may begin a stop string."""

    def __init__(self, stream: TextStream, stops: Sequence[str]) -> None:
        self._stream, self._stops = stream, StopSearch(stops)
        self._length = self._shown = 0
        self._waiting: list[Told] = []

    def take(self, chosen: Chosen) -> tuple[str, tuple[Told, ...], bool]:
        """What may be shown with this token, the tokens behind it, and whether a stop string follows."""
        self._waiting.append(Told(chosen, self._length))
        text, is_over = self._show(self._stream.take(chosen.token))
        return text, self._told(), is_over

    def rest(self) -> tuple[str, tuple[Told, ...], bool]:
        """What is left where no more tokens come; a stop string may end in it."""
        text, is_over = self._show(self._stream.rest())
        if is_over:
            return text, self._told(), True
        left, self._waiting = tuple(self._waiting), []
        return text + self._stops.rest(), left, False

    def _show(self, text: str) -> tuple[str, bool]:
        self._length += len(text)
        shown, is_over = self._stops.take(text)
        self._shown += len(shown)
        return shown, is_over

    def _told(self) -> tuple[Told, ...]:
        """The tokens whose text has begun to be shown."""
        count = sum(told.offset < self._shown for told in self._waiting)
        told, self._waiting = tuple(self._waiting[:count]), self._waiting[count:]
        return told


async def choice(
    serving: Serving, request: GenerationRequest, telling: Telling, index: int, on_token: Callable[[], None]
) -> AsyncGenerator[Piece, None]:
    """One choice's pieces; the last has a reason.

    Args:
        on_token: called as each token comes.
    """
    count, is_ended, finish = 0, False, None
    async with aclosing(serving.generate(request)) as answering:
        async for event in answering:
            if isinstance(event, Finish):
                finish = event
                continue
            count += 1
            on_token()
            if event.token in request.ends:
                is_ended = True
                continue
            text, told, is_over = telling.take(event)
            if is_over:
                yield Piece(index, text, told, count, "stop", await _leave(answering))
                return
            if text or told:
                yield Piece(index, text, told, count)
    text, told, is_over = telling.rest()
    is_full = count == request.max_new and not is_ended and not is_over
    yield Piece(index, text, told, count, "length" if is_full else "stop", finish)


async def _leave(answering: Answering) -> Finish | None:
    """Have enough of an answer; what it took, where that is told."""
    try:
        last = await answering.asend(True)
    except StopAsyncIteration:
        return None
    return last if isinstance(last, Finish) else None


async def merged(choices: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """The pieces of all choices as they come; one that fails fails all.

    A reader that is slow makes all wait: no more than `_BUFFERED` pieces lie here.
    """
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(_BUFFERED)
    tasks = [asyncio.create_task(_pump(one, queue)) for one in choices]
    try:
        left = len(tasks)
        while left:
            piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                left -= 1
            else:
                yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(one: AsyncGenerator[Piece, None], queue: asyncio.Queue[Piece | Exception | None]) -> None:
    """Put all of one choice into the queue, then None; or what went wrong."""
    try:
        async with aclosing(one):
            async for piece in one:
                await queue.put(piece)
    except Exception as problem:
        await queue.put(problem)
    else:
        await queue.put(None)
