"""What `ecogen serve` serves in tests: a tiny random model with a tokenizer, and what it has to say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForCausalLM

from tests.greedy import Agree, Greedy, alone, tokens_of
from tests.models.decoders import save_decoder
from tests.serving.openai.served import byte_level, tokens, wrapped

PROMPT = "hello world"
_FIRST, _LAST = 1, 2


def save_served(folder: Path) -> Path:
    save_decoder("llama", folder, vocab_size=byte_level().get_vocab_size(), max_position_embeddings=512)
    wrapped(byte_level()).save_pretrained(folder)
    return folder


def wanted(model: Path, max_new: int) -> Greedy:
    """What transformers answers to the prompt, up to the token that ends it."""
    answer = alone(AutoModelForCausalLM.from_pretrained(model).eval(), [_FIRST, *tokens(PROMPT)], max_new)
    return answer[: [*answer.tokens, _LAST].index(_LAST) + 1]


def must_say(text: str, answer: Greedy, agree: Agree) -> None:
    """Assert that a text is an answer, all but for what comes of a near tie."""
    agree(tokens_of(text, answer, _text_of), answer)


def _text_of(ids: Sequence[int]) -> str:
    return byte_level().decode(list(ids), skip_special_tokens=True)
