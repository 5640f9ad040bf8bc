"""`/v1/images/generations`: pictures for a prompt, whole, as PNG files in base64."""

from __future__ import annotations

import asyncio
import base64
import time
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated

import msgspec
from msgspec import Meta

from ecogen.errors import ServingError
from ecogen.models.pair_tokens import TEMPERATURE
from ecogen.serving.generation import Finish, GenerationRequest, ServedModel, Serving
from ecogen.serving.openai.connection import Reply
from ecogen.serving.openai.limits import Limits
from ecogen.serving.openai.metrics import Metrics
from ecogen.serving.openai.parameters import Seed, parse
from ecogen.serving.openai.questions import check_choices, served_model, spread_seeds
from ecogen.serving.openai.refusals import wrong
from ecogen.serving.openai.shapes import Json, usage
from ecogen.serving.openai.text import TextModel
from ecogen.serving.sampling import Chosen, Sampling


class DrawingParameters(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is asked for. `user` changes no picture.

    Attributes:
        model: None for the backbone.
        temperature: an extension, as `top_k`, `top_p` and `seed` are: how the codes of a picture are chosen.
    """

    prompt: Annotated[str, Meta(min_length=1)]
    model: str | None = None
    n: Annotated[int, Meta(ge=1)] = 1
    size: str = "auto"
    response_format: str = "b64_json"
    temperature: Annotated[float, Meta(ge=0, le=2)] = TEMPERATURE
    top_p: Annotated[float, Meta(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    seed: Seed | None = None
    user: str = ""


class Drawing:
    """Draws what is asked for."""

    def __init__(self, serving: Serving, text: TextModel, metrics: Metrics, limits: Limits) -> None:
        self._serving, self._text, self._metrics, self._limits = serving, text, metrics, limits

    async def asked(self, body: bytes, tenant: str | None) -> tuple[GenerationRequest, ...]:
        """One request for each picture.

        Raises:
            Refusal: if a parameter cannot be used.
        """
        asked = parse(body, DrawingParameters)
        model = served_model(self._serving, asked.model, tenant)
        pictures = self._text.pictures
        if pictures is None:
            raise wrong("model", f"'{model.name}' draws no pictures; ask it for text", "unsupported_model")
        check_choices(asked.n, self._limits)
        if asked.size not in ("auto", own := f"{pictures.side}x{pictures.side}"):
            raise wrong("size", f"size: this model draws {own}, not '{asked.size}'; give that, or 'auto'")
        if asked.response_format != "b64_json":
            given = asked.response_format
            raise wrong("response_format", f"response_format: pictures are not kept for '{given}'; give 'b64_json'")
        if not asked.prompt.strip():
            raise wrong("prompt", "prompt: it is empty; say what to draw")
        sampling = Sampling(asked.temperature, asked.top_k, asked.top_p, asked.seed)
        try:
            request = picture_request(self._text, model, asked.prompt, sampling)
        except ServingError as problem:
            raise wrong("prompt", f"prompt: {problem}", "context_length_exceeded") from problem
        return spread_seeds(replace(request, tenant=tenant), asked.n)

    async def __call__(self, requests: tuple[GenerationRequest, ...], reply: Reply) -> None:
        """Send the pictures."""
        prompt = len(requests[0].prompt)
        self._metrics.tokens_in.inc(prompt)
        drawn = await self._all(requests)
        self._metrics.tokens_out.inc(sum(len(tokens) for tokens, _ in drawn))
        self._metrics.bill([finish for _, finish in drawn])
        pictures = await asyncio.to_thread(lambda: [self._shown(tokens) for tokens, _ in drawn])
        took = usage(prompt, sum(len(tokens) for tokens, _ in drawn), [finish for _, finish in drawn])
        assert self._text.pictures is not None
        side = self._text.pictures.side
        head = {"created": int(time.time()), "output_format": "png", "size": f"{side}x{side}"}
        await reply.json(head | {"data": pictures, "usage": _of_pictures(took)})

    async def _all(self, requests: tuple[GenerationRequest, ...]) -> list[tuple[list[int], Finish | None]]:
        """Each picture's tokens and what it took; one that fails fails all."""
        tasks = [asyncio.create_task(self._one(request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, request: GenerationRequest) -> tuple[list[int], Finish | None]:
        tokens, finish = list[int](), None
        async with aclosing(self._serving.generate(request)) as answer:
            async for event in answer:
                if isinstance(event, Chosen):
                    tokens.append(event.token)
                else:
                    finish = event
        return tokens, finish

    def _shown(self, tokens: list[int]) -> Json:
        assert self._text.pictures is not None
        return {"b64_json": base64.b64encode(self._text.pictures.png(tokens)).decode()}


def picture_request(text: TextModel, model: ServedModel, caption: str, sampling: Sampling) -> GenerationRequest:
    """The request for a picture that a caption describes.

    Raises:
        ServingError: if it is empty, or the model has no room for both.
    """
    assert text.pictures is not None
    if not caption.strip():
        raise ServingError("the prompt is empty; say what to draw")
    tokens = text.pictures.tokens
    prompt, room = (*text.encode_caption(caption), tokens.begin), model.max_tokens - tokens.length
    if len(prompt) > room:
        raise ServingError(f"{len(prompt)} tokens, and at most {room} are taken before a picture; shorten it")
    sampling = replace(sampling, within=tokens.within)
    return GenerationRequest(model.name, prompt, sampling, tokens.length, is_whole=True)


def _of_pictures(took: Json) -> Json:
    """Usage as OpenAI says it of pictures."""
    return {
        "input_tokens": took["prompt_tokens"],
        "input_tokens_details": {"text_tokens": took["prompt_tokens"], "image_tokens": 0},
        "output_tokens": took["completion_tokens"],
        "total_tokens": took["total_tokens"],
        "ecogen": took["ecogen"],
    }
