"""Teaching without a generator: images are optimised until a classifier, which cannot draw, is sure of what they show.

DeepInversion (Yin et al., "Dreaming to Distill", arXiv 1912.08795) for a vision transformer. It has no batch norms
whose statistics would tell what images look like inside of it, so its owner, who has the data, takes them once
(`statistics_of`): mean and variance of each token at each depth, class by class. Like those of a batch norm they are
aggregates of private data; they stay with the teacher, but what they shape travels. Without them this is optimisation
of the inputs by weights alone, which teaches far less (`benchmarks/relay_inversion.py`).

Not to be confused with `tuning.inversion`, attacks that reconstruct the very image behind given activations.

Shapes: N images, B of a batch, C channels, S side of an image, T tokens with CLS, D hidden, K labels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate
from transformers import ViTForImageClassification

from ecogen.errors import DataError
from ecogen.relay.lessons import ImageLesson, check_asked
from ecogen.tuning.augment import augment

_BETAS = (0.5, 0.9)
"""Adam's in the published code of DeepInversion; moments are short, since each step sees another view."""

_FLOOR = 1e-3
"""Least variance of a feature: those that real images hardly move are not to rule all others."""

_GATHERED = 256


@dataclass(frozen=True)
class Settings:
    """How images are optimised. All values but the batch size were chosen on validation digits of 28 x 28.

    What was tried there and did not help is not here: a prior for patches that are unlike each other (PSAQ-ViT, arXiv
    2203.02250), total variation and energy of coarse images, and competition with the student (at one weight).

    Attributes:
        steps: of Adam, each with a pass through the teacher and back to the pixels.
        learning_rate: the first; it falls to nothing along half a cosine.
        coarseness: how many pixels each way an optimised number stands for; coarse images leave no room for patterns
            that only this teacher sees.
        ground: log-odds of a pixel at the start, around which noise is drawn; -2 is 0.12, nearly black.
        augmentation: of the view that each step looks at, in 0..1: what holds in one view alone does not last.
        statistics: weight of the distance to the teacher's statistics, against 1 of the label's cross entropy.
        batch_size: images of one label, at most, whose statistics are compared as one.

    Raises:
        DataError: if there is nothing to do in one of these.
    """

    steps: int = 40
    learning_rate: float = 0.3
    coarseness: int = 4
    ground: float = -2.0
    augmentation: float = 1.0
    statistics: float = 5.0
    batch_size: int = 128

    def __post_init__(self) -> None:
        for name in ("steps", "coarseness", "batch_size"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} is {getattr(self, name)}; give 1 or more")


Moments = list[tuple[Tensor, Tensor]]
"""Mean and variance of each feature of each token, both [T, D], depth by depth."""

Statistics = Mapping[int, Moments]
"""Those of the real images of each label."""


