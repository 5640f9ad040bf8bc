"""Training an image tokenizer: it learns to give images back from their codes.

Vectors of the codebook that no patch uses are set to patches that were just seen (Dhariwal et al., "Jukebox", arXiv
2005.00341, section 3), early in training, so that all of them come into use.

Shapes: N images, C channels, S side, P patches a side, D numbers of a feature, K vectors of the codebook.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import AdamW

from ecogen.models.image_tokenizer import ImageTokenizer, ImageTokens
from ecogen.tuning.pretrain import schedule

Views = Callable[[int, torch.Generator], Tensor]
"""So many random images [N, C, S, S] in [0, 1], as a function of the generator."""

OnStep = Callable[[str, int, int, float], None]

_COMMITMENT = 0.25
"""Weight of the pull of features towards their vectors (van den Oord et al., arXiv 1711.00937, equation 3)."""

_WARM_UP, _REVIVE_EVERY, _REVIVED_FOR = 20, 50, 0.6  # steps, steps, share of all steps


def train_image_tokenizer(
    config: ImageTokens,
    views: Views,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_step: OnStep,
) -> ImageTokenizer:
    """An image tokenizer of the images that `views` draws; the same for the same arguments and number of threads."""
    generator, tokenizer = torch.Generator().manual_seed(seed), _untrained(config, seed)
    optimizer = AdamW(tokenizer.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * schedule((step + 1) / steps)
        images = views(batch_size, generator)
        if step == _WARM_UP or (step % _REVIVE_EVERY == 0 and _WARM_UP < step < _REVIVED_FOR * steps):
            _revive(tokenizer, images, generator, are_all_dead=step == _WARM_UP)
        loss = _loss(tokenizer, images)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        on_step("image tokens", step + 1, steps, loss.item())
    return tokenizer.eval()


def _untrained(config: ImageTokens, seed: int) -> ImageTokenizer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ImageTokenizer(config)


def _loss(tokenizer: ImageTokenizer, images: Tensor) -> Tensor:
    """How far the images are from what their codes give back, and the features from their vectors."""
    features = tokenizer.features(images)
    vectors = tokenizer.vectors(tokenizer.nearest(features))
    passed = features + (vectors - features).detach()  # the gradient goes past the choice
    drawn = functional.binary_cross_entropy_with_logits(tokenizer.logits(passed), images)
    moved = functional.mse_loss(vectors, features.detach())
    return drawn + moved + _COMMITMENT * functional.mse_loss(features, vectors.detach())


@torch.no_grad()
def _revive(tokenizer: ImageTokenizer, images: Tensor, generator: torch.Generator, *, are_all_dead: bool) -> None:
    features = tokenizer.features(images)
    size = tokenizer.config.codebook_size
    used = torch.bincount(tokenizer.nearest(features).flatten(), minlength=size)
    is_dead = torch.ones(size, dtype=torch.bool) if are_all_dead else used == 0
    seen = features.flatten(0, 2)
    chosen = torch.randint(len(seen), (int(is_dead.sum()),), generator=generator)
    tokenizer.codebook[is_dead] = seen[chosen]
