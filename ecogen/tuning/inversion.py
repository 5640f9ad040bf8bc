"""Inversion attacks: how well what crosses the first cut gives away the images behind it.

The threat: an honest-but-curious device behind the cut, or whoever reads the link. It follows the protocol and looks
at what it is sent. We grant it everything the federation shares, which is the strong and so the honest setting: the
frozen backbone, the current tunables, and images of its own from the very distribution it attacks (the validation
digits, on which nobody tunes and which are not attacked; rendered glyphs only where the recipe keeps too few). It
sees the tuned model's activations of test images. Three attackers, the last two beginning with the first one's answer:

    least squares    ridge regression of each patch's pixels on its own token, fitted on the attacker's images
    trained decoder  a small MLP-mixer over all tokens, trained to correct the least-squares answer
    optimisation     L-BFGS on the pixels until the known weights give the activations seen (He et al. 2019,
                     section 3: https://doi.org/10.1145/3359789.3359824)

An attack that recovers little proves nothing about a better one; what these recover is a lower bound.

Shapes: B batch, N images known, C channels, H height, W width, T tokens with CLS, P patches, D hidden, K pixels of a
patch. Images are in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecogen import config as recipes
from ecogen.measurements import EXACT_DB, Image, Inversion, InversionAttack
from ecogen.models.adapters import classification_config, load_whole
from ecogen.models.checkpoint import Foundation
from ecogen.models.prompts import without_prompts
from ecogen.models.tunables import get_tunables, set_tunables
from ecogen.models.vit import SegmentedViT
from ecogen.placement import Segment
from ecogen.tuning.data import Examples, Splits, load_splits
from ecogen.tuning.glyphs import augment, render_glyphs
from ecogen.tuning.labels import without_heads

Encode = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] -> the activations [B, T, D] that cross the cut."""
Decode = Callable[[Tensor], Tensor]
"""Activations [B, T, D] -> images [B, C, H, W]."""

DEEPEST = 2  # blocks before the cut
NUM_ATTACKED = 128
NUM_OPTIMISED = 32  # of them, since each costs a hundred passes through the blocks
NUM_SHOWN = 4
FEWEST_OWN = 40  # with fewer validation images the attacker takes glyphs

_NUM_GLYPHS = 400
_ATTACK_KEY = 7
_RIDGES = (0.0, *(10.0**power for power in range(-10, 3)))


@dataclass(frozen=True)
class Pairs:
    """What an attacker learns from: images [N, C, H, W] and their activations [N, T, D]."""

    images: Tensor
    activations: Tensor