class InversionTeacher:
    """A vision transformer of transformers' kind, in evaluation mode; it is not changed.

    Args:
        statistics: of the labels that it can teach; None to go by its weights alone, with all of its labels.
        pixels: what the model takes for black and for white; (-1, 1) of what `load_tuned` returns.

    Raises:
        DataError: if the model is in training mode, or statistics are another model's.
    """

    def __init__(
        self,
        model: ViTForImageClassification,
        statistics: Statistics | None = None,
        settings: Settings | None = None,
        *,
        pixels: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        _check_evaluates(model)
        _check_own(model, statistics)
        self._model, self._statistics, self._pixels = model, statistics, pixels
        self._settings = settings or Settings()

    def lesson(self, classes: Sequence[int], number: int, generator: torch.Generator) -> ImageLesson:
        """As `Teacher.lesson`, with what the teacher says of each image; exactly so many, whether it is sure or not."""
        known = range(self._model.config.num_labels) if self._statistics is None else self._statistics
        check_asked(classes, number, known)
        labels = torch.tensor(classes)[torch.arange(number) % len(classes)].sort().values
        images = torch.cat([self._optimised(batch, generator) for batch in self._batches(labels)])
        return ImageLesson(images, labels, self.probabilities(images))

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """What the teacher says of any images [N, C, S, S] in [0, 1]: [N, K]."""
        return torch.cat([self._logits(part).softmax(-1) for part in torch.split(images, _GATHERED)])

    @torch.no_grad()
    def features(self, images: Tensor) -> list[Tensor]:
        """What the embedding and each block make of images [N, C, S, S] in [0, 1]: each [N, T, D]."""
        with _watched(self._model) as seen:
            self._logits(images)
        return seen

    def _batches(self, labels: Tensor) -> list[Tensor]:
        """Sorted labels, cut into batches of one label each."""
        each = [labels[labels == label] for label in sorted(set(labels.tolist()))]
        return [part for own in each for part in torch.split(own, self._settings.batch_size)]

    def _optimised(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """An image for each of equal labels [B]."""
        settings, config = self._settings, self._model.config
        side = max(1, config.image_size // settings.coarseness)
        noise = torch.randn(len(labels), config.num_channels, side, side, generator=generator)
        log_odds = (noise + settings.ground).requires_grad_()
        optimizer = torch.optim.Adam([log_odds], lr=settings.learning_rate, betas=_BETAS)
        with _watched(self._model) as seen:
            for step in range(settings.steps):
                optimizer.param_groups[0]["lr"] = settings.learning_rate * _falling(step / settings.steps)
                seen.clear()
                view = augment(self._images(log_odds), settings.augmentation, generator)
                loss = cross_entropy(self._logits(view), labels) + self._distance(seen, int(labels[0]))
                (log_odds.grad,) = torch.autograd.grad(loss, [log_odds])  # of the images alone, not of the teacher
                optimizer.step()
        return self._images(log_odds.detach())

    def _images(self, log_odds: Tensor) -> Tensor:
        size = self._model.config.image_size
        if log_odds.shape[-1] != size:
            log_odds = interpolate(log_odds, size=(size, size), mode="bilinear")
        return log_odds.sigmoid()

    def _logits(self, images: Tensor) -> Tensor:
        black, white = self._pixels
        logits: Tensor = self._model(pixel_values=black + (white - black) * images).logits
        return logits

    def _distance(self, seen: Sequence[Tensor], label: int) -> Tensor | float:
        """How far a batch's moments are from those of its label, as a mean over depths; equation 4 of the paper."""
        if self._statistics is None:
            return 0.0
        apart = [_apart(each, *known) for each, known in zip(seen, self._statistics[label], strict=True)]
        return self._settings.statistics * torch.stack(apart).mean()


def statistics_of(
    model: ViTForImageClassification, images: Tensor, labels: Tensor, *, pixels: tuple[float, float] = (0.0, 1.0)
) -> Statistics:
    """What a teacher's owner takes of images [N, C, S, S] in [0, 1] and labels [N] that the teacher learnt from.

    Raises:
        DataError: if the model is in training mode, or a label has one image only.
    """
    _check_evaluates(model)
    counts = Counter(labels.tolist())
    if min(counts.values(), default=0) < 2:
        raise DataError(f"labels have so many images: {dict(counts)}; give some, of each label 2 or more")
    teacher = InversionTeacher(model, pixels=pixels)
    return {label: _moments(teacher, images[labels == label]) for label in sorted(counts)}


@contextmanager
def _watched(model: ViTForImageClassification) -> Iterator[list[Tensor]]:
    """What the embedding and each block give [B, T, D], while it lasts."""
    seen = list[Tensor]()
    parts = (model.vit.embeddings, *model.vit.layers)
    hooks = [part.register_forward_hook(lambda _, __, given: seen.append(given)) for part in parts]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _moments(teacher: InversionTeacher, images: Tensor) -> Moments:
    sums = list[tuple[Tensor, Tensor]]()
    for part in torch.split(images, _GATHERED):
        new = [(each.double().sum(0), each.double().square().sum(0)) for each in teacher.features(part)]
        sums = [(a + c, b + d) for (a, b), (c, d) in zip(sums, new, strict=True)] if sums else new
    means = [total / len(images) for total, _ in sums]
    variances = [squares / len(images) - mean.square() for (_, squares), mean in zip(sums, means, strict=True)]
    return [(mean.float(), variance.clamp(min=0).float()) for mean, variance in zip(means, variances, strict=True)]


def _apart(seen: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Squared distances of means, in deviations, and of logarithms of variances: neither depends on a feature's scale.

    DeepInversion takes plain distances, of features that batch norms are about to scale; a residual stream is not.
    """
    variance = variance + _FLOOR
    spread = seen.var(0, unbiased=False) + _FLOOR
    means = ((seen.mean(0) - mean).square() / variance).mean()
    return means + (spread.log() - variance.log()).square().mean()


def _falling(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _check_own(model: ViTForImageClassification, statistics: Statistics | None) -> None:
    depths, labels = len(model.vit.layers) + 1, model.config.num_labels
    for label, moments in (statistics or {}).items():
        if len(moments) != depths or not 0 <= label < labels:
            raise DataError(
                f"statistics are of label {label} at {len(moments)} depths, the teacher has labels 0..{labels - 1} and "
                f"{depths} depths; take its own with statistics_of"
            )


def _check_evaluates(model: ViTForImageClassification) -> None:
    if model.training:
        raise DataError("the teacher is in training mode, so it says one thing now and another then; call eval() first")
