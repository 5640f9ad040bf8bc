"""Generated pairs as they travel: captions once each, and the codes of images.

Shapes: N pairs, T codes of an image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import torch
from torch import Tensor

from ecogen.errors import ProtocolError

CODES, SHOWN = "codes", "shown"

_KINDS = (torch.uint8, torch.int16, torch.int32)
"""Of numbers that travel."""

_MOST_CAPTIONS, _LONGEST_CAPTION = 4096, 256

MOST = 2**31
"""Of what is counted in messages."""

Number = Annotated[int, msgspec.Meta(ge=0, le=MOST)]


class Captions(msgspec.Struct, frozen=True):
    """The body of a message with samples. Tensors: `CODES` [N, T], and `SHOWN` [N], each one's place in `captions`.

    Attributes:
        evidence: how many real examples stand behind each caption; 0 where there is only what others drew.
    """

    captions: Annotated[tuple[str, ...], msgspec.Meta(max_length=_MOST_CAPTIONS)]
    evidence: Annotated[tuple[Number, ...], msgspec.Meta(max_length=_MOST_CAPTIONS)]


@dataclass(frozen=True)
class Samples:
    """Images in codes [N, T] and their captions [N], as a generator drew them.

    Attributes:
        evidence: how many real examples the generator learnt from, by caption; a selection has that of what it shows.
    """

    codes: Tensor
    captions: Sequence[str]
    evidence: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, indices: Sequence[int]) -> Samples:
        captions = [self.captions[index] for index in indices]
        return Samples(self.codes[list(indices)], captions, _shown(self.evidence, captions))

    def split(self, count: int) -> tuple[Samples, Samples]:
        """The first so many, and the others."""
        return self[range(count)], self[range(count, len(self))]

    @property
    def nbytes(self) -> int:
        """Of its tensors as they travel."""
        return sum(tensor.nbytes for tensor in self.packed()[1].values())

    def packed(self) -> tuple[Captions, dict[str, Tensor]]:
        """As a message holds them."""
        places = {caption: place for place, caption in enumerate(dict.fromkeys(self.captions))}
        shown = torch.tensor([places[caption] for caption in self.captions], dtype=torch.int64)
        body = Captions(tuple(places), tuple(self.evidence.get(caption, 0) for caption in places))
        return body, {CODES: _small(self.codes), SHOWN: _small(shown)}


def _small(numbers: Tensor) -> Tensor:
    """Numbers of 0 or more in the smallest type that holds them."""
    most = int(numbers.max()) if numbers.numel() else 0
    return numbers.to(next(kind for kind in _KINDS if most <= torch.iinfo(kind).max))


def _shown(evidence: Mapping[str, int], captions: Sequence[str]) -> dict[str, int]:
    """The evidence of captions that there are samples of, in the order that it is in."""
    shown = set(captions)
    return {caption: count for caption, count in evidence.items() if caption in shown}


def unpacked(body: Captions, tensors: Mapping[str, Tensor], num_codes: int, length: int, most: int) -> Samples:
    """The samples in a message; evidence of captions of which it holds none counts for nothing.

    Args:
        num_codes: what codes are below.
        length: T.
        most: N at most.

    Raises:
        ProtocolError: if they are no such samples.
    """
    codes, shown = _whole(tensors, CODES, 2), _whole(tensors, SHOWN, 1)
    if codes.shape != (len(shown), length):
        raise ProtocolError(f"samples are to be codes [{len(shown)}, {length}], not {[*codes.shape]}")
    if len(codes) > most:
        raise ProtocolError(f"{len(codes)} samples; {most} at most were asked for")
    if len(body.captions) != len(body.evidence) or max(map(len, body.captions), default=0) > _LONGEST_CAPTION:
        raise ProtocolError(f"captions are to be of {_LONGEST_CAPTION} characters at most, each with its evidence")
    codes, places = codes.long(), shown.tolist()
    if not all(0 <= place < len(body.captions) for place in places) or ((codes < 0) | (codes >= num_codes)).any():
        raise ProtocolError(f"samples name captions that are not there, or codes that are not in 0..{num_codes - 1}")
    captions = [body.captions[place] for place in places]
    return Samples(codes, captions, _shown(dict(zip(body.captions, body.evidence, strict=True)), captions))


def _whole(tensors: Mapping[str, Tensor], name: str, ndim: int) -> Tensor:
    """The whole numbers of that name."""
    found = tensors.get(name)
    if found is None or found.ndim != ndim or found.dtype not in _KINDS:
        what = "nothing" if found is None else f"{found.dtype} {[*found.shape]}"
        raise ProtocolError(f"{name!r} of samples are to be whole numbers with ndim {ndim}, not {what}")
    return found


def joined(parts: Sequence[Samples]) -> Samples:
    """All of several; evidence is summed up, to `MOST` at most."""
    evidence: Counter[str] = Counter()
    for part in parts:
        evidence.update(part.evidence)
    captions = [caption for part in parts for caption in part.captions]
    summed = {caption: min(count, MOST) for caption, count in evidence.items()}
    return Samples(torch.cat([part.codes for part in parts]), captions, summed)


def balanced(samples: Samples, number: int, generator: torch.Generator) -> Samples:
    """So many of them or fewer, of each caption as many as of the others as far as there are."""
    places: dict[str, list[int]] = {}
    for place in torch.randperm(len(samples), generator=generator).tolist():
        places.setdefault(samples.captions[place], []).append(place)
    chosen: list[int] = []
    left = number
    for rank, own in enumerate(sorted(places.values(), key=len)):
        share = min(len(own), left // (len(places) - rank))
        chosen += own[:share]
        left -= share
    return samples[sorted(chosen)]
