"""What a client may ask, as values: parsed in one pass, and everything that is not understood refused by its name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from ecogen.serving.openai.refusals import Refusal, nearest, wrong

_Penalty = Annotated[float, Meta(ge=-2, le=2)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """How an answer is streamed; `include_usage` adds a last chunk with what it took."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    """A schema that an answer keeps to; always strictly."""

    name: str
    schema: dict[str, Any] = {}
    description: str = ""
    strict: bool = True


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """What an answer looks like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Parameters(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take. `user`, `safety_identifier` and `prompt_cache_key` change no answer.

    Attributes:
        temperature: None is 1, or 0 where a picture is described: the likeliest description.
        top_k: an extension: among how many of the likeliest tokens; 0 for all.
        semantic_cache: another: whether the answer to a question that means the same will do, where such are kept.
    """

    model: str
    n: Annotated[int, Meta(ge=1)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] = []
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    seed: Seed | None = None
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] = {}
    response_format: ResponseFormat | None = None
    semantic_cache: bool = True
    user: str = ""
    safety_identifier: str = ""
    prompt_cache_key: str = ""


class CompletionParameters(Parameters):
    """Of `/v1/completions`."""

    prompt: str | list[str | int | list[int]]
    max_tokens: Annotated[int, Meta(ge=1)] = 16
    best_of: int | None = None
    echo: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]
    name: str | None = None


class ChatParameters(Parameters):
    """Of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0


_NOT_DONE: Mapping[str, Collection[Any]] = {
    "audio": (),
    "background": ("auto", "opaque"),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": ("auto",),
    "output_compression": (100,),
    "output_format": ("png",),
    "parallel_tool_calls": (True, False),
    "partial_images": (0,),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "quality": ("auto", "standard"),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "stream": (False,),
    "style": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Parameters that OpenAI has and this server has not, and the values that ask for nothing."""

AnyParameters = TypeVar("AnyParameters", bound=msgspec.Struct)


def parse(body: bytes, kind: type[AnyParameters]) -> AnyParameters:
    """The parameters in a request's body; null stands for a parameter's default, as in OpenAI's API.

    Raises:
        Refusal: 400, naming the parameter that is wrong.
    """
    try:
        given = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as problem:
        raise Refusal(400, f"The body is not a JSON object: {problem}", code="invalid_json") from problem
    given = _without_nulls(given)
    known = kind.__struct_fields__
    for name in given.keys() - set(known):
        _check_default(name, given.pop(name), [*known])
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as problem:
        raise _wrong_value(str(problem)) from problem


def _without_nulls(given: dict[str, Any]) -> dict[str, Any]:
    """Of the messages too: what answers carry (`refusal`, `tool_calls`, ...) comes back with the next question."""
    present = {name: value for name, value in given.items() if value is not None}
    if isinstance(messages := present.get("messages"), list):
        present["messages"] = [_without_nulls(each) if isinstance(each, dict) else each for each in messages]
    return present


def _check_default(name: str, value: Any, known: list[str]) -> None:
    if name not in _NOT_DONE:
        hint = nearest(name, known) or f"there are {', '.join(sorted(known))}"
        raise wrong(name, f"Unknown parameter: '{name}'; {hint}", "unknown_parameter")
    if value not in _NOT_DONE[name]:
        raise wrong(name, f"'{name}' is not supported here; leave it out", "unsupported_parameter")


def _wrong_value(problem: str) -> Refusal:
    """msgspec says `what - at `$.where``, and of a missing or unknown field its name."""
    what, _, where = problem.partition(" - at `$")
    param = where.rstrip("`").lstrip(".")
    if field := re.search("field `(.*)`", what):
        param = f"{param}.{field[1]}".lstrip(".")
    return wrong(param, f"{param}: {what.replace('`', chr(39))}", "invalid_value")
