"""What turns pictures into a model's tokens and back: its image tokenizer, and where pictures stand among tokens."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ecogen.errors import DataError, ServingError
from ecogen.models.image_tokenizer import ImageTokenizer, has_image_tokenizer, load_image_tokenizer
from ecogen.models.pair_tokens import PairTokens, pair_tokens
from ecogen.models.pictures import grid_of, png_of, read_picture

_SCHEME = "data:"


class Pictures:
    """Pictures as tokens of a model's vocabulary."""

    def __init__(self, images: ImageTokenizer, tokens: PairTokens) -> None:
        self._images, self.tokens = images, tokens

    @property
    def side(self) -> int:
        """Of the pictures that the model draws, in pixels."""
        return self._images.config.image_size

    def read(self, url: str) -> tuple[int, ...]:
        """A picture in a `data:` URL as tokens, marks included.

        Raises:
            ServingError: if it is elsewhere, or cannot be read.
        """
        head, comma, content = url.partition(",")
        if not head.startswith(_SCHEME) or not comma or not head.endswith(";base64"):
            raise ServingError("a picture comes in the request, as data:image/png;base64,...; nothing is fetched")
        try:
            image = read_picture(base64.b64decode(content, validate=True), self._images.config.num_channels, self.side)
        except binascii.Error as problem:
            raise ServingError("the picture is not in base64; send a PNG or JPEG file in base64") from problem
        except DataError as problem:
            raise ServingError(f"the picture {problem}; send a PNG or JPEG file in base64") from problem
        return tuple(self.tokens.written(self._images.encode(image[None]))[0].tolist())

    def png(self, tokens: Sequence[int]) -> bytes:
        """The picture that tokens are, marks left out, as a PNG file.

        Raises:
            ProtocolError: if they are none.
        """
        return png_of(self._image(tokens)[0])

    def sheet(self, pictures: Sequence[Sequence[int]]) -> bytes:
        """Several of them side by side, as one PNG file."""
        return png_of(grid_of(torch.cat([self._image(tokens) for tokens in pictures])))

    def _image(self, tokens: Sequence[int]) -> Tensor:
        """[1, C, S, S]."""
        return self._images.decode(self.tokens.read(tokens))

    def filled_in(self, tokens: Sequence[int], pictures: Sequence[Sequence[int]]) -> Iterator[int]:
        """A chat's tokens, with its pictures where its template has a mark for each.

        Raises:
            ServingError: if the template has not as many marks.
        """
        places = tokens.count(self.tokens.begin)
        if places != len(pictures):
            raise ServingError(f"the model's chat template has places for {places} of {len(pictures)} pictures")
        left = iter(pictures)
        for token in tokens:
            yield from next(left) if token == self.tokens.begin else (token,)


def load_pictures(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Pictures | None:
    """Of the model in a folder; None for one without pictures.

    Raises:
        CheckpointError: if its tokenizers do not go together.
    """
    if not has_image_tokenizer(folder):
        return None
    images = load_image_tokenizer(folder)
    return Pictures(images, pair_tokens(tokenizer, images.config))
