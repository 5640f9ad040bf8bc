"""What cannot be answered is said in OpenAI's shape, with the parameter and the next step."""

from __future__ import annotations

import itertools
from typing import Any

import httpx2
import openai
import pytest
from openai import APIStatusError, AsyncOpenAI

from ecogen.errors import (
    CheckpointError,
    NodeLostError,
    OverloadedError,
    ServingError,
    StepError,
    UnavailableError,
    UnknownModelError,
)
from ecogen.serving.openai.limits import Limits
from tests.serving.openai.served import ScriptedServing, client_of, echo_app, scripted_app, tokens

LIMITS = Limits(choices=3, prompts=2, prompt_tokens=30, stop_chars=8, body_bytes=4000)


async def refused(client: AsyncOpenAI, path: str, body: dict[str, Any], kind: type[APIStatusError]) -> APIStatusError:
    """The client's exception, of a body that it would not send by itself."""
    with pytest.raises(kind) as problem:
        await client.post(path, body=body, cast_to=object)
    error = problem.value
    assert isinstance(error.body, dict)
    assert error.body.keys() == {"message", "type", "param", "code"}
    return error


COMPLETIONS = [
    ({"temprature": 1}, "temprature", "Unknown parameter: 'temprature'; did you mean 'temperature'?"),
    ({"max_completion_tokens": 1}, "max_completion_tokens", "did you mean 'max_tokens'?"),
    ({"messages": []}, "messages", "Unknown parameter: 'messages'; there are best_of, echo"),
    ({"suffix": "x"}, "suffix", "'suffix' is not supported here; leave it out"),
    ({"best_of": 2}, "best_of", "'best_of' must equal 'n', which is 1"),
    ({"echo": True, "logprobs": 1}, "echo", "'echo' with 'logprobs' is not supported"),
    ({"n": 4}, "n", "n: 4 choices, at most 3"),
    ({"n": 0}, "n", "n: Expected 'int' >= 1"),
    ({"temperature": 2.5}, "temperature", "temperature: Expected 'float' <= 2"),
    ({"temperature": "hot"}, "temperature", "temperature: Expected 'float | null', got 'str'"),
    ({"top_p": -0.1}, "top_p", ">= 0"),
    ({"top_k": -1}, "top_k", ">= 0"),
    ({"max_tokens": 0}, "max_tokens", ">= 1"),
    ({"max_tokens": True}, "max_tokens", "got 'bool'"),
    ({"seed": 2**63}, "seed", "<= 9223372036854775807"),
    ({"presence_penalty": 3}, "presence_penalty", "<= 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", ">= -2"),
    ({"logprobs": 6}, "logprobs", "<= 5"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "'x' is no token"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "'99999' is no token"),
    ({"logit_bias": {"5": 101}}, "logit_bias[...]", "<= 100"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "5 stop strings, at most 4"),
    ({"stop": ""}, "stop", "1 to 8 characters"),
    ({"stop": "123456789"}, "stop", "1 to 8 characters"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs 'stream': true"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown field 'usage'"),
    ({"prompt": None}, "prompt", "missing required field 'prompt'"),
    ({"prompt": []}, "prompt", "give text"),
    ({"prompt": ["a", 1]}, "prompt", "give text"),
    ({"prompt": ["a", "b", "c"]}, "prompt", "3 prompts, at most 2"),
    ({"prompt": [[]]}, "prompt", "has no tokens"),
    ({"prompt": [5, 99999]}, "prompt", "there is no token 99999"),
    ({"prompt": [5] * 31}, "prompt", "31 tokens, and at most 30"),
    ({"prompt": [5] * 20, "max_tokens": 60}, "prompt", "at most 4 are taken before an answer of up to 60"),
    ({"max_tokens": 100000}, "max_tokens", "an answer of 100000 tokens does not fit this model, which has room for 64"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "Invalid enum value 'xml'"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "'json_schema' goes with the type"),
]