@dataclass(frozen=True)
class Known:
    """The attacker's pairs, a held-out part of them to choose by, and the size of the model's patches."""

    fitted: Pairs
    held_out: Pairs
    patch_size: int

    @property
    def all(self) -> Pairs:
        return Pairs(
            torch.cat([self.fitted.images, self.held_out.images]),
            torch.cat([self.fitted.activations, self.held_out.activations]),
        )


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard the attackers try; by default about 10 CPU seconds for all on a 28 x 28 model of width 128."""

    blends: int = 1200
    decoder_steps: int = 200
    optimiser_steps: int = 60


_FULL = Effort()


def attack_first_cut(
    foundation: Foundation,
    recipe: recipes.Recipe,
    tunables: Mapping[str, Tensor],
    *,
    effort: Effort = _FULL,
) -> tuple[InversionAttack, ...]:
    """Attack test images through the tuned model, cut after 0, 1 and 2 blocks; the same seed gives the same figures."""
    splits = load_splits(recipe.data, recipe.model.image_size, recipe.seed)
    model = load_whole(foundation, classification_config(foundation, splits.num_labels), recipe.tunables, seed=0)
    assert isinstance(model, SegmentedViT)
    set_tunables(model, {**get_tunables(model), **without_heads(tunables)})  # the cuts are below any head
    model.requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(int(np.random.default_rng([recipe.seed, _ATTACK_KEY]).integers(2**62)))
    own, whose = own_images(splits, generator)
    attacked = splits.test[range(min(NUM_ATTACKED, len(splits.test)))]
    score = Score(attacked, splits.train, own.mean(0))
    results: dict[str, list[Inversion]] = {"least squares": [], "trained decoder": [], "optimisation": []}
    for depth in range(min(DEEPEST, foundation.config.num_hidden_layers) + 1):
        encode = _seen_after(model, depth)
        answers = _attack(encode, own, attacked.images, foundation.config.patch_size, effort, generator)
        for attacker, answer in answers.items():
            results[attacker].append(score(answer, depth))
    return tuple(_told(attacker, tuple(found), whose, score) for attacker, found in results.items())


def _seen_after(model: SegmentedViT, depth: int) -> Encode:
    """What crosses the cut after some blocks, but for shallow prompts, whose tokens these attackers do not look at."""
    config = model.whole.config
    num_tokens = (config.image_size // config.patch_size) ** 2 + 1
    segment = Segment(0, depth, has_embedding=True)
    return lambda images: without_prompts(model(images, segment), num_tokens)


def own_images(splits: Splits, generator: torch.Generator) -> tuple[Tensor, str]:
    """The images that the attacker has of its own [N, C, H, W], and what they are."""
    own = splits.validation.images
    if len(own) >= FEWEST_OWN:
        return own, f"{len(own)} digits of its own from the same source, none of them attacked or tuned on"
    glyphs = render_glyphs()
    chosen = torch.randint(len(glyphs), (_NUM_GLYPHS,), generator=generator)
    size = splits.train.images.shape[-1]
    return augment(glyphs[chosen], generator=generator, size=size) * 2 - 1, f"{_NUM_GLYPHS} rendered glyphs"


@torch.no_grad()
def learn_from(
    encode: Encode, own: Tensor, patch_size: int, generator: torch.Generator, *, blends: int = _FULL.blends
) -> Known:
    """Pairs of the attacker's images and of blends of two of them; every fifth image is held out, and in no blend."""
    held = torch.arange(len(own)) % 5 == 4
    fitted = torch.cat([own[~held], blend(own[~held], blends, generator)])
    return Known(Pairs(fitted, encode(fitted)), Pairs(own[held], encode(own[held])), patch_size)


