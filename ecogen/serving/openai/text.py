"""What turns text into a model's tokens and back: its tokenizer, its chat template, its ending tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from llguidance import LLTokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ecogen.errors import CheckpointError, ServingError
from ecogen.serving.grammar import ending_tokens, vocabulary_of
from ecogen.serving.openai.pictures import Pictures, load_pictures
from ecogen.serving.openai.pieces import TextStream

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""For models that were tuned for no chat: a transcript, one message a line, without any special token."""


class TextModel:
    """A tokenizer and what goes with it.

    Args:
        ends: tokens that end an answer, beside the tokenizer's own.
        chat_template: Jinja; the tokenizer's own by default, or else `PLAIN_TEMPLATE`.
        pictures: None for a model without.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        ends: Collection[int] = (),
        chat_template: str | None = None,
        pictures: Pictures | None = None,
    ) -> None:
        self.pictures = pictures
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        # nothing sets these later, so that threads may encode at once
        self._backend.no_padding()
        self._backend.no_truncation()
        self._template = chat_template or tokenizer.chat_template
        own = {tokenizer.eos_token_id} - {None}
        self.ends = frozenset(own.union(ends))

    @property
    def num_tokens(self) -> int:
        """In the vocabulary."""
        return len(self._tokenizer)

    def encode(self, text: str) -> tuple[int, ...]:
        """A prompt's tokens, those included that the tokenizer begins every text with."""
        return tuple(self._backend.encode(text).ids)

    def encode_caption(self, text: str) -> tuple[int, ...]:
        """The tokens of what a picture is to show; what looks like a special token stays text."""
        return (*self._beginning, *self._literal.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _literal(self) -> Tokenizer:
        """One that knows no special tokens in texts."""
        literal: Tokenizer = Tokenizer.from_str(self._backend.to_str())
        literal.encode_special_tokens = True
        return literal

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], pictures: Sequence[Sequence[int]] = ()
    ) -> tuple[int, ...]:
        """The tokens of a chat whose next message is the assistant's.

        What looks like a special token in a message stays text: nobody can end a turn from within.

        Args:
            messages: their content is text, or a list of {"type": "text", "text": ...} and {"type": "image"}.
            pictures: the tokens of each image, in order.

        Raises:
            ServingError: if the template refuses the messages.
        """
        try:
            tokens = self._encode_chat(messages)
        except (TemplateError, TypeError, ValueError, KeyError) as problem:
            raise ServingError(f"the model's chat template does not take these messages: {problem}") from problem
        return tokens if self.pictures is None else tuple(self.pictures.filled_in(tokens, pictures))

    def _encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        ids = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=self._template or PLAIN_TEMPLATE,
            add_generation_prompt=True,
            sanitize_control_tokens=True,
            return_dict=False,
        )
        return (*(() if self._template else self._beginning), *ids)

    @cached_property
    def _beginning(self) -> tuple[int, ...]:
        """What the tokenizer begins every text with; a template writes it itself, a transcript does not."""
        plain, whole = (self._backend.encode("x", add_special_tokens=special).ids for special in (False, True))
        return tuple(whole[: -len(plain)]) if whole[-len(plain) :] == plain else ()

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a prompt or an answer, without special tokens."""
        return str(self._backend.decode(list(tokens), skip_special_tokens=True))

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """For the text of an answer to this prompt."""
        return TextStream(self._backend, prompt)

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for; may be a part of a character."""
        if self.vocabulary is None:
            return str(self._backend.decode([token], skip_special_tokens=False)).encode()
        return bytes(self.vocabulary.decode_bytes([token]))

    @cached_property
    def vocabulary(self) -> LLTokenizer | None:
        """The bytes of all tokens; None for a kind of tokenizer whose tokens have none of their own."""
        try:
            return vocabulary_of(self._tokenizer, self.ends)
        except ServingError:
            return None


def load_text(folder: Path) -> TextModel:
    """The tokenizer of a folder written by `save_pretrained`; nothing is downloaded.

    Raises:
        CheckpointError: if there is none, or none that the library `tokenizers` runs, or if the folder's image
            tokenizer does not go with it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as problem:
        raise CheckpointError(f"{folder} holds no tokenizer that can be read: {problem}; save one there") from problem
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(f"{folder}: {type(tokenizer).__name__} is not run by `tokenizers`; save a tokenizer.json")
    text = TextModel(tokenizer, ends=ending_tokens(folder), pictures=load_pictures(folder, tokenizer))
    _ = text.vocabulary  # takes about a second for a large one: now, not in somebody's request
    return text