async def test_wrong_completions() -> None:
    good = {"model": "model", "prompt": [5]}
    async with client_of(scripted_app(ScriptedServing([5]), limits=LIMITS)) as client:
        for change, param, message in COMPLETIONS:
            error = await refused(client, "/completions", good | change, openai.BadRequestError)
            assert (error.param, error.type) == (param, "invalid_request_error"), change
            assert message in error.message, change
        assert await client.post("/completions", body=good, cast_to=object)


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


CHATS = [
    ({"messages": []}, "messages", "length >= 1"),
    ({"messages": ["hello"]}, "messages[0]", "got 'str'"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "Invalid enum value 'robot'"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "Invalid enum value 'tool'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing required field 'content'"),
    ({"messages": [{"role": "user", "content": "", "colour": 1}]}, "messages[0].colour", "unknown field 'colour'"),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}]},
        "messages[0].content[0]",
        "of type 'input_audio'",
    ),
    ({"messages": [{"role": "user", "content": "x" * 99}]}, "messages", "tokens, and at most 30"),
    ({"max_tokens": 64}, "max_tokens", "an answer of 64 tokens does not fit this model"),
    ({"max_completion_tokens": 64}, "max_completion_tokens", "an answer of 64 tokens does not fit this model"),
    ({"top_logprobs": 2}, "top_logprobs", "needs 'logprobs'"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "<= 20"),
    ({"logprobs": 3}, "logprobs", "Expected 'bool', got 'int'"),
    ({"tools": [{"type": "function"}]}, "tools", "'tools' is not supported here"),
    ({"tool_choice": "required"}, "tool_choice", "not supported"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
    ({"modalities": ["audio"]}, "modalities", "not supported"),
    ({"store": True}, "store", "not supported"),
    ({"service_tier": "flex"}, "service_tier", "not supported"),
    ({"prompt": "x"}, "prompt", "Unknown parameter: 'prompt'"),
    ({"response_format": json_schema({"type": "nonsense"})}, "response_format", "Invalid type: nonsense"),
    ({"response_format": json_schema({"unevaluatedItems": False})}, "response_format", "Unimplemented keys"),
]


async def test_wrong_chats() -> None:
    good = {"model": "model", "messages": [{"role": "user", "content": "x"}]}
    async with client_of(scripted_app(ScriptedServing([5]), limits=LIMITS)) as client:
        for change, param, message in CHATS:
            error = await refused(client, "/chat/completions", good | change, openai.BadRequestError)
            assert (error.param, error.type) == (param, "invalid_request_error"), change
            assert message in error.message, change


