"""Documents as passages of tokens, each with what is to be learnt of it.

Texts are put one behind the other and cut into passages of one length. Of a prompt with its completion, and of a
conversation, each is a passage of its own, and only the completion or the assistant's answers are learnt.

Shapes: N passages, T tokens of a passage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ecogen.errors import DataError
from ecogen.tuning.documents import Document, Message
from ecogen.tuning.passages import IGNORED, Passages

_FEWEST = 2  # tokens of a passage: one that follows another


class Encoded(NamedTuple):
    """Tokens, and which of them are to be learnt."""

    tokens: list[int]
    is_learnt: list[bool]


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int) -> Passages:
    """Passages [N, T] of at most `length` tokens, padded to that; those of which nothing is to be learnt are left out.

    Raises:
        DataError: if a conversation cannot be written as the tokenizer's chat template has it.
    """
    texts = [document for document in documents if not document.is_instruction]
    pieces = [*_cut(stream_of(texts, tokenizer), length)]
    pieces += [_instruction(document, tokenizer) for document in documents if document.is_instruction]
    rows = [_padded(piece, length) for piece in pieces]
    kept = [row for row in rows if any(label != IGNORED for label in row[1])]
    tokens, labels = (torch.tensor([row[i] for row in kept], dtype=torch.int64).view(-1, length) for i in (0, 1))
    return Passages(tokens, labels)


def completed(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """A prompt and what is to be learnt to follow it, up to the mark of the end."""
    asked, answer = _lead(tokenizer) + _tokens(prompt, tokenizer), _tokens(completion, tokenizer) + _end(tokenizer)
    return Encoded(asked + answer, [False] * len(asked) + [True] * len(answer))


def conversation(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """A conversation as the chat template writes it, of which the assistant's answers are to be learnt.

    An answer is what the template adds for it to what it would have a model begin with, its end mark included.

    Raises:
        DataError: if there is no template, or it writes an answer in another way once the conversation goes on.
    """
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; give 'prompt' and 'completion' instead of 'messages'")
    whole = _written(messages, tokenizer)
    spans = []
    for index in (index for index, message in enumerate(messages) if message.role == "assistant"):
        begun = _written(messages[:index], tokenizer, is_begun=True) if index else ""
        done = _written(messages[: index + 1], tokenizer)
        if not (whole.startswith(done) and done.startswith(begun)):
            raise DataError(
                f"the chat template writes answer {index} in another way once more follows, so that it cannot be told "
                "which tokens are learnt; give each answer a conversation of its own"
            )
        spans.append((len(begun), len(done)))
    given = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    is_learnt = [any(start <= a < b <= stop for start, stop in spans) for a, b in given["offset_mapping"]]
    return Encoded(list(given["input_ids"]), is_learnt)


def _written(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, is_begun: bool = False) -> str:
    plain = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text: str = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=is_begun)
    except Exception as problem:  # a template may raise whatever it likes
        raise DataError(f"the chat template refuses a conversation: {problem}; mend that conversation") from problem
    return text


def _instruction(document: Document, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    if document.messages:
        return conversation(document.messages, tokenizer)
    return completed(document.prompt or "", document.text, tokenizer)


def stream_of(texts: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All texts, each between the marks of its beginning and its end."""
    lead, end = _lead(tokenizer), _end(tokenizer)
    return [token for text in texts for token in (*lead, *_tokens(text.text, tokenizer), *end)]


def _cut(stream: Sequence[int], length: int) -> Iterator[Encoded]:
    for start in range(0, len(stream), length):
        piece = list(stream[start : start + length])
        if len(piece) >= _FEWEST:
            yield Encoded(piece, [True] * len(piece))


def _padded(piece: Encoded, length: int) -> tuple[list[int], list[int]]:
    """Tokens and labels of one passage: a token's label is the token that follows it, if that is to be learnt."""
    tokens, is_learnt = piece.tokens[:length], piece.is_learnt[:length]
    following = zip(tokens[1:], is_learnt[1:], strict=True)
    labels = [token if learnt else IGNORED for token, learnt in following] + [IGNORED]
    padding = length - len(tokens)
    return tokens + [0] * padding, labels + [IGNORED] * padding


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _lead(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The mark of a beginning, where the tokenizer sets one."""
    return [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
