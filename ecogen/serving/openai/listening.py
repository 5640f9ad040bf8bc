"""The API server on a port of its own, in an event loop that others use too."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from ecogen.errors import ServingError
from ecogen.serving.openai.connection import ABORT

GRACE_S = 10.0
"""How long answers may take to end when the server is told to."""

_UVICORN = logging.getLogger("uvicorn.error")

# The system's own buffer grows to some MB, many thousand tokens: who reads none of them would not be noticed.
_SEND_BUFFER_BYTES = 2**17


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


async def serve_http(
    app: Starlette,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    on_ready: Callable[[Address], None] = lambda _: None,
    allow_open: bool = False,
    grace_s: float = GRACE_S,
) -> None:
    """Serve until cancelled; then answers end first. See `listening`."""
    async with listening(app, host, port, allow_open=allow_open, grace_s=grace_s) as (address, serving):
        on_ready(address)
        await asyncio.shield(serving)


@asynccontextmanager
async def listening(
    app: Starlette, host: str = "127.0.0.1", port: int = 0, *, allow_open: bool = False, grace_s: float = GRACE_S
) -> AsyncIterator[tuple[Address, asyncio.Task[None]]]:
    """Serve meanwhile; yields where, and the task that does it.

    Args:
        port: 0 for any that is free.
        allow_open: to listen for other machines too without keys.

    Raises:
        ServingError: if the address is taken or not this machine's, or others could ask without a key.
    """
    if app.state.is_open and not allow_open and not _is_loopback(host):
        raise ServingError(
            f"without API keys whoever reaches {host} may ask; give keys, listen on 127.0.0.1, or allow it explicitly"
        )
    listener = _listener(host, port)
    server = _Server(
        uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=max(1, round(grace_s)),
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield Address(*listener.getsockname()[:2]), serving
    finally:
        _UVICORN.addFilter(_is_news)
        try:
            await _stop(server, serving)
        finally:
            _UVICORN.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether uvicorn logs more than that it breaks off what takes too long to end, which is how ending goes."""
    problem = record.exc_info[1] if record.exc_info else None
    return not (isinstance(problem, asyncio.CancelledError) or str(record.msg).startswith("Cancel %s running task"))


class _Server(uvicorn.Server):
    """Leaves signals to whoever owns the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(H11Protocol):
    """A connection that an endpoint can break off: closing it would wait for a reader that does not read."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        self.app_state = self.app_state | {ABORT: transport.abort}


async def _stop(server: _Server, serving: asyncio.Task[None]) -> None:
    """No new requests; then those that run end or, when their time is up, are told; then connections close."""
    server.should_exit = True
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        server.force_exit = True
        raise
    finally:
        tasks = list(server.server_state.tasks)
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(server.server_state.connections):
            connection.transport.abort()


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens, so that its port is known before anyone is told."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as problem:
        raise ServingError(f"cannot listen on {host}:{port}: {problem}; choose another address or port") from problem
    # connections inherit both; asyncio sets the second only on sockets whose protocol was named, and without it an
    # answer's second packet waits 40 ms for the first one's acknowledgement
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
