"""From logits to a token, one request at a time, with the settings of OpenAI's interface.

Order, as transformers has it: penalties and biases, what a grammar allows, temperature, top-k, top-p. Log-probabilities
are those of the model's own distribution, before any of these.

Shapes: V vocabulary.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ecogen.errors import ServingError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token always.
        top_k: among how many of the likeliest; 0 for all.
        top_p: among the likeliest that have this probability together (Holtzman et al. 2020).
        seed: of the draws; None for one that nobody knows. Each draw has its own generator, of the seed and the number
            of tokens before it: so whoever goes on with an answer draws what would have been drawn.
        presence_penalty: taken from the logit of each token that was given before.
        frequency_penalty: taken as often as it was given.
        num_top: of the likeliest tokens, how many are told with their log-probabilities.
        logit_bias: what is added to the logits of some tokens.
        grammar: that the answer keeps to; the sampler's factory of constraints knows its format.
        within: the only tokens that may be given: the first, and the one behind the last; None for all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    num_top: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str | None = None
    within: tuple[int, int] | None = None


class Constraint(Protocol):
    """What may follow in one answer."""

    def mask(self, logits: Tensor) -> Tensor:
        """Logits [V], minus infinity where a token may not follow."""

    def take(self, token: int) -> None:
        """A token was chosen."""


Constrain = Callable[[str], Constraint]
"""Makes a constraint of a grammar; knows the tokenizer."""


class Chosen(NamedTuple):
    """A token, its log-probability, and those of the likeliest ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses one request's tokens; remembers what it gave, for penalties.

    Args:
        constrain: for requests with a grammar.
        given: tokens of the answer that were chosen before, elsewhere.

    Raises:
        ServingError: if the request has a grammar and there is nothing that knows grammars.
    """

    def __init__(self, sampling: Sampling, constrain: Constrain | None = None, given: Sequence[int] = ()) -> None:
        self._sampling = sampling
        self._constraint = _constraint(sampling, constrain)
        self._biased = torch.tensor([token for token, _ in sampling.logit_bias], dtype=torch.long)
        self._biases = torch.tensor([bias for _, bias in sampling.logit_bias], dtype=torch.float)
        self._given = Counter(given)
        if self._constraint:
            for token in given:
                self._constraint.take(token)
        self._warp = _warpers(sampling)
        self._seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._generator = torch.Generator()

    def __call__(self, logits: Tensor) -> Chosen:
        """The next token, of logits [V]."""
        logits = logits.detach().float().cpu()
        token = self._choose(self._allowed(self._biased_by_request(self._penalised(logits))))
        self._given[token] += 1
        if self._constraint:
            self._constraint.take(token)
        return self._told(token, logits)

    def _choose(self, logits: Tensor) -> int:
        if not self._sampling.temperature:
            return int(logits.argmax())
        self._generator.manual_seed(_mixed(self._seed, self._given.total()))
        probabilities = self._warp(torch.empty(1, 0, dtype=torch.long), logits[None]).softmax(-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def _penalised(self, logits: Tensor) -> Tensor:
        presence, frequency = self._sampling.presence_penalty, self._sampling.frequency_penalty
        if not (presence or frequency) or not self._given:
            return logits
        tokens = torch.tensor(list(self._given))
        counts = torch.tensor(list(self._given.values()), dtype=logits.dtype)
        return logits.index_add(0, tokens, -(presence + frequency * counts))

    def _biased_by_request(self, logits: Tensor) -> Tensor:
        return logits.index_add(0, self._biased, self._biases) if len(self._biased) else logits

    def _allowed(self, logits: Tensor) -> Tensor:
        if within := self._sampling.within:
            logits = _only(logits, *within)
        return self._constraint.mask(logits) if self._constraint else logits

    def _told(self, token: int, logits: Tensor) -> Chosen:
        logprobs = logits.log_softmax(-1)
        values, tokens = logprobs.topk(min(self._sampling.num_top, len(logprobs)))
        return Chosen(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))


def _only(logits: Tensor, first: int, stop: int) -> Tensor:
    """Logits [V], minus infinity outside of a range."""
    kept = torch.full_like(logits, -torch.inf)
    kept[first:stop] = logits[first:stop]
    return kept


def _constraint(sampling: Sampling, constrain: Constrain | None) -> Constraint | None:
    if sampling.grammar is None:
        return None
    if constrain is None:
        raise ServingError("answers of this model cannot be held to a grammar; ask without response_format")
    return constrain(sampling.grammar)


def _mixed(seed: int, number: int) -> int:
    """A seed for one draw: neighbouring seeds and numbers have nothing in common (SHA-256)."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "big", signed=True)


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """Those that change something."""
    warpers = LogitsProcessorList()
    if sampling.temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(max(sampling.top_p, 1e-6)))
    return warpers
