"""How an image stands among the tokens of text: a mark, its codes in rows from the top left, a mark.

Shapes: N images, T codes of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ecogen.errors import CheckpointError, ProtocolError
from ecogen.models.image_tokenizer import ImageTokens

BEGIN, END = "<|image|>", "<|/image|>"

TEMPERATURE = 0.4
"""At which codes of images are drawn where nothing is said. Of what tuned edges draw, more is recognised than at 0.5 or
above, and the distance to real images is no greater."""


def image_marks(num_codes: int) -> Iterator[str]:
    """The tokens that a vocabulary has for images: the two marks, then one for each code, in order."""
    yield from (BEGIN, END)
    yield from (f"<|image_{code}|>" for code in range(num_codes))


@dataclass(frozen=True)
class PairTokens:
    """The numbers of a vocabulary's tokens for images.

    Attributes:
        first: of the token for code 0; those of the others follow it.
        num_codes: K, how many there are.
        length: T.
    """

    begin: int
    end: int
    first: int
    num_codes: int
    length: int

    @property
    def codes(self) -> range:
        """The tokens that are codes."""
        return range(*self.within)

    @property
    def within(self) -> tuple[int, int]:
        """The first token that is a code, and the one behind the last."""
        return self.first, self.first + self.num_codes

    def written(self, codes: Tensor) -> Tensor:
        """Images' codes [N, T] as tokens, marks included: [N, T + 2]."""
        begin, end = (torch.full((len(codes), 1), mark) for mark in (self.begin, self.end))
        return torch.cat([begin, codes + self.first, end], 1)

    def read(self, tokens: Sequence[int]) -> Tensor:
        """The codes of the one image [1, T] that tokens are, marks left out.

        Raises:
            ProtocolError: if they are not T codes.
        """
        if len(tokens) != self.length or any(token not in self.codes for token in tokens):
            wrong = sum(token not in self.codes for token in tokens)
            raise ProtocolError(f"{len(tokens)} tokens, {wrong} of them no codes, are no image of {self.length} codes")
        return torch.tensor([tokens]) - self.first


def prompts_of(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[list[int]]:
    """The tokens of captions; what looks like a special token stays text."""
    if not captions:
        return []
    given = tokenizer(list(captions), add_special_tokens=False, split_special_tokens=True)
    prompts: list[list[int]] = given["input_ids"]
    return prompts


def caption_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The caption that tokens are."""
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text.strip()


def pair_tokens(tokenizer: PreTrainedTokenizerBase, images: ImageTokens) -> PairTokens:
    """Where a tokenizer has the tokens for images.

    Raises:
        CheckpointError: if it has not those of the image tokenizer, in order.
    """
    ids = tokenizer.convert_tokens_to_ids([*image_marks(images.codebook_size)])
    begin, end, first = ids[:3]
    if None in ids or ids[2:] != [*range(first, first + images.codebook_size)] or first == tokenizer.unk_token_id:
        raise CheckpointError(
            f"the tokenizer has no {images.codebook_size} tokens for codes of images, one behind the other; "
            "give a model whose tokenizer and image tokenizer were made together"
        )
    return PairTokens(begin, end, first, images.codebook_size, images.num_codes)
