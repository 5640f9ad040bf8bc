"""What stands before and behind a text-image generator: its tokenizer, and its image tokenizer's encoder and decoder.

They are small, and may be with the generator or where pictures come from and are looked at; the code is the same. What
crosses the link between them and the generator is tokens; between them and people, pictures and text.

Shapes: T codes of an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ecogen.models.folder import read_text_files
from ecogen.models.image_tokenizer import ImageTokenizer, load_image_tokenizer
from ecogen.models.pair_tokens import PairTokens, caption_of, pair_tokens, prompts_of
from ecogen.models.pictures import png_of, read_picture
from ecogen.models.tokenizer import load_tokenizer

_DECIDING = ("tokenizer.json", "chat_template.jinja", "image_tokenizer.json", "image_tokenizer.safetensors")
"""The files that decide which tokens text and pictures become; a folder may have others beside them."""


@dataclass(frozen=True)
class PictureModules:
    """The modules of one generator.

    Attributes:
        digest: of their files: the same where the same text and pictures become the same tokens.
        nbytes: of their files, as they cross a link once.
    """

    tokenizer: PreTrainedTokenizerBase
    images: ImageTokenizer
    tokens: PairTokens
    digest: str
    nbytes: int

    def prompt_of(self, caption: str) -> list[int]:
        """The tokens of a caption."""
        return prompts_of(self.tokenizer, [caption])[0]

    def caption_of(self, tokens: Sequence[int]) -> str:
        """The caption that tokens are."""
        return caption_of(self.tokenizer, tokens)

    def codes_of(self, picture: bytes) -> list[int]:
        """The codes [T] of a picture in a file of any format and size.

        Raises:
            DataError: if it cannot be read, or is too large.
        """
        sizes = self.images.config
        image = read_picture(picture, sizes.num_channels, sizes.image_size)
        codes: list[int] = self.images.encode(image[None])[0].tolist()
        return codes

    def picture_of(self, codes: Sequence[int]) -> bytes:
        """The picture that codes [T] are, as a PNG file."""
        return png_of(self.images.decode(torch.tensor([codes]))[0])


def load_modules(folder: Path) -> PictureModules:
    """Those in a model's folder; its weights are not read, and need not be there.

    Raises:
        CheckpointError: if they are not there, or do not go together.
    """
    tokenizer, images, files = load_tokenizer(folder), load_image_tokenizer(folder), read_text_files(folder)
    return PictureModules(
        tokenizer,
        images,
        pair_tokens(tokenizer, images.config),
        digest_of_modules(files),
        sum(map(len, files.values())),
    )


def digest_of_modules(files: Mapping[str, bytes]) -> str:
    """A fingerprint of what turns text and pictures into tokens, of a model's small files by name."""
    digest = hashlib.sha256()
    for name in _DECIDING:
        if name in files:
            digest.update(f"{name} {len(files[name])} ".encode() + files[name])
    return digest.hexdigest()[:16]
