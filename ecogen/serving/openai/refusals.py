"""What a client is told when it gets no answer: OpenAI's error object, with the status that goes with it."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from starlette.exceptions import HTTPException

from ecogen.errors import (
    NodeLostError,
    OverloadedError,
    ServingError,
    StepError,
    TransportError,
    UnavailableError,
    UnknownModelError,
)

RETRY_S = 1
"""After how long one may try again what was refused for lack of room."""


class Refusal(Exception):
    """An error for the client.

    Args:
        status: of HTTP.
        param: the parameter that is wrong.
        code: what a program can branch on.
        headers: that go with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = {429: "requests"}.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str, message: str, code: str | None = None) -> Refusal:
    """A parameter cannot be used."""
    return Refusal(400, message, param=param, code=code)


def too_many(message: str, retry_s: float = RETRY_S) -> Refusal:
    """There is no room now."""
    return Refusal(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(max(1, round(retry_s + 0.5)))})


def unknown_model(name: str, known: list[str]) -> Refusal:
    """A model is not there, or not for this tenant."""
    near = nearest(name, known) or f"there are {', '.join(known)}"
    return Refusal(404, f"The model '{name}' does not exist; {near}", param="model", code="model_not_found")


def nearest(name: str, known: list[str]) -> str:
    """A hint at what may have been meant; empty where nothing is near."""
    near = get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else ""


def refusal_of(problem: BaseException) -> Refusal:
    """What a client is told of a problem: all of one that it can act on, nothing of one that is ours."""
    if isinstance(problem, Refusal):
        return problem
    if isinstance(problem, HTTPException):
        return _of_http(problem)
    if isinstance(problem, UnknownModelError):
        return Refusal(404, str(problem), param="model", code="model_not_found")
    if isinstance(problem, OverloadedError):
        return too_many(str(problem))
    if isinstance(problem, (TransportError, UnavailableError)) or isinstance(problem.__cause__, NodeLostError):
        return Refusal(503, str(problem), code="node_lost", headers={"Retry-After": str(RETRY_S)})
    if isinstance(problem, ServingError) and not isinstance(problem, StepError):
        return Refusal(400, str(problem))
    return Refusal(500, "The server failed; its log says why", code="internal_error")


def _of_http(problem: HTTPException) -> Refusal:
    """What the router refuses."""
    message = {404: "There is no such path", 405: "This path does not take this method"}.get(problem.status_code)
    return Refusal(problem.status_code, message or problem.detail, headers=problem.headers)
