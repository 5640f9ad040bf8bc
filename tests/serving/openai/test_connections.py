"""Clients that leave or do not read, and servers that end: nobody keeps a slot, and what runs may finish."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from typing import Any

import openai
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Mount

from ecogen.errors import ServingError
from ecogen.serving.openai.app import build_app
from ecogen.serving.openai.connection import ABORT
from ecogen.serving.openai.echo import EchoServing
from ecogen.serving.openai.limits import Limits
from ecogen.serving.openai.listening import Address, listening, serve_http
from tests.serving.openai.served import ScriptedServing, client_of, echo_app, scripted_app, text_model, tokens

END_OF_BODY = b"0\r\n\r\n"
HELLO = {"model": "model", "prompt": "hello"}


async def connected(port: int, body: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
    """A connection over which a completion has been asked for."""
    own = socket.socket()
    if receive_buffer:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    own.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(own, ("127.0.0.1", port))
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    await loop.sock_sendall(own, head.encode() + content)
    return own


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_who_leaves_frees_the_slots(streams: bool, n: int) -> None:
    serving = ScriptedServing([70] * 9, stalls=2)
    async with listening(scripted_app(serving)) as (address, _):
        own = await connected(address.port, HELLO | {"stream": streams, "n": n})
        await serving.stalled.wait()
        own.close()
        async with asyncio.timeout(5):
            await serving.idle.wait()
    assert len(serving.asked) == n


@pytest.mark.parametrize("n", [1, 3])
async def test_who_does_not_read_frees_the_slots(n: int) -> None:
    """An answer that never ends is not made for a reader that takes nothing; its connection is broken off."""
    serving = ScriptedServing(Endless())
    async with listening(scripted_app(serving, limits=Limits(write_s=0.1))) as (address, _):
        own = await connected(address.port, HELLO | {"stream": True, "n": n, "max_tokens": 60}, receive_buffer=4096)
        async with asyncio.timeout(10):
            await serving.idle.wait()
            received = bytearray()
            while part := await asyncio.get_running_loop().sock_recv(own, 2**20):
                received += part
        own.close()
    assert received.count(b"data: ") > 100
    assert not received.endswith(END_OF_BODY)


class Endless(list[int]):
    """Tokens without end, whatever their number was to be."""

    def __getitem__(self, _: Any) -> Any:
        return iter(lambda: 70, None)


async def test_who_reads_slowly_gets_all() -> None:
    """Slower than the server for longer than a reader may take nothing, but never that long at a time."""
    said = tokens("hello world, this is a test ") * 2000
    async with listening(echo_app_of(said)) as (address, _):
        body = {"model": "echo", "prompt": said, "stream": True, "max_tokens": len(said)}
        own = await connected(address.port, body, receive_buffer=4096)
        loop, received = asyncio.get_running_loop(), bytearray()
        async with asyncio.timeout(20):
            while not received.endswith(END_OF_BODY):
                received += await loop.sock_recv(own, 2**18)
                await asyncio.sleep(0.001)
        own.close()
    assert received.count(b"data: ") == len(said) + 3
    assert b"data: [DONE]\n\n" in received


def echo_app_of(said: list[int]) -> Any:
    return build_app(EchoServing(max_tokens=3 * len(said)), text_model(), limits=Limits(write_s=0.5))


async def test_a_request_that_runs_may_end_when_the_server_does() -> None:
    serving = ScriptedServing([70] * 9, stalls=2)
    async with openai.AsyncOpenAI(base_url="http://x", api_key="x", max_retries=0) as client:
        async with listening(scripted_app(serving), grace_s=5) as (address, _):
            asked = client.with_options(base_url=f"{address}/v1")
            answer = asyncio.create_task(asked.completions.create(**HELLO))
            await serving.stalled.wait()
            asyncio.get_running_loop().call_later(0.2, serving.resume.set)
        assert (await answer).usage.completion_tokens == 9
        with pytest.raises(openai.APIConnectionError):
            await asked.completions.create(**HELLO)


@pytest.mark.parametrize("streams", [False, True])
async def test_a_request_that_does_not_end_is_told(streams: bool) -> None:
    serving = ScriptedServing([70] * 9, stalls=2)
    async with openai.AsyncOpenAI(base_url="http://x", api_key="x", max_retries=0) as client:

        async def ask(address: Address) -> None:
            asked = client.with_options(base_url=f"{address}/v1")
            answer = await asked.completions.create(**HELLO, stream=streams)
            async for _ in answer:
                pass

        async with listening(scripted_app(serving), grace_s=1) as (address, _):
            answer = asyncio.create_task(ask(address))
            await serving.stalled.wait()
        with pytest.raises(openai.APIError, match="The server is shutting down") as error:
            await answer
    assert getattr(error.value, "status_code", None) == (None if streams else 503)
    assert serving.running == 0


async def test_what_has_to_be_broken_off_is_no_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Not of paths either that have nothing to say to it."""
    begun = asyncio.Event()

    async def hang(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    app = Starlette(routes=[Mount("/hang", hang)])
    app.state.is_open = False
    async with openai.AsyncOpenAI(base_url="http://x", api_key="x", max_retries=0) as client:
        async with listening(app, grace_s=1) as (address, _):
            hung = client.with_options(base_url=f"{address}/hang")
            asking = asyncio.create_task(hung.get("/x", cast_to=object))
            await begun.wait()
        with pytest.raises(openai.APIError):
            await asking
    assert not caplog.records


async def test_serving_until_cancelled() -> None:
    """It says where it listens, and leaves the port when it is cancelled."""
    ready: asyncio.Future[Address] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(serve_http(echo_app(), port=0, on_ready=ready.set_result))
    address = await ready
    assert str(address) == f"http://127.0.0.1:{address.port}"
    with pytest.raises(ServingError, match=f"cannot listen on 127.0.0.1:{address.port}"):
        await serve_http(echo_app(), port=address.port)
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="x") as client:
        assert (await client.models.retrieve("echo")).id == "echo"
    server.cancel()
    with pytest.raises(asyncio.CancelledError):
        await server
    async with listening(echo_app(), port=address.port):
        pass


async def test_signals_stay_their_owners() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    async with client_of(echo_app()) as client:
        await client.models.retrieve("echo")
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


async def test_nothing_waits_for_an_acknowledgement() -> None:
    """An answer's head and body are two packets; with Nagle's algorithm the second would be 40 ms late."""
    taken: list[int] = []

    async def look(scope: Any, receive: Any, send: Any) -> None:
        transport = scope["state"][ABORT].__self__
        taken.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        await Response()(scope, receive, send)

    app = Starlette(routes=[Mount("/", look)])
    app.state.is_open = True
    async with client_of(app) as client:
        await client.get("/look", cast_to=object)
    assert taken == [1]