async def test_what_asks_for_nothing_is_taken() -> None:
    """Parameters that this server has not, at the values that they have by themselves."""
    nothing = {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "store": False, "metadata": {}}
    nothing |= {"modalities": ["text"], "service_tier": "auto", "verbosity": "medium", "audio": None}
    ignored = {"safety_identifier": "a", "prompt_cache_key": "b", "user": "c"}
    async with client_of(scripted_app(ScriptedServing([5]))) as client:
        await client.chat.completions.create(
            model="model", messages=[{"role": "user", "content": "x"}], extra_body=nothing | ignored
        )


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"\xff", b'"text"', b'{"a":' + b"[" * 9999, b'{"prompt": "\\ud800"}']
)
async def test_bodies_that_are_no_objects(body: bytes) -> None:
    async with client_of(echo_app()) as client, httpx2.AsyncClient() as http:
        answer = await http.post(f"{client.base_url}completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


async def test_paths_and_methods() -> None:
    async with client_of(echo_app()) as client, httpx2.AsyncClient() as http:
        for method, path, status in (
            ("GET", "nothing", 404),
            ("GET", "completions", 405),
            ("DELETE", "models", 405),
            ("POST", "../health", 405),
        ):
            answer = await http.request(method, f"{client.base_url}{path}")
            assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")
            assert "allow" in answer.headers or status == 404


async def test_unknown_models() -> None:
    async with client_of(echo_app()) as client:
        body = {"model": "ecko", "prompt": "x"}
        error = await refused(client, "/completions", body, openai.NotFoundError)
        assert (error.code, error.param) == ("model_not_found", "model")
        assert error.message.endswith("The model 'ecko' does not exist; did you mean 'echo'?")
        with pytest.raises(openai.NotFoundError, match="there are echo"):
            await client.models.retrieve("gpt")


async def test_large_bodies() -> None:
    """Told before they are here, and as they come where their size is not said."""

    async def parts() -> Any:
        for _ in range(5):
            yield b" " * 1000

    async with client_of(echo_app(limits=LIMITS)) as client, httpx2.AsyncClient() as http:
        error = await refused(client, "/completions", {"model": "echo", "prompt": "x" * 5000}, openai.APIStatusError)
        assert (error.status_code, error.code) == (413, "request_too_large")
        unsaid = await http.post(f"{client.base_url}completions", content=parts())
        assert unsaid.status_code == 413
        assert (await client.completions.create(model="echo", prompt="hello")).choices


PROBLEMS = [
    (UnknownModelError("no such adapter"), 404, "no such adapter"),
    (OverloadedError("16 requests wait; try again later"), 429, "16 requests wait"),
    (ServingError("a prompt of 99 tokens does not fit"), 400, "99 tokens"),
    (UnavailableError("none of its devices is here"), 503, "none of its devices is here"),
    (NodeLostError("end-3", "no heartbeat for 4 s"), 503, "node 'end-3' is lost"),
    (CheckpointError("/secret/folder is broken"), 500, "its log says why"),
    (StepError("a secret"), 500, "its log says why"),
    (RuntimeError("a secret"), 500, "its log says why"),
]


@pytest.mark.parametrize("n", [1, 2])
async def test_problems_before_the_first_token_have_a_status(n: int) -> None:
    async with client_of(scripted_app(serving := ScriptedServing([]))) as client:
        for (problem, status, message), streams in itertools.product(PROBLEMS, (False, True)):
            serving.say([problem])
            body = {"model": "model", "prompt": "x", "stream": streams, "n": n}
            error = await refused(client, "/completions", body, openai.APIStatusError)
            assert error.status_code == status
            assert message in error.message
            assert "secret" not in error.message
            assert ("retry-after" in error.response.headers) == (status in (429, 503))
            assert serving.running == 0


@pytest.mark.parametrize("n", [1, 2])
async def test_problems_in_mid_stream_are_an_event_that_the_client_raises(n: int) -> None:
    async with client_of(scripted_app(serving := ScriptedServing([]))) as client:
        for problem, status, message in PROBLEMS:
            serving.say([*tokens("hello"), problem])
            said: list[str] = []
            stream = await client.completions.create(model="model", prompt="x", stream=True, n=n)
            with pytest.raises(openai.APIError, match=message) as error:
                await read(stream, said)
            assert "".join(said).startswith("h")
            assert not isinstance(error.value, APIStatusError)
            types = {429: "requests", 500: "server_error", 503: "server_error"}
            assert error.value.type == types.get(status, "invalid_request_error")
            assert serving.running == 0


async def read(stream: Any, said: list[str]) -> None:
    async for chunk in stream:
        said.append(chunk.choices[0].text)


async def test_an_answer_broken_off_by_a_lost_node_may_be_asked_again() -> None:
    """Where what serves says it in its own words."""
    problem = ServingError("the answer is broken off")
    problem.__cause__ = NodeLostError("end-3", "gone")
    async with client_of(scripted_app(ScriptedServing([problem]))) as client:
        with pytest.raises(openai.InternalServerError) as error:
            await client.completions.create(model="model", prompt="x")
    assert (error.value.status_code, error.value.code) == (503, "node_lost")
