"""What a client asks, in the terms of what serves it: one request a choice, checked against limits and model."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec

from ecogen.errors import ServingError
from ecogen.serving.generation import GenerationRequest, ServedModel, Serving, Wording
from ecogen.serving.grammar import json_grammar
from ecogen.serving.openai.limits import Limits
from ecogen.serving.openai.parameters import ChatParameters, CompletionParameters, Message, Parameters
from ecogen.serving.openai.refusals import unknown_model, wrong
from ecogen.serving.openai.text import TextModel
from ecogen.serving.sampling import Sampling

# Text longer than this is tokenised beside the event loop, which others wait for: some milliseconds at 1 MB/s.
_LONG_TEXT = 4096

# Longer questions are answered for themselves always.
_LONGEST_WORDING = 400

_SEEDS = 2**64


@dataclass(frozen=True)
class Question:
    """What a client asks.

    Attributes:
        requests: one a choice, all of one prompt after the other.
        num_prompt_tokens: of all prompts, each counted once however many choices it has.
        openings: what each choice's text begins with before the answer.
        tells_logprobs: whether the answer holds log-probabilities.
    """

    model: str
    requests: tuple[GenerationRequest, ...]
    num_prompt_tokens: int
    stops: tuple[str, ...]
    openings: tuple[str, ...]
    tells_logprobs: bool
    streams: bool
    tells_usage: bool


R = TypeVar("R")


class Asking:
    """Makes questions of parameters."""

    def __init__(self, serving: Serving, text: TextModel, limits: Limits) -> None:
        self._serving, self._text, self._limits = serving, text, limits

    async def completion(self, asked: CompletionParameters, tenant: str | None) -> Question:
        """The question behind `/v1/completions`.

        Raises:
            Refusal: if a parameter cannot be used.
        """
        if asked.best_of not in (None, asked.n):
            raise wrong("best_of", f"'best_of' must equal 'n', which is {asked.n}; nothing is ranked here")
        if asked.echo and asked.logprobs is not None:
            raise wrong("echo", "'echo' with 'logprobs' is not supported: a prompt's log-probabilities are not kept")
        model = served_model(self._serving, asked.model, tenant)
        _check_room("max_tokens", asked.max_tokens, model)
        texts = self._prompts(asked)
        prompts = [await self._prompt_tokens(prompt) for prompt in texts]
        echoes = [self._text.decode(prompt) if asked.echo else "" for prompt in prompts]
        sampling = await self._sampling(asked, asked.logprobs or 0)
        requests = [self._request(model, tenant, prompt, sampling, asked.max_tokens, "prompt") for prompt in prompts]
        if asked.semantic_cache and asked.logprobs is None:
            requests = [replace(one, wording=_wording(text)) for one, text in zip(requests, texts, strict=True)]
        return self._question(asked, requests, echoes, tells_logprobs=asked.logprobs is not None)

    async def chat(self, asked: ChatParameters, tenant: str | None) -> Question:
        """The question behind `/v1/chat/completions`.

        Raises:
            Refusal: if a parameter cannot be used.
        """
        if asked.top_logprobs and not asked.logprobs:
            raise wrong("top_logprobs", "'top_logprobs' needs 'logprobs': true")
        model = served_model(self._serving, asked.model, tenant)
        _check_room("max_completion_tokens", asked.max_completion_tokens, model)
        _check_room("max_tokens", asked.max_tokens, model)
        messages = [_plain(message, index) for index, message in enumerate(asked.messages)]
        urls = self._pictures(asked.messages)
        try:
            num_chars = sum(map(len, [*_contents(messages), *urls]))
            prompt = await self._aside(num_chars, lambda: self._chat(messages, urls))
        except ServingError as problem:
            raise wrong("messages", str(problem)) from problem
        sampling = await self._sampling(asked, asked.top_logprobs, default=0.0 if urls else 1.0)
        max_new = asked.max_completion_tokens or asked.max_tokens
        request = self._request(model, tenant, prompt, sampling, max_new, "messages")
        if asked.semantic_cache and not asked.logprobs and not urls:
            *before, last = messages
            context = [*before, {**last, "content": ""}]
            wording = await self._aside(num_chars, lambda: _wording(last["content"], context))
            request = replace(request, wording=wording)
        return self._question(asked, [request], [""], tells_logprobs=asked.logprobs)

    def _pictures(self, messages: Sequence[Message]) -> list[str]:
        """The URLs of all pictures, in order."""
        urls = [url for message in messages for url in _urls_of(message.content)]
        if urls and self._text.pictures is None:
            raise wrong("messages", "messages: this model sees no pictures; send text only")
        if len(urls) > self._limits.pictures:
            raise wrong("messages", f"messages: {len(urls)} pictures, at most {self._limits.pictures} are taken")
        return urls

    def _chat(self, messages: Sequence[Mapping[str, Any]], urls: Sequence[str]) -> tuple[int, ...]:
        pictures = [] if self._text.pictures is None else list(map(self._text.pictures.read, urls))
        return self._text.encode_chat(messages, pictures)

    def _prompts(self, asked: CompletionParameters) -> Sequence[str | list[int]]:
        """Several as they are, one in a list."""
        prompts: list[Any] = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        kinds = {type(prompt) for prompt in prompts}
        if kinds == {int}:
            prompts, kinds = [prompts], {list}
        if len(kinds) != 1:
            raise wrong("prompt", "prompt: give text, a list of texts, a list of tokens, or a list of such lists")
        if len(prompts) > self._limits.prompts:
            raise wrong("prompt", f"prompt: {len(prompts)} prompts, at most {self._limits.prompts} are taken at once")
        return prompts

    async def _prompt_tokens(self, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return await self._aside(len(prompt), lambda: self._text.encode(prompt))
        known = self._text.num_tokens
        if foreign := [token for token in prompt if not 0 <= token < known]:
            raise wrong("prompt", f"prompt: there is no token {foreign[0]}; this model has 0 to {known - 1}")
        return tuple(prompt)

    async def _aside(self, num_chars: int, read: Callable[[], R]) -> R:
        return await asyncio.to_thread(read) if num_chars > _LONG_TEXT else read()

    async def _sampling(self, asked: Parameters, num_top: int, *, default: float = 1.0) -> Sampling:
        return Sampling(
            temperature=default if asked.temperature is None else asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            seed=asked.seed,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            num_top=num_top,
            logit_bias=tuple(self._bias(*bias) for bias in asked.logit_bias.items()),
            grammar=await self._grammar(asked),
        )

    def _bias(self, token: str, bias: float) -> tuple[int, float]:
        known = self._text.num_tokens
        if not (token.isascii() and token.isdigit() and int(token) < known):
            raise wrong("logit_bias", f"logit_bias: '{token}' is no token; this model has 0 to {known - 1}")
        return int(token), bias

    async def _grammar(self, asked: Parameters) -> str | None:
        form = asked.response_format
        if form is None or form.type == "text":
            return None
        if self._text.vocabulary is None or not self._text.ends:
            raise wrong("response_format", "response_format: this model's tokenizer cannot be held to a grammar")
        if (form.type == "json_schema") != (form.json_schema is not None):
            raise wrong("response_format", "response_format: 'json_schema' goes with the type of that name")
        try:
            return await asyncio.to_thread(json_grammar, form.json_schema.schema if form.json_schema else None)
        except ServingError as problem:
            raise wrong("response_format", f"response_format: {problem}") from problem

    def _request(
        self,
        model: ServedModel,
        tenant: str | None,
        prompt: tuple[int, ...],
        sampling: Sampling,
        max_new: int | None,
        param: str,
    ) -> GenerationRequest:
        """One whose prompt and answer fit the model; without a length, the answer may fill what is left."""
        longest = min(self._limits.prompt_tokens or model.max_tokens, model.max_tokens - (max_new or 1))
        if not prompt:
            raise wrong(param, f"{param}: has no tokens; give at least one")
        if len(prompt) > longest:
            raise wrong(
                param,
                f"{param}: {len(prompt)} tokens, and at most {max(0, longest)} are taken before an answer of up to "
                f"{max_new or 1} by this model of {model.max_tokens}; shorten one of them",
                "context_length_exceeded",
            )
        left = max_new or model.max_tokens - len(prompt)
        return GenerationRequest(model.name, prompt, sampling, left, self._text.ends, tenant)

    def _question(
        self, asked: Parameters, requests: Sequence[GenerationRequest], openings: Sequence[str], *, tells_logprobs: bool
    ) -> Question:
        check_choices(asked.n, self._limits)
        if asked.stream_options and not asked.stream:
            raise wrong("stream_options", "'stream_options' needs 'stream': true")
        return Question(
            model=asked.model,
            requests=tuple(one for request in requests for one in spread_seeds(request, asked.n)),
            num_prompt_tokens=sum(len(request.prompt) for request in requests),
            stops=self._stops(asked),
            openings=tuple(opening for opening in openings for _ in range(asked.n)),
            tells_logprobs=tells_logprobs,
            streams=asked.stream,
            tells_usage=bool(asked.stream_options and asked.stream_options.include_usage),
        )

    def _stops(self, asked: Parameters) -> tuple[str, ...]:
        stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop
        if len(stops) > self._limits.stops:
            raise wrong("stop", f"stop: {len(stops)} stop strings, at most {self._limits.stops} are taken")
        if not all(0 < len(stop) <= self._limits.stop_chars for stop in stops):
            raise wrong("stop", f"stop: a stop string has 1 to {self._limits.stop_chars} characters")
        return tuple(stops)


def _check_room(param: str, max_new: int | None, model: ServedModel) -> None:
    if max_new is not None and max_new >= model.max_tokens:
        raise wrong(
            param,
            f"{param}: an answer of {max_new} tokens does not fit this model, which has room for {model.max_tokens} "
            "with the prompt; ask for fewer, or leave it out to use what room there is",
            "context_length_exceeded",
        )


def served_model(serving: Serving, name: str | None, tenant: str | None) -> ServedModel:
    """The model of a name that a tenant may ask; the backbone for None.

    Raises:
        Refusal: 404, if there is none.
    """
    models = {model.name: model for model in serving.models(tenant)}
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        raise unknown_model(name, list(models))
    return models[name]


def check_choices(number: int, limits: Limits) -> None:
    """Refuse more choices than are given."""
    if number > limits.choices:
        raise wrong("n", f"n: {number} choices, at most {limits.choices} are given")


def spread_seeds(request: GenerationRequest, number: int) -> tuple[GenerationRequest, ...]:
    """So many choices of a prompt: each draws on its own; the first as if it were alone."""
    return tuple(_choice(request, index) for index in range(number))


def _choice(request: GenerationRequest, index: int) -> GenerationRequest:
    seed = request.sampling.seed
    if seed is None or not index:
        return request
    signed = (seed + index + _SEEDS // 2) % _SEEDS - _SEEDS // 2
    return replace(request, sampling=replace(request.sampling, seed=signed))


def _wording(text: str | list[int], before: Sequence[dict[str, str]] = ()) -> Wording | None:
    """How a question was put; None for tokens and for what is too long to be compared."""
    if not isinstance(text, str) or len(text) > _LONGEST_WORDING:
        return None
    return Wording(text, hashlib.sha256(msgspec.json.encode(before)).hexdigest())


def _plain(message: Message, index: int) -> dict[str, Any]:
    """A message as chat templates know it: its text parts joined, and what OpenAI now calls developer as system.

    One with pictures keeps its parts; what is in the pictures comes separately.
    """
    role = "system" if message.role == "developer" else message.role
    plain = {"role": role, "content": _content(message.content, f"messages[{index}].content")}
    return plain | ({"name": message.name} if message.name is not None else {})


def _content(content: str | list[dict[str, Any]], param: str) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    parts = [_part(part, f"{param}[{index}]") for index, part in enumerate(content)]
    if any(part["type"] == "image" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _part(part: dict[str, Any], param: str) -> dict[str, str]:
    match part:
        case {"type": "text", "text": str(text), **others} if not others:
            return {"type": "text", "text": text}
        case {"type": "image_url", "image_url": {"url": str()}, **others} if not others:
            return {"type": "image"}
    raise wrong(
        param,
        f'{param}: of type {part.get("type")!r}; only {{"type": "text", "text": ...}} and '
        '{"type": "image_url", "image_url": {"url": ...}} are read',
    )


def _urls_of(content: str | list[dict[str, Any]]) -> list[str]:
    """Of the pictures in a message that `_plain` has read."""
    parts = [] if isinstance(content, str) else content
    return [str(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]


def _contents(messages: Sequence[dict[str, Any]]) -> list[str]:
    """All texts."""
    contents = [message["content"] for message in messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    return [content for content in contents if isinstance(content, str)] + [part.get("text", "") for part in parts]