def blend(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Weighted means of random pairs of images (mixup, Zhang et al. 2018: https://arxiv.org/abs/1710.09412)."""
    first, second = torch.randint(len(images), (2, count), generator=generator)
    weight = torch.rand(count, 1, 1, 1, generator=generator) / 2
    return images[first] * (1 - weight) + images[second] * weight


def fit_least_squares(known: Known) -> Decode:
    """Ridge regression, each patch on its own token; the penalty is the one that serves the held-out images best."""
    held_out, tried = known.held_out, PatchRegression(known.fitted, known.patch_size)
    misses = {r: (tried.decode(held_out.activations, r) - held_out.images).square().mean().item() for r in _RIDGES}
    regression, ridge = PatchRegression(known.all, known.patch_size), min(_RIDGES, key=misses.__getitem__)
    return lambda activations: regression.decode(activations, ridge)


def train_decoder(
    known: Known, begin: Decode, generator: torch.Generator, *, steps: int = _FULL.decoder_steps
) -> Decode:
    """A mixer that corrects another decoder's answers, trained with AdamW on all pairs."""
    pairs = known.all
    scale, shift = pairs.activations.std() + 1e-12, pairs.activations.mean((0, 1))
    missing = _patches(pairs.images - begin(pairs.activations), known.patch_size)
    unit = missing.std() + 1e-12
    inputs, targets = (pairs.activations - shift) / scale, missing / unit
    mixer = Mixer(inputs.shape[1], inputs.shape[2], targets.shape[2], generator)
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=4e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (48,), generator=generator)
        loss = (mixer(inputs[chosen]) - targets[chosen]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def decode(activations: Tensor) -> Tensor:
        correction = mixer((activations - shift) / scale) * unit
        return begin(activations) + _unpatch(correction, known.patch_size, pairs.images.shape)

    return decode


def optimise(encode: Encode, seen: Tensor, begin: Tensor, *, steps: int = _FULL.optimiser_steps) -> Tensor:
    """Images [B, C, H, W] near `begin` whose activations are those seen, by L-BFGS."""
    images = begin.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [images],
        max_iter=steps,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def miss() -> Tensor:
        optimizer.zero_grad()
        loss = (encode(images) - seen).square().sum() * 100
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(miss)  # type: ignore[no-untyped-call]
    return images.detach()


class PatchRegression:
    """Each patch's pixels regressed on its own token, in float64, factorised once for every penalty."""

    def __init__(self, pairs: Pairs, patch_size: int) -> None:
        self._size, self._shape = patch_size, pairs.images.shape
        tokens = pairs.activations[:, 1:].double().transpose(0, 1)  # [P, N, D]
        pixels = _patches(pairs.images, patch_size).double().transpose(0, 1)  # [P, N, K]
        self._tokens, self._pixels = tokens.mean(1, keepdim=True), pixels.mean(1, keepdim=True)
        tokens, pixels = tokens - self._tokens, pixels - self._pixels
        self._values, self._vectors = torch.linalg.eigh(tokens.transpose(1, 2) @ tokens)  # [P, D], [P, D, D]
        self._projected = self._vectors.transpose(1, 2) @ (tokens.transpose(1, 2) @ pixels)  # [P, D, K]

    def decode(self, activations: Tensor, ridge: float) -> Tensor:
        """[B, T, D] -> [B, C, H, W]; `ridge` is relative to the mean variance of the tokens."""
        level = self._values.mean(1, keepdim=True).clamp_min(1e-30)
        # Directions below float32's resolution carry nothing but its rounding.
        inverse = torch.where(self._values > 1e-13 * level, 1 / (self._values.clamp_min(1e-30) + ridge * level), 0)
        weights = self._vectors @ (inverse.unsqueeze(2) * self._projected)
        patches = (activations[:, 1:].double().transpose(0, 1) - self._tokens) @ weights + self._pixels
        return _unpatch(patches.transpose(0, 1), self._size, self._shape).float()


class Mixer(nn.Module):
    """One layer of an MLP-mixer, its head zero at first (Tolstikhin et al. 2021: https://arxiv.org/abs/2105.01601)."""

    def __init__(self, tokens: int, hidden: int, pixels: int, generator: torch.Generator, *, width: int = 64) -> None:
        super().__init__()
        self.enter = nn.Linear(hidden, width)
        self.place = nn.Parameter(torch.zeros(tokens, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.across = nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens))
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.leave = nn.Linear(width, pixels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.leave.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] -> [B, P, K]"""
        hidden = self.enter(tokens) + self.place
        hidden = hidden + self.across(self.norms[0](hidden).transpose(1, 2)).transpose(1, 2)
        hidden = hidden + self.within(self.norms[1](hidden))
        patches: Tensor = self.leave(self.norms[2](hidden[:, 1:]))
        return patches


class Score:
    """Compares reconstructions with the attacked images.

    Args:
        real: labelled images that train the classifier which reads the reconstructions: a support vector machine.
        mean: the image [C, H, W] of somebody who sees nothing.
    """

    def __init__(self, attacked: Examples, real: Examples, mean: Tensor) -> None:
        from sklearn.svm import SVC

        self.attacked = attacked
        self._reader = SVC(C=10).fit(real.images.flatten(1).numpy(), real.labels.numpy())
        self._mean = mean

    def __call__(self, answer: Tensor, depth: int) -> Inversion:
        """The figures of reconstructions [B, C, H, W] of the first B attacked images."""
        originals, answer = self.attacked.images[: len(answer)], answer.clamp(-1, 1)
        return Inversion(
            depth,
            psnr_db(answer, originals),
            psnr_db(self._mean.expand_as(originals), originals),
            ssim(answer, originals),
            self.read(answer),
            as_pictures(answer[:NUM_SHOWN]),
        )

    def read(self, images: Tensor) -> float:
        """Share of images of the first attacked ones whose label the classifier reads right."""
        labels = self.attacked.labels[: len(images)].numpy()
        return float((self._reader.predict(images.flatten(1).numpy()) == labels).mean())


def psnr_db(answers: Tensor, originals: Tensor) -> float:
    """Mean peak signal-to-noise ratio of images in [-1, 1], each at most `EXACT_DB`."""
    share = (answers - originals).square().flatten(1).mean(1) / 4  # the peak is 2
    return float((-10 * share.clamp_min(10 ** (-EXACT_DB / 10)).log10()).mean())


def ssim(answers: Tensor, originals: Tensor) -> float:
    """Mean structural similarity of images in [-1, 1], with a Gaussian window of 11 pixels and sigma 1.5.

    Wang et al. 2004, equation 13, K1 = 0.01, K2 = 0.03: https://doi.org/10.1109/TIP.2003.819861
    """
    x, y = ((images.flatten(0, 1).unsqueeze(1) + 1) / 2 for images in (answers, originals))
    side = min(11, x.shape[-1], x.shape[-2])
    line = torch.softmax(-(torch.arange(side) - (side - 1) / 2).square() / (2 * 1.5**2), 0)
    window = (line[:, None] * line).view(1, 1, side, side)
    mx, my = F.conv2d(x, window), F.conv2d(y, window)
    vx, vy = F.conv2d(x * x, window) - mx * mx, F.conv2d(y * y, window) - my * my
    cov = F.conv2d(x * y, window) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean())


def as_pictures(images: Tensor) -> tuple[Image, ...]:
    """Grey values in [0, 1], to two digits."""
    grey = ((images.mean(1) + 1) / 2).clamp(0, 1)
    return tuple(tuple(tuple(round(value, 2) for value in row) for row in image) for image in grey.tolist())


def _attack(
    encode: Encode, own: Tensor, attacked: Tensor, patch_size: int, effort: Effort, generator: torch.Generator
) -> dict[str, Tensor]:
    """Attacker -> its reconstructions of the first attacked images, [B, C, H, W]."""
    known = learn_from(encode, own, patch_size, generator, blends=effort.blends)
    with torch.no_grad():
        seen = encode(attacked)
    least_squares = fit_least_squares(known)
    decoder = train_decoder(known, least_squares, generator, steps=effort.decoder_steps)
    begin = least_squares(seen)
    few = slice(min(NUM_OPTIMISED, len(seen)))
    return {
        "least squares": begin,
        "trained decoder": decoder(seen),
        "optimisation": optimise(encode, seen[few], begin[few], steps=effort.optimiser_steps),
    }


_DEEDS = {
    "least squares": "ridge regression of each patch's pixels on its own token",
    "trained decoder": "a small network over all tokens, trained to correct the least-squares answer",
    "optimisation": "L-BFGS on the pixels, from the least-squares answer, until the known weights give the activations",
}


def _told(attacker: str, results: tuple[Inversion, ...], whose: str, score: Score) -> InversionAttack:
    count = len(score.attacked) if attacker != "optimisation" else min(NUM_OPTIMISED, len(score.attacked))
    originals = score.attacked.images[:count]
    return InversionAttack(
        attacker,
        f"{_DEEDS[attacker]}; it knows the backbone and the tunables, and has {whose}",
        count,
        results,
        as_pictures(originals[:NUM_SHOWN]),
        score.read(originals),
    )


def _patches(images: Tensor, size: int) -> Tensor:
    """[B, C, H, W] -> [B, P, K], in the order of the tokens."""
    return F.unfold(images, size, stride=size).transpose(1, 2)


def _unpatch(patches: Tensor, size: int, shape: torch.Size) -> Tensor:
    """[B, P, K] -> [B, C, H, W]"""
    return F.fold(patches.transpose(1, 2), (shape[2], shape[3]), size, stride=size)
