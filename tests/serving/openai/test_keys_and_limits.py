"""Who may ask, and how much."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import httpx2
import openai
import pytest

from ecogen.errors import ConfigError, ServingError
from ecogen.serving.openai.keys import Caller, Keys, read_keys
from ecogen.serving.openai.limits import Gate, Limits
from ecogen.serving.openai.listening import listening
from ecogen.serving.openai.refusals import Refusal
from tests.serving.openai.served import ScriptedServing, client_of, echo_app, scripted_app, tokens

KEYS = {"key-of-a": "a", "another-of-a": "a", "key-of-b": "b"}


async def test_a_key_is_a_tenants_and_shows_its_models_only() -> None:
    serving = ScriptedServing(tokens("x"), names=("model", "of-a", "of-b"))
    serving.tenants = {"of-a": "a", "of-b": "b"}
    async with client_of(scripted_app(serving, keys=Keys(KEYS)), key="key-of-a") as client:
        assert [model.id async for model in client.models.list()] == ["model", "of-a"]
        assert (await client.models.retrieve("of-a")).model_dump()["parent"] == "model"
        await client.completions.create(model="of-a", prompt="x")
        with pytest.raises(openai.NotFoundError, match="'of-b' does not exist"):
            await client.completions.create(model="of-b", prompt="x")
        others = client.with_options(api_key="another-of-a")
        await others.completions.create(model="of-a", prompt="x")
    assert [asked.tenant for asked in serving.asked] == ["a", "a"]


async def test_without_a_good_key_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    app = echo_app(keys=Keys(KEYS))
    async with client_of(app, key="key-of-nobody") as client, httpx2.AsyncClient() as http:
        for call in (client.models.list(), client.completions.create(model="echo", prompt="x")):
            with pytest.raises(openai.AuthenticationError) as error:
                await call
            assert error.value.code == "invalid_api_key"
            assert error.value.response.headers["www-authenticate"] == "Bearer"
        for path in ("models", "models/echo", "../metrics"):
            for header in ({}, {"Authorization": "Basic key-of-a"}, {"Authorization": "Bearer"}):
                answer = await http.get(f"{client.base_url}{path}", headers=header)
                assert answer.status_code == 401
                assert answer.json()["error"]["message"]
        assert (await http.get(f"{client.base_url}../health")).json() == {"status": "ok"}
        good = {"Authorization": "bearer key-of-a"}
        assert (await http.get(f"{client.base_url}../metrics", headers=good)).status_code == 200
    assert "key-of" not in caplog.text


def test_keys_are_not_kept() -> None:
    keys = Keys(KEYS)
    assert "key-of-a" not in repr(vars(keys))
    assert keys.caller("Bearer key-of-a").key_id != Keys(KEYS).caller("Bearer key-of-a").key_id


def test_keys_from_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys.toml"
    path.write_text('# who may ask\na = ["key-of-a", "another-of-a"]\nb = "key-of-b"\n')
    path.chmod(0o600)
    keys = read_keys(path)
    assert not caplog.records
    assert {key: keys.caller(f"Bearer {key}").tenant for key in KEYS} == KEYS
    path.chmod(0o644)
    read_keys(path)
    assert "can be read by others" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a = 5", "a: a key is text"),
        ('a = "secret key"', "a: a key is text without blanks"),
        ('a = ""', "a: a key is text"),
        ('a = "secret"\nb = ["secret"]', "b: has a key of a"),
        ("", "has no keys"),
        ("a = ", "cannot be read"),
    ],
)
def test_files_that_are_no_keys(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as problem:
        read_keys(path)
    assert "secret" not in str(problem.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "none.toml")


async def test_others_may_not_ask_without_keys() -> None:
    for host in ("0.0.0.0", "::", ""):
        with pytest.raises(ServingError, match="without API keys"):
            async with listening(echo_app(), host):
                pass
    async with listening(echo_app(), "0.0.0.0", allow_open=True) as (address, _):
        assert address.port
    async with listening(echo_app(keys=Keys(KEYS)), "0.0.0.0"):
        pass


async def test_requests_at_once() -> None:
    """Of one key; others have their own; who leaves makes room."""
    serving = ScriptedServing([70] * 9, stalls=1)
    app = scripted_app(serving, keys=Keys(KEYS), limits=Limits(requests_at_once=1))
    async with client_of(app, key="key-of-a") as client:
        stream = await client.completions.create(model="model", prompt="x", stream=True)
        await serving.stalled.wait()
        with pytest.raises(openai.RateLimitError, match="1 requests running") as error:
            await client.completions.create(model="model", prompt="x")
        assert (error.value.code, error.value.type) == ("rate_limit_exceeded", "requests")
        assert int(error.value.response.headers["retry-after"]) >= 1
        other = client.with_options(api_key="key-of-b")
        await (await other.completions.create(model="model", prompt="x", stream=True)).close()
        serving.left.clear()
        await stream.close()
        await serving.left.wait()
        serving.resume.set()
        assert (await client.completions.create(model="model", prompt="x")).choices


async def test_requests_a_minute() -> None:
    app = echo_app(limits=Limits(requests_per_minute=2))
    async with client_of(app) as client:
        for _ in range(2):
            await client.completions.create(model="echo", prompt="x")
        with pytest.raises(openai.RateLimitError, match="2 times a minute") as error:
            await client.completions.create(model="echo", prompt="x")
        assert int(error.value.response.headers["retry-after"]) in (30, 31)


def test_requests_come_back_evenly() -> None:
    now_s = 100.0
    gate = Gate(Limits(requests_per_minute=6), clock=lambda: now_s)
    a, b = Caller(b"a"), Caller(b"b")
    assert [admits(gate, a) for _ in range(7)] == [True] * 6 + [False]
    assert admits(gate, b)
    now_s += 9.9
    assert not admits(gate, a)
    now_s += 0.2
    assert [admits(gate, a) for _ in range(2)] == [True, False]
    now_s += 3600
    assert [admits(gate, a) for _ in range(7)] == [True] * 6 + [False]


def admits(gate: Gate, caller: Caller) -> bool:
    try:
        with gate.admitted(caller):
            return True
    except Refusal:
        return False


async def test_a_body_that_does_not_come() -> None:
    async with client_of(echo_app(limits=Limits(body_s=0.05))) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        head = await reader.readuntil(b"\r\n\r\n")
        writer.close()
    assert b" 408 " in head
