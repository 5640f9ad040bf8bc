"""Images as tokens: a patch vector quantiser, whose codes a decoder reads and writes beside the tokens of text.

Patches become features, and each the nearest vector of a codebook (van den Oord et al., "Neural Discrete Representation
Learning", arXiv 1711.00937). Only directions count (Yu et al., "Vector-quantized Image Modeling with Improved VQGAN",
arXiv 2110.04627). Neighbouring patches are seen together on both ways, so that no seams show.

Shapes: N images, C channels, S side of an image, P patches a side, T = P * P codes of an image, D numbers of a feature.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ecogen.errors import CheckpointError
from ecogen.models.checkpoint import save_tensors
from ecogen.storage import write_atomically

CONFIG_FILE, WEIGHTS_FILE = "image_tokenizer.json", "image_tokenizer.safetensors"

_AT_ONCE = 1024  # images; features take a hundred times the room of what they are of

_MOST_CODES, _LONGEST_SIDE = 2**16, 1024  # of a folder that somebody else wrote


class ImageTokens(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The sizes of an image tokenizer: S, side of a patch, C, vectors of the codebook, D, and channels in between."""

    image_size: int = 28
    patch_size: int = 7
    num_channels: int = 1
    codebook_size: int = 256
    code_width: int = 16
    hidden_size: int = 64

    def __post_init__(self) -> None:
        if min(getattr(self, name) for name in self.__struct_fields__) < 1 or self.image_size % self.patch_size:
            raise ValueError(f"{self}: sizes are to be positive, and image_size a multiple of patch_size")
        if self.codebook_size > _MOST_CODES or self.image_size > _LONGEST_SIDE:
            raise ValueError(f"{self}: more than {_MOST_CODES} codes, or a side longer than {_LONGEST_SIDE}")

    @property
    def side(self) -> int:
        """P."""
        return self.image_size // self.patch_size

    @property
    def num_codes(self) -> int:
        """T."""
        return self.side**2


class ImageTokenizer(nn.Module):
    """Images [N, C, S, S] in [0, 1] to codes [N, T] and back."""

    def __init__(self, config: ImageTokens) -> None:
        super().__init__()
        self.config = config
        channels, width, patch = config.num_channels, config.hidden_size, config.patch_size
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, patch, patch),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, config.code_width, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(config.code_width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(width, 16, patch, patch),
            nn.GELU(),
            nn.Conv2d(16, channels, 3, padding=1),
        )
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.code_width))

    def features(self, images: Tensor) -> Tensor:
        """Of each patch, a direction [N, P, P, D]."""
        return functional.normalize(self.encoder(images).permute(0, 2, 3, 1), dim=-1)

    def nearest(self, features: Tensor) -> Tensor:
        """The codes of features: [..., D] -> [...]."""
        return (features @ functional.normalize(self.codebook, dim=-1).T).argmax(-1)

    def vectors(self, codes: Tensor) -> Tensor:
        """The codebook's directions: [...] -> [..., D]."""
        return functional.normalize(self.codebook, dim=-1)[codes]

    def logits(self, features: Tensor) -> Tensor:
        """What the pixels are, before the sigmoid: [N, P, P, D] -> [N, C, S, S]."""
        given: Tensor = self.decoder(features.permute(0, 3, 1, 2))
        return given

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [N, C, S, S] in [0, 1] as codes [N, T]."""
        return torch.cat([self.nearest(self.features(part)).flatten(1) for part in torch.split(images, _AT_ONCE)])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [N, T] as images [N, C, S, S] in [0, 1]."""
        side = self.config.side
        parts = torch.split(codes.view(-1, side, side), _AT_ONCE)
        return torch.cat([self.logits(self.vectors(part)).sigmoid() for part in parts])


def save_image_tokenizer(tokenizer: ImageTokenizer, folder: Path) -> None:
    """Put it into a model's folder."""
    save_tensors(folder / WEIGHTS_FILE, tokenizer.state_dict(), {"format": "pt"})
    write_atomically(folder / CONFIG_FILE, msgspec.json.encode(tokenizer.config))


def load_image_tokenizer(folder: Path) -> ImageTokenizer:
    """The image tokenizer in a model's folder.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    try:
        config = msgspec.json.decode((folder / CONFIG_FILE).read_bytes(), type=ImageTokens)
        tokenizer = ImageTokenizer(config)
        tokenizer.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (OSError, ValueError, RuntimeError, msgspec.MsgspecError, safetensors.SafetensorError) as problem:
        text = " ".join(str(problem).split())
        raise CheckpointError(
            f"{folder} has no image tokenizer that can be read ({text}); give a model that `ecogen run pairs` made"
        ) from problem
    return tokenizer.eval()


def has_image_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has one."""
    return (folder / CONFIG_FILE).is_file()
