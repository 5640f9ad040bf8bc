"""Students that learn from generated samples alone: a smaller decoder, or a vision transformer that names what it sees.

They are whole models of their own, made anew: of the teacher they get nothing but what it drew.

Shapes: N samples, C channels, S side of an image, K labels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from transformers import LlamaConfig, PreTrainedModel, ViTConfig, ViTForImageClassification

from ecogen.config import Pretraining
from ecogen.errors import DataError
from ecogen.tuning.augment import augment
from ecogen.tuning.passages import Passages
from ecogen.tuning.pretrain import schedule
from ecogen.tuning.pretrain_decoder import pretrain_decoder

TEMPERATURE = 2.0
"""At which students learn from a teacher's probabilities; on validation digits 1, 2 and 4 did alike."""

_GATHERED = 256

OnStep = Callable[[str, int, int, float], None]


def teach_decoder(config: LlamaConfig, samples: Passages, spec: Pretraining, on_step: OnStep) -> PreTrainedModel:
    """A decoder that has learnt from samples, each drawn as often as the others."""

    def drawn(count: int, generator: torch.Generator) -> Passages:
        return samples[torch.randint(len(samples), (count,), generator=generator)]

    return pretrain_decoder(
        config,
        drawn,
        seed=spec.seed,
        on_step=on_step,
        steps=spec.steps,
        batch_size=spec.batch_size,
        matrix_rate=spec.matrix_rate,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
    )


def teach_classifier(
    config: ViTConfig,
    images: Tensor,
    labels: Tensor,
    spec: Pretraining,
    on_step: OnStep,
    *,
    probabilities: Tensor | None = None,
) -> ViTForImageClassification:
    """A vision transformer that has learnt from images [N, C, S, S] in [0, 1] and their labels [N].

    Args:
        probabilities: what a teacher says of each image [N, K]; then that is learnt, and not the labels.

    Raises:
        DataError: if there are no images, or not as many labels, or a label or probabilities are not of K.
    """
    _check_lesson(config, images, labels, probabilities)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        student = ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(spec.seed)
    optimizer = AdamW(student.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay, betas=(0.9, 0.95))
    for step in range(spec.steps):
        optimizer.param_groups[0]["lr"] = spec.learning_rate * schedule((step + 1) / spec.steps)
        chosen = torch.randint(len(images), (spec.batch_size,), generator=generator)
        views = augment(images[chosen], 1.0, generator)
        logits = student(pixel_values=views).logits
        if probabilities is None:
            loss = cross_entropy(logits, labels[chosen], label_smoothing=0.05)
        else:
            loss = distillation_loss(logits, probabilities[chosen], TEMPERATURE)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        on_step("classifier", step + 1, spec.steps, loss.item())
    return student.eval()


def distillation_loss(logits: Tensor, probabilities: Tensor, temperature: float) -> Tensor:
    """Cross entropy of a student's logits [B, K] with a teacher's probabilities [B, K], both softened.

    Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2: both at a temperature,
    and the loss times its square, so that gradients are of one size at any. A teacher's probabilities tell its logits
    but for a constant, so they can be softened after the fact.
    """
    softened = (probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log() / temperature).softmax(-1)
    return cross_entropy(logits / temperature, softened) * temperature**2


def _check_lesson(config: ViTConfig, images: Tensor, labels: Tensor, probabilities: Tensor | None) -> None:
    count, known = len(images), config.num_labels
    if not count or len(labels) != count:
        raise DataError(f"a lesson has {count} images and {len(labels)} labels; give one label for each of some images")
    if labels.min() < 0 or labels.max() >= known:
        raise DataError(
            f"labels are {int(labels.min())}..{int(labels.max())}, the student knows 0..{known - 1}; set its num_labels"
        )
    if probabilities is not None and probabilities.shape != (count, known):
        raise DataError(f"probabilities are {list(probabilities.shape)}; the student learns from [{count}, {known}]")


@torch.no_grad()
def labels_of(student: ViTForImageClassification, images: Tensor) -> Tensor:
    """The likeliest label of each image [N]."""
    parts = [student(pixel_values=part).logits.argmax(-1) for part in torch.split(images, _GATHERED)]
    return torch.cat(parts)
