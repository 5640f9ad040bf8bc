"""A classifier that judges pictures: it learnt from real ones only, and no generator learns from it.

It stands outside of the federation, as whoever evaluates does: it is shown real data of all edges.

Shapes: N images, C channels, S side of an image, K labels, F numbers of a feature.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from ecogen.tuning.augment import augment
from ecogen.tuning.pretrain import schedule

NUM_FEATURES = 64

STEPS = 600
_BATCH, _LEARNING_RATE, _WEIGHT_DECAY = 64, 3e-3, 0.05
_GATHERED = 256


class Judge(nn.Module):
    """Says which label an image [N, C, S, S] in [0, 1] has."""

    def __init__(self, num_channels: int, num_labels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_layer(num_channels, 16),
            nn.MaxPool2d(2),
            *_layer(16, 32),
            nn.MaxPool2d(2),
            *_layer(32, 64),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.Linear(64 * 9, NUM_FEATURES),
            nn.GELU(),
        )
        self.head = nn.Linear(NUM_FEATURES, num_labels)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What it sees in images, before it decides: [N, F]."""
        return torch.cat([self.body(part) for part in torch.split(images, _GATHERED)])

    @torch.no_grad()
    def labels(self, images: Tensor) -> Tensor:
        """The likeliest label of each image [N]."""
        given: Tensor = self.head(self.features(images)).argmax(-1)
        return given


def train_judge(images: Tensor, labels: Tensor, num_labels: int, seed: int, steps: int = STEPS) -> Judge:
    """One that has learnt from real images [N, C, S, S] in [0, 1] and their labels [N]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(images.shape[1], num_labels)
    generator = torch.Generator().manual_seed(seed)
    optimizer = AdamW(judge.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _LEARNING_RATE * schedule((step + 1) / steps)
        chosen = torch.randint(len(images), (_BATCH,), generator=generator)
        views = augment(images[chosen], 1.0, generator)
        loss = cross_entropy(judge.head(judge.body(views)), labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return judge.eval()


def _layer(num_in: int, num_out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(num_in, num_out, 3, padding=1), nn.BatchNorm2d(num_out), nn.GELU()
