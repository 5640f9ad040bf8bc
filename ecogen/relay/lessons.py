"""What any teacher of classes gives a student: images that it made, and what it says of them.

A teacher that can draw draws them (`DrawingTeacher`); one that cannot has inputs optimised against it
(`relay.inversion`). Students do not ask which.

Shapes: N images, C channels, S side of an image, K labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ecogen.errors import DataError
from ecogen.models.pair_model import PairModel
from ecogen.relay.teacher import teach


@dataclass(frozen=True)
class ImageLesson:
    """Images [N, C, S, S] in [0, 1] and the label that each is to show [N].

    Attributes:
        probabilities: what the teacher holds each label for [N, K]; None where it says nothing but the labels.
    """

    images: Tensor
    labels: Tensor
    probabilities: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


class Teacher(Protocol):
    """Whoever can teach classes of images without showing data."""

    def lesson(self, classes: Sequence[int], number: int, generator: torch.Generator) -> ImageLesson:
        """So many images at most, of each class about as many as of the others.

        Raises:
            DataError: if it knows no such class, or no image is asked for.
        """
        ...


@dataclass(frozen=True)
class DrawingTeacher:
    """A generator, which draws each class by its caption and drops what it is not sure of.

    Args:
        captions: by label; such as "a handwritten seven" of 7.
        temperature: of the drawings' codes; students learn more from various ones.
    """

    model: PairModel
    captions: Mapping[int, str]
    temperature: float = 1.0

    def lesson(self, classes: Sequence[int], number: int, generator: torch.Generator) -> ImageLesson:
        """As `Teacher.lesson`, with labels only; fewer images, or none of a class, where the generator is not sure."""
        check_asked(classes, number, self.captions)
        labels = {self.captions[label]: label for label in classes}
        samples = teach(self.model, dict.fromkeys(labels, 0), number, generator, self.temperature).samples
        shown = torch.tensor([labels[caption] for caption in samples.captions], dtype=torch.int64)
        return ImageLesson(self.model.images.decode(samples.codes), shown)


def check_asked(classes: Sequence[int], number: int, known: Mapping[int, object] | range) -> None:
    """See that a lesson can be given.

    Raises:
        DataError: if a class is unknown, or nothing is asked for.
    """
    unknown = sorted(set(classes) - set(known))
    if unknown or not classes:
        what = f"does not know {', '.join(map(str, unknown))}" if unknown else "was asked for no class"
        raise DataError(f"the teacher {what}; ask for some of its classes {', '.join(map(str, sorted(known)))}")
    if number < 1:
        raise DataError(f"a lesson of {number} images was asked for; ask for 1 or more")
