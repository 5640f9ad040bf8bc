"""Pre-training in the cloud: a vision transformer learns from unlabelled images in about 100 CPU seconds.

Two random views of one image should have like features, views of different images unlike ones (SimCLR, Chen et
al. 2020: https://arxiv.org/abs/2002.05709). What an image shows is never used. Two things make it cheap:
matrices learn by Muon, and in the end features are standardised, so that a new head learns in its first round.

Shapes: B images a batch, C channels, R image side, D hidden, N images. Images are in [-1, 1], as the devices' data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from transformers import ViTConfig, ViTModel

from ecogen.tuning.corpus import Corpus
from ecogen.tuning.muon import Muon

RECIPE_VERSION = 2
"""Raise it with any change that makes the same arguments give another model: caches are keyed by it."""

OnStep = Callable[[str, int, int, float], None]

_PROJECTION_SIZE = 64
_STANDARDISED_OVER = 2000  # images; 128 means and deviations need no more
_WARM_UP = 0.1  # share of the steps in which the learning rate rises


def pretrain(
    config: ViTConfig,
    corpus: Corpus,
    *,
    seed: int,
    on_step: OnStep,
    steps: int,
    batch_size: int,
    temperature: float,
    matrix_rate: float,
    learning_rate: float,
    weight_decay: float,
) -> ViTModel:
    """A foundation model, pre-trained on a corpus; the same for the same arguments and number of threads.

    Args:
        config: the architecture; any square image size and number of channels.
        on_step: called after each step with phase, step, steps and loss.
        steps: optimiser steps; the cost is proportional to `steps * batch_size`.
        batch_size: images a step, two views of each, as many as the corpus has at most.
        temperature: of the contrast; low weighs the most similar images most.
        matrix_rate: Muon's peak learning rate, for the blocks' matrices.
        learning_rate: AdamW's peak learning rate, for everything else.
        weight_decay: of both.
    """
    generator = torch.Generator().manual_seed(seed)
    model, projector = new_model(config, seed), _projector(config.hidden_size, seed)
    optimizers = _optimizers(model, projector, matrix_rate, learning_rate, weight_decay)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    for step, chosen in zip(range(steps), _batches(len(corpus), batch_size, generator), strict=False):
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * schedule((step + 1) / steps)
        loss = contrast(projector(features(model, _views(config, corpus, chosen.repeat(2), generator))), temperature)
        _descend(loss, optimizers)
        on_step("contrast", step + 1, steps, loss.item())
    return standardised(model, corpus, generator)


def untrained(config: ViTConfig, corpus: Corpus, seed: int) -> ViTModel:
    """What pre-training begins with, its features standardised as pre-training does: a fair model to compare with."""
    return standardised(new_model(config, seed), corpus, torch.Generator().manual_seed(seed))


def standardised(model: ViTModel, corpus: Corpus, generator: torch.Generator) -> ViTModel:
    """The model, ready to use: over images of the corpus its features have zero mean and unit deviation."""
    images = corpus.examples(_STANDARDISED_OVER, model.config.image_size, generator)
    standardise(model, images.expand(-1, model.config.num_channels, -1, -1))
    return model.eval()


def new_model(config: ViTConfig, seed: int) -> ViTModel:
    """An untrained model whose patches know their places from the start: sine-cosine position embeddings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTModel(config, add_pooling_layer=False)
    places = position_embeddings(config.hidden_size, config.image_size // config.patch_size)
    model.embeddings.position_embeddings.data.copy_(places)
    return model


def position_embeddings(hidden_size: int, side: int) -> Tensor:
    """Sines and cosines of each patch's row and column, zeros for CLS: [1, 1 + side^2, D].

    As in ViT (MAE's form, He et al. 2021), with a base of 100 for a few patches a side, and at half the amplitude.
    """
    frequencies = 100 ** -(torch.arange(hidden_size // 4) / (hidden_size // 4))
    places = torch.arange(side, dtype=torch.float32)
    rows, columns = (axis.reshape(-1, 1) * frequencies for axis in torch.meshgrid(places, places, indexing="ij"))
    patches = torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=1) / 2
    return torch.cat([torch.zeros(1, hidden_size), patches]).unsqueeze(0)


def features(model: ViTModel, images: Tensor) -> Tensor:
    """What heads and probes see: CLS after the last norm, [N, C, R, R] -> [N, D]."""
    cls: Tensor = model(images).last_hidden_state[:, 0]
    return cls


def contrast(projections: Tensor, temperature: float) -> Tensor:
    """NT-Xent: rows i and B + i of [2B, P] are views of one image and find each other among all others."""
    pairs = len(projections) // 2
    directions = F.normalize(projections, dim=1)
    similarities = directions @ directions.T / temperature
    similarities = similarities.masked_fill(torch.eye(2 * pairs, dtype=torch.bool), -math.inf)
    partners = torch.arange(2 * pairs).roll(pairs)
    return F.cross_entropy(similarities, partners)


@torch.no_grad()
def standardise(model: ViTModel, images: Tensor) -> None:
    """Give the features zero mean and unit deviation over images, by rewriting the last norm's scale and shift.

    Trained, CLS has a common part ten times larger than what tells images apart, so a new head would hardly learn.
    """
    seen = _in_batches(model, images)
    deviation = seen.std(dim=0).clamp_min(1e-6)
    model.layernorm.weight.div_(deviation)
    model.layernorm.bias.sub_(seen.mean(dim=0)).div_(deviation)


def linear_probe(model: ViTModel, images: Tensor, labels: Tensor, new_images: Tensor, new_labels: Tensor) -> float:
    """Accuracy on new images of logistic regression on the frozen model's features, standardised over `images`."""
    from sklearn.linear_model import LogisticRegression

    known, new = _in_batches(model, images), _in_batches(model, new_images)
    mean, deviation = known.mean(dim=0), known.std(dim=0).clamp_min(1e-6)
    probe = LogisticRegression(C=0.1, max_iter=1000).fit((known - mean) / deviation, labels)
    return float(probe.score((new - mean) / deviation, new_labels))


@torch.no_grad()
def _in_batches(model: ViTModel, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([features(model, batch) for batch in images.split(256)])


def _projector(hidden_size: int, seed: int) -> nn.Module:
    """SimCLR's head, thrown away after pre-training: [B, D] -> [B, P]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(hidden_size, 2 * hidden_size),
            nn.BatchNorm1d(2 * hidden_size),
            nn.ReLU(),
            nn.Linear(2 * hidden_size, _PROJECTION_SIZE),
            nn.BatchNorm1d(_PROJECTION_SIZE, affine=False),
        )


def _optimizers(
    model: ViTModel, projector: nn.Module, matrix_rate: float, learning_rate: float, weight_decay: float
) -> list[Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, norms, biases and the projector."""
    matrices = [parameter for parameter in model.layers.parameters() if parameter.ndim == 2]
    chosen = {id(matrix) for matrix in matrices}
    others = [p for module in (model, projector) for p in module.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=matrix_rate, weight_decay=weight_decay),
        AdamW(others, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98)),
    ]


def schedule(progress: float) -> float:
    """Share of the peak rate: a linear rise, then half a cosine to nothing."""
    if progress < _WARM_UP:
        return progress / _WARM_UP
    return (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP))) / 2


def _batches(num_images: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of different images, all of them in a new order again and again, without end."""
    while True:
        order = torch.randperm(num_images, generator=generator)
        yield from order[: num_images // batch_size * batch_size].split(batch_size)


def _views(config: ViTConfig, corpus: Corpus, chosen: Tensor, generator: torch.Generator) -> Tensor:
    return corpus.views(chosen, config.image_size, generator).expand(-1, config.num_channels, -1, -1)


def _descend(loss: Tensor, optimizers: list[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
