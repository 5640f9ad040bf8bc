"""Answers that keep to a grammar: JSON of any kind or of a schema, by masking what may not follow.

The grammar is text in the format of llguidance, so it travels with a request to wherever tokens are chosen; there, a
vocabulary made from the same tokenizer says which tokens go on with it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ecogen.errors import ServingError
from ecogen.serving.sampling import Constrain

# A weak model goes on with blanks for ever where it may: eight are enough for a line break and two levels of indent.
_BLANKS = r"[ \n]{1,8}"


def json_grammar(schema: Mapping[str, Any] | None = None) -> str:
    """The grammar of JSON objects, or of what a JSON schema describes.

    Raises:
        ServingError: if the schema is wrong, or says what cannot be enforced.
    """
    wanted = dict(schema) if schema is not None else {"type": "object"}
    grammar = LLMatcher.grammar_from_json_schema(wanted, overrides={"whitespace_pattern": _BLANKS})
    if problem := LLMatcher.validate_grammar(grammar):
        raise ServingError(f"the JSON schema cannot be enforced: {problem.splitlines()[0]}")
    return grammar


def vocabulary_of(tokenizer: PreTrainedTokenizerFast, ends: Collection[int]) -> LLTokenizer:
    """The bytes of each token, and those that end an answer.

    Raises:
        ServingError: if the tokenizer is of a kind whose tokens have no bytes of their own.
    """
    try:
        return from_tokenizer(tokenizer, n_vocab=len(tokenizer), eos_token=sorted(ends) or None)
    except (ValueError, TypeError) as problem:
        raise ServingError(f"answers of this tokenizer cannot be held to a grammar: {problem}") from problem


def constrain_by(vocabulary: LLTokenizer) -> Constrain:
    """Makes constraints of grammars, for samplers."""
    return lambda grammar: GrammarConstraint(vocabulary, grammar)


def constrain_in(folder: Path) -> Constrain:
    """Makes constraints by the tokenizer of a folder, which is read when the first grammar comes.

    Raises, then:
        ServingError: if there is no tokenizer that knows its tokens' bytes.
    """

    @cache
    def vocabulary() -> LLTokenizer:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return vocabulary_of(tokenizer, ending_tokens(folder) | ({tokenizer.eos_token_id} - {None}))

    return lambda grammar: GrammarConstraint(vocabulary(), grammar)


def ending_tokens(folder: Path) -> set[int]:
    """Those that a model's configurations name; chat models have several."""
    ends: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        named = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        ends.update(named if isinstance(named, list) else [] if named is None else [named])
    return ends


class GrammarConstraint:
    """What may follow in one answer.

    Raises:
        ServingError: if the grammar is none.
    """

    def __init__(self, vocabulary: LLTokenizer, grammar: str) -> None:
        self._matcher = LLMatcher(vocabulary, grammar, log_level=0)
        self._check()

    def mask(self, logits: Tensor) -> Tensor:
        """Logits [V], minus infinity where a token may not follow; ending tokens may where the grammar is fulfilled."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        # models have more logits than tokenizers have tokens
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        known = min(len(bits), len(logits))
        allowed[:known] = torch.from_numpy(bits[:known]).bool()
        return logits.masked_fill(~allowed, -torch.inf)

    def take(self, token: int) -> None:
        """A token was chosen.

        Raises:
            ServingError: if it does not go on with the grammar.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ServingError(f"the answer cannot keep to its grammar: {self._matcher.get_error().splitlines()[0]}")
