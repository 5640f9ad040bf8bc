"""Text that comes token by token is the text of all tokens at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ecogen.serving.openai.pieces import TextStream
from tests.serving.openai.served import byte_fallback, byte_level

UNICODE = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("aé中😀\u200d👍🏽 \n\ufffd")), max_size=20)
TOKENIZERS = pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()], ids=["bytes", "fallback"])


def pieces(tokenizer: Tokenizer, tokens: list[int], prompt: list[int] | None = None) -> list[str]:
    stream = TextStream(tokenizer, prompt or [])
    return [*(stream.take(token) for token in tokens), stream.rest()]


@TOKENIZERS
@given(text=UNICODE)
def test_any_text_joined_is_the_whole(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens)


@TOKENIZERS
@given(text=UNICODE, cut=st.integers(0, 40))
@settings(max_examples=400, deadline=None)
def test_an_answer_goes_on_where_its_prompt_ends(tokenizer: Tokenizer, text: str, cut: int) -> None:
    """With the blank before its first word, wherever a whole character ends."""
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    prompt, answer = tokens[:cut], tokens[cut:]
    before = tokenizer.decode(prompt)
    if prompt and "\ufffd" not in before + text:
        assert before + "".join(pieces(tokenizer, answer, prompt)) == tokenizer.decode(tokens)


@given(st.lists(st.integers(0, byte_level().get_vocab_size() - 1), max_size=30))
def test_any_tokens_joined_are_the_whole(tokens: list[int]) -> None:
    """Of a random model too, whose bytes are rarely characters."""
    assert "".join(pieces(byte_level(), tokens)) == byte_level().decode(tokens)


@given(st.lists(st.integers(0, byte_fallback().get_vocab_size() - 1), max_size=30))
def test_bytes_that_spoil_what_was_shown_do_not_end_the_text(tokens: list[int]) -> None:
    """Byte fallback takes back characters; what can be shown all the same is shown, and never half a character."""
    tokenizer = byte_fallback()
    joined = "".join(pieces(tokenizer, [*tokens, *tokenizer.encode("hello").ids]))
    assert joined.endswith("hello")


@TOKENIZERS
def test_characters_are_never_cut(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("😀中é", add_special_tokens=False).ids
    assert len(tokens) > 3
    assert set(pieces(tokenizer, tokens)) <= {"", " ", "😀", "中", "é", "😀中é", "中é", "😀中", " 😀"}


def test_special_tokens_have_no_text() -> None:
    tokenizer = byte_level()
    assert "".join(pieces(tokenizer, [*tokenizer.encode("hello").ids, tokenizer.token_to_id("</s>")])) == "hello"
