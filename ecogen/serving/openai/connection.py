"""One client's connection: its body within limits, its events, and that it may leave or stop reading at any time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from ecogen.serving.openai.limits import Limits
from ecogen.serving.openai.refusals import Refusal

logger = logging.getLogger(__name__)

ABORT = "abort"
"""Under this name a connection's state holds what breaks it off, where the server knows how."""


class SlowReader(Exception):
    """A client takes nothing for too long."""


async def read_body(request: Request, limits: Limits) -> bytes:
    """A request's body.

    Raises:
        Refusal: if it is too large (413) or too long in coming (408).
        ClientDisconnect: if the client leaves meanwhile.
    """
    too_large = Refusal(413, f"The body is larger than {limits.body_bytes} bytes", code="request_too_large")
    if int(request.headers.get("content-length", 0)) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            async for part in request.stream():
                body += part
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError as problem:
        raise Refusal(408, f"The body did not come within {limits.body_s:g} s", code="request_timeout") from problem
    return bytes(body)


async def while_connected(scope: Scope, receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work unless the client leaves or stops reading.

    Raises:
        ClientDisconnect: if it did; by then the work has been broken off.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    except SlowReader as problem:
        logger.info("a client took nothing of its answer for too long: its connection is broken off")
        if abort := scope.get("state", {}).get(ABORT):
            abort()
            await leaving
        raise ClientDisconnect from problem
    finally:
        await _end(working)
        await _end(leaving)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait until it has cleaned up."""
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task


class Reply:
    """An answer on its way: one JSON object, or server-sent events.

    Args:
        write_s: how long the client may take nothing.
    """

    def __init__(self, send: Send, write_s: float) -> None:
        self._send_now, self._write_s = send, write_s
        self.has_begun = False

    async def json(self, content: object) -> None:
        """All of an answer.

        Raises:
            SlowReader: as of all that sends.
        """
        body = msgspec.json.encode(content)
        await self._begin(b"application/json", (b"content-length", str(len(body)).encode()))
        await self._body(body, more=False)

    async def event(self, content: object) -> None:
        """One event of a stream, which begins with the first."""
        await self._event(msgspec.json.encode(content))

    async def done(self) -> None:
        """The end of a stream, as OpenAI says it."""
        await self._event(b"[DONE]")
        await self.end()

    async def end(self) -> None:
        """The end of what was sent."""
        await self._body(b"", more=False)

    async def _event(self, data: bytes) -> None:
        if not self.has_begun:
            # proxies must not wait for more, as nginx does without the second
            await self._begin(b"text/event-stream", (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
        await self._body(b"data: " + data + b"\n\n", more=True)

    async def _begin(self, media_type: bytes, *headers: tuple[bytes, bytes]) -> None:
        self.has_begun = True
        await self._send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", media_type), *headers]}
        )

    async def _body(self, body: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _send(self, message: dict[str, Any]) -> None:
        """Waits while what was sent before is not taken."""
        try:
            async with asyncio.timeout(self._write_s):
                await self._send_now(message)
        except TimeoutError as problem:
            raise SlowReader from problem
