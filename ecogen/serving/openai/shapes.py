"""Answers in OpenAI's two shapes, whole and in chunks, as plain dictionaries for JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol
from uuid import uuid4

from ecogen.accounting.bill import Bill
from ecogen.serving.generation import Finish
from ecogen.serving.openai.choices import Piece, Told

TokenBytes = Callable[[int], bytes]
Json = dict[str, Any]

# What OpenAI says of a token that is as good as impossible; JSON has no infinity.
_LEAST_LOGPROB = -9999.0


@dataclass
class Answer:
    """One choice, put together of its pieces."""

    index: int
    text: str = ""
    told: list[Told] = field(default_factory=list)
    reason: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.told += piece.told
        self.reason = piece.reason


class Shape(Protocol):
    """One endpoint's way to say it."""

    def opening(self, index: int) -> Json:
        """The first chunk of a choice."""

    def chunk(self, piece: Piece) -> Json:
        """More of a choice."""

    def whole(self, answer: Answer) -> Json:
        """All of a choice."""

    def envelope(self, choices: list[Json], *, is_chunk: bool) -> Json:
        """What choices travel in."""


class CompletionShape:
    """Of `/v1/completions`.

    Args:
        openings: what each choice's text begins with before its answer.
        token_bytes: None where log-probabilities are not told.
    """

    def __init__(self, model: str, openings: Sequence[str], token_bytes: TokenBytes | None) -> None:
        self._head = {"id": f"cmpl-{uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        self._model, self._openings, self._token_bytes = model, openings, token_bytes

    def opening(self, index: int) -> Json:
        return self._choice(index, self._openings[index], (), None)

    def chunk(self, piece: Piece) -> Json:
        return self._choice(piece.index, piece.text, piece.told, piece.reason)

    def whole(self, answer: Answer) -> Json:
        return self._choice(answer.index, self._openings[answer.index] + answer.text, answer.told, answer.reason)

    def envelope(self, choices: list[Json], *, is_chunk: bool) -> Json:
        return self._head | {"model": self._model, "choices": choices}

    def _choice(self, index: int, text: str, told: Sequence[Told], reason: str | None) -> Json:
        logprobs = self._logprobs(told, self._token_bytes) if self._token_bytes else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, told: Sequence[Told], token_bytes: TokenBytes) -> Json:
        tops = [_top_by_text(each, token_bytes) for each in told]
        return {
            "tokens": [_text(token_bytes(each.chosen.token)) for each in told],
            "token_logprobs": [_logprob(each.chosen.logprob) for each in told],
            "top_logprobs": tops if any(each.chosen.top for each in told) else None,
            "text_offset": [each.offset for each in told],
        }


class ChatShape:
    """Of `/v1/chat/completions`.

    Args:
        token_bytes: None where log-probabilities are not told.
    """

    def __init__(self, model: str, token_bytes: TokenBytes | None) -> None:
        self._head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": model}
        self._token_bytes = token_bytes

    def opening(self, index: int) -> Json:
        return self._choice(index, {"delta": {"role": "assistant", "content": ""}}, (), None)

    def chunk(self, piece: Piece) -> Json:
        delta = {"content": piece.text} if piece.text or not piece.reason else {}
        return self._choice(piece.index, {"delta": delta}, piece.told, piece.reason)

    def whole(self, answer: Answer) -> Json:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return self._choice(answer.index, {"message": message}, answer.told, answer.reason)

    def envelope(self, choices: list[Json], *, is_chunk: bool) -> Json:
        return self._head | {"object": "chat.completion.chunk" if is_chunk else "chat.completion", "choices": choices}

    def _choice(self, index: int, said: Json, told: Sequence[Told], reason: str | None) -> Json:
        logprobs = {"content": [self._logprob(each) for each in told]} if self._token_bytes else None
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def _logprob(self, told: Told) -> Json:
        chosen = told.chosen
        return self._token(chosen.token, chosen.logprob) | {"top_logprobs": [self._token(*top) for top in chosen.top]}

    def _token(self, token: int, logprob: float) -> Json:
        assert self._token_bytes is not None
        content = self._token_bytes(token)
        return {"token": _text(content), "logprob": _logprob(logprob), "bytes": list(content)}


def _top_by_text(told: Told, token_bytes: TokenBytes) -> dict[str, float]:
    """The likeliest tokens and the chosen one; several may look alike, then the likeliest is told."""
    by_text: dict[str, float] = {}
    for token, logprob in (*told.chosen.top, (told.chosen.token, told.chosen.logprob)):
        by_text.setdefault(_text(token_bytes(token)), _logprob(logprob))
    return by_text


def _text(content: bytes) -> str:
    """A token's bytes as text; where they are a part of a character, as OpenAI writes them."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _logprob(value: float) -> float:
    return max(value, _LEAST_LOGPROB)


def usage(num_prompt: int, num_answer: int, finishes: Sequence[Finish | None]) -> Json:
    """Tokens, and under `ecogen` what they took; null where that is not known of every choice."""
    known = [finish for finish in finishes if finish is not None]
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
        "prompt_tokens_details": {"cached_tokens": min(num_prompt, sum(finish.num_reused for finish in known))},
        "ecogen": _took(known) if known and len(known) == len(finishes) else None,
    }


def _took(finishes: Sequence[Finish]) -> Json:
    """Energy and emissions of all choices together; of the times, which overlap, the longest."""
    bill = sum((finish.bill for finish in finishes), Bill.zero())
    return {
        "energy_j": bill.energy_j.mid,
        "energy_low_j": bill.energy_j.low,
        "energy_high_j": bill.energy_j.high,
        "emissions_g": bill.emissions_g.mid,
        "t_ul_s": max(finish.t_ul_s for finish in finishes),
        "t_inference_s": max(finish.t_inference_s for finish in finishes),
        "t_dl_s": max(finish.t_dl_s for finish in finishes),
        "where": list(dict.fromkeys(node for finish in finishes for node in finish.node_ids)),
        "semantic": [asdict(finish.taken) for finish in finishes if finish.taken],
    }
