"""Tokens to text as they come, never half a character: what is joined equals the decoding of all tokens at once."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

# How many tokens of the prompt the answer's first is decoded behind, so that it keeps its leading blank.
_CONTEXT = 5
_LONGEST_CHARACTER = 4  # bytes, in UTF-8

_CUT = "\ufffd"


class TextStream:
    """One answer's text. Special tokens have none.

    Args:
        prompt: what the answer goes on with.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._shown = self._context(prompt)  # behind which those that wait are decoded
        self._waiting: list[int] = []
        self._stream = DecodeStream(self._shown, skip_special_tokens=True)

    def take(self, token: int) -> str:
        """The text that is complete with this token; empty while a character is not."""
        self._waiting.append(token)
        text = self._step(token)
        if text:
            self._shown, self._waiting = self._waiting, []
        return text

    def rest(self) -> str:
        """What is left in the end: bytes that never became a character, as replacement characters."""
        if not self._waiting:
            return ""
        before = self._decode(self._shown)
        whole = self._decode([*self._shown, *self._waiting])
        return whole[len(before) :] if whole.startswith(before) else self._decode(self._waiting)

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """A prompt's last tokens, from where a character begins."""
        contexts = [list(prompt[-size:]) for size in range(_CONTEXT, _CONTEXT + _LONGEST_CHARACTER)]
        return next((context for context in contexts if not self._decode(context).startswith(_CUT)), contexts[0])

    def _step(self, token: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception:
            # The library gives up (with a bare Exception) where bytes spoil characters that were already complete, as a
            # tokenizer with byte fallback decodes them; what has been shown stays, and a new stream goes on.
            self._stream = DecodeStream(self._waiting, skip_special_tokens=True)
            return self._decode(self._waiting)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
