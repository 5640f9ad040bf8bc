"""The API server as an application: what answers at which path.

A question's way: key, body, limits, parameters, question, choices, pieces, and out as one answer or as events.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ecogen.errors import ServingError, TransportError
from ecogen.serving.generation import Finish, ServedModel, Serving
from ecogen.serving.openai.adapters import AdapterStore, adapter_routes
from ecogen.serving.openai.choices import Piece, Telling, choice, merged
from ecogen.serving.openai.connection import Reply, SlowReader, read_body, while_connected
from ecogen.serving.openai.drawing import Drawing
from ecogen.serving.openai.keys import Keys
from ecogen.serving.openai.limits import Gate, Limits
from ecogen.serving.openai.metrics import CLIENT_GONE, Counted, Metrics
from ecogen.serving.openai.parameters import ChatParameters, CompletionParameters, parse
from ecogen.serving.openai.questions import Asking, Question
from ecogen.serving.openai.refusals import Refusal, refusal_of, unknown_model
from ecogen.serving.openai.shapes import Answer, ChatShape, CompletionShape, Shape, usage
from ecogen.serving.openai.text import TextModel

logger = logging.getLogger(__name__)

Work = Callable[[Reply], Coroutine[Any, Any, None]]
Ask = Callable[[bytes, str | None], Awaitable[Work]]
"""Makes of a body and its tenant what answers it."""


def build_app(
    serving: Serving,
    text: TextModel,
    *,
    keys: Keys | None = None,
    limits: Limits | None = None,
    store: AdapterStore | None = None,
) -> Starlette:
    """The API server of what serves.

    Args:
        text: of all models that are served; adapters share their backbone's.
        keys: none lets everybody in.
        store: where tenants' adapters are put; None for nowhere.
    """
    keys, limits, metrics = keys or Keys(), limits or Limits(), Metrics()
    asking, gate = Asking(serving, text, limits), Gate(limits)

    async def completion(body: bytes, tenant: str | None) -> Work:
        question = await asking.completion(parse(body, CompletionParameters), tenant)
        token_bytes = text.token_bytes if question.tells_logprobs else None
        return partial(answering, question, CompletionShape(question.model, question.openings, token_bytes))

    async def chat(body: bytes, tenant: str | None) -> Work:
        question = await asking.chat(parse(body, ChatParameters), tenant)
        token_bytes = text.token_bytes if question.tells_logprobs else None
        return partial(answering, question, ChatShape(question.model, token_bytes))

    async def picture(body: bytes, tenant: str | None) -> Work:
        return partial(drawing, await drawing.asked(body, tenant))

    def endpoint(ask: Ask) -> Endpoint:
        return Endpoint(ask, keys, gate, limits)

    answering, drawing = Answering(serving, text, metrics), Drawing(serving, text, metrics, limits)
    app = Starlette(
        routes=[
            Route("/v1/completions", endpoint(completion), methods=["POST"]),
            Route("/v1/chat/completions", endpoint(chat), methods=["POST"]),
            Route("/v1/images/generations", endpoint(picture), methods=["POST"]),
            *_about(serving, keys, metrics),
            *([] if store is None else adapter_routes(store, keys, gate, limits)),
        ],
        middleware=[Middleware(Counted, metrics=metrics)],
        exception_handlers=dict.fromkeys((Refusal, HTTPException, ServingError, TransportError, Exception), _refuse)
        | {ClientDisconnect: _leave},
    )
    app.state.is_open = not len(keys)
    return app


def _about(serving: Serving, keys: Keys, metrics: Metrics) -> list[Route]:
    """What there is, how it is, and what it has done."""

    async def models(request: Request) -> Response:
        caller = keys.caller(request.headers.get("authorization"))
        return _json({"object": "list", "data": [_model(model) for model in serving.models(caller.tenant)]})

    async def model(request: Request) -> Response:
        caller = keys.caller(request.headers.get("authorization"))
        known = {model.name: model for model in serving.models(caller.tenant)}
        if (name := request.path_params["name"]) not in known:
            raise unknown_model(name, list(known))
        return _json(_model(known[name]))

    async def health(_: Request) -> Response:
        return _json({"status": "ok"})

    async def exposition(request: Request) -> Response:
        keys.caller(request.headers.get("authorization"))
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", exposition),
    ]


def _model(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.created_s),
        "owned_by": "ecogen",
        "parent": model.backbone,
        "max_model_len": model.max_tokens,
        "bytes": model.nbytes,
    }


def _json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")


async def _refuse(_: Request, problem: Exception) -> Response:
    refusal = refusal_of(problem)
    return _json(refusal.body, refusal.status, refusal.headers)


async def _leave(_: Request, __: Exception) -> Response:
    """For nobody: the client is gone."""
    return Response(status_code=CLIENT_GONE)


class Answering:
    """Answers questions."""

    def __init__(self, serving: Serving, text: TextModel, metrics: Metrics) -> None:
        self._serving, self._text, self._metrics = serving, text, metrics

    async def __call__(self, question: Question, shape: Shape, reply: Reply) -> None:
        """Send the answer, as one object or as events."""
        self._metrics.tokens_in.inc(question.num_prompt_tokens)
        answer = self._stream if question.streams else self._whole
        async with aclosing(self._pieces(question)) as pieces:
            await answer(question, shape, reply, pieces)

    def _pieces(self, question: Question) -> AsyncGenerator[Piece, None]:
        choices = []
        for index, request in enumerate(question.requests):
            telling = Telling(self._text.stream(request.prompt), question.stops)
            choices.append(choice(self._serving, request, telling, index, self._metrics.token_timer()))
        return choices[0] if len(choices) == 1 else merged(choices)

    async def _whole(self, question: Question, shape: Shape, reply: Reply, pieces: AsyncGenerator[Piece, None]) -> None:
        answers = [Answer(index) for index in range(len(question.requests))]
        lasts = []
        async for piece in pieces:
            answers[piece.index].add(piece)
            if piece.reason:
                lasts.append(piece)
        whole = shape.envelope([shape.whole(answer) for answer in answers], is_chunk=False)
        await reply.json(whole | {"usage": self._usage(question, lasts)})

    async def _stream(
        self, question: Question, shape: Shape, reply: Reply, pieces: AsyncGenerator[Piece, None]
    ) -> None:
        extra = {"usage": None} if question.tells_usage else {}
        lasts: list[Piece] = []
        async for piece in pieces:
            if not reply.has_begun:  # not before there is a token: until then, an error has a status of its own
                for index in range(len(question.requests)):
                    await reply.event(shape.envelope([shape.opening(index)], is_chunk=True) | extra)
            await reply.event(shape.envelope([shape.chunk(piece)], is_chunk=True) | extra)
            if piece.reason:
                lasts.append(piece)
        took = self._usage(question, lasts)
        if question.tells_usage:
            await reply.event(shape.envelope([], is_chunk=True) | {"usage": took})
        await reply.done()

    def _usage(self, question: Question, lasts: list[Piece]) -> dict[str, Any]:
        finishes: list[Finish | None] = [piece.finish for piece in lasts]
        self._metrics.bill(finishes)
        return usage(question.num_prompt_tokens, sum(piece.num_tokens for piece in lasts), finishes)


class Endpoint:
    """One path where questions are asked."""

    def __init__(self, ask: Ask, keys: Keys, gate: Gate, limits: Limits) -> None:
        self._ask, self._keys, self._gate, self._limits = ask, keys, gate, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, self._limits.write_s)
        try:
            await self._answer(Request(scope, receive), reply)
        except ClientDisconnect:
            return
        except asyncio.CancelledError:
            await self._break_off(reply, Refusal(503, "The server is shutting down", code="shutting_down"))
        except Exception as problem:
            await self._break_off(reply, problem)

    async def _answer(self, request: Request, reply: Reply) -> None:
        caller = self._keys.caller(request.headers.get("authorization"))
        body = await read_body(request, self._limits)
        with self._gate.admitted(caller):
            work = await self._ask(body, caller.tenant)
            await while_connected(request.scope, request.receive, work(reply))

    async def _break_off(self, reply: Reply, problem: Exception) -> None:
        """An answer that has begun ends with an event; of one that has not, the status says what is wrong."""
        if not reply.has_begun:
            raise problem
        refusal = refusal_of(problem)
        if refusal.status == 500:
            logger.error("an answer broke off", exc_info=problem)
        try:
            await reply.event(refusal.body)
            await reply.end()
        except SlowReader:
            return
