"""Differential privacy of clusters: who takes part is secret, updates are clipped, and noise is added to their sum.
Or of examples, which devices clip and noise in each local step (`runtime.example_gradients`).

DP-FedAvg, McMahan et al. 2018, Algorithm 1, https://arxiv.org/abs/1710.06963, with unweighted updates, flat clipping
and the estimator of fixed denominator. Two federations are neighbours where one cluster's updates are nothing in one
of them; which clusters there are is no secret. The edge is trusted: it sees updates before they are clipped.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ecogen.config import Privacy
from ecogen.errors import AggregationError, ConfigError
from ecogen.models.tunables import Tunables
from ecogen.runtime.example_gradients import ExampleNoise, Normal
from ecogen.tuning.aggregate import Update
from ecogen.tuning.messages import Sampled

logger = logging.getLogger(__name__)

_HOPELESS = 100.0  # epsilon of which nobody needs to know whether it is tight
_MANTISSA_BITS = 52  # (k + 1/2) / 2^52 is exact in double precision and never 0 or 1


def secure_normal(count: int) -> Tensor:
    """Standard normal numbers from the operating system's secure source: a seed would tell the noise to who knows it.

    By inversion. In floating point not every real number can come up, which a determined reader of the last bits
    could use (Mironov 2012); the largest possible is 8.2.
    """
    numbers = np.frombuffer(os.urandom(8 * count), np.uint64) >> np.uint64(64 - _MANTISSA_BITS)
    shares = torch.from_numpy((numbers.astype(np.float64) + 0.5) * 2.0**-_MANTISSA_BITS)
    normal: Tensor = torch.special.ndtri(shares)
    return normal


def private_mean(
    before: Mapping[str, Tensor],
    updates: Sequence[Update],
    *,
    clip_norm: float,
    noise_multiplier: float,
    expected: float,
    normal: Normal = secure_normal,
) -> Tunables:
    """w + (sum_i clip(w_i - w, S) + N(0, (z S)^2)) / (q N): the round's tunables, whoever was lost.

    One cluster's update moves it by at most S / (q N), whatever is in it. Not finite ones count as no change.

    Args:
        before: w, what the round began with.
        updates: w_i, of the clusters that took part and finished; may be none.
        clip_norm: S, of a cluster's change of all its tunables together.
        noise_multiplier: z.
        expected: q N, the mean number of clusters that take part.

    Raises:
        AggregationError: if an update has other names or shapes.
    """
    total = torch.zeros(sum(tensor.numel() for tensor in before.values()), dtype=torch.float64)
    start = _flat(before)
    for update in sorted(updates, key=lambda update: update.sender_id):
        _check_shapes(before, update)
        total += clip(_flat({name: update.tunables[name] for name in before}) - start, clip_norm)
    total += noise_multiplier * clip_norm * normal(len(total))
    return _unflat(start + total / expected, before)


def clip(change: Tensor, norm: float) -> Tensor:
    """The change, shortened to the norm where it is longer; nothing where it is not finite."""
    length = float(torch.linalg.vector_norm(change))
    if not np.isfinite(length):
        logger.warning("an update that is not finite, or overflows, counts as no change")
        return torch.zeros_like(change)
    return change * min(1.0, norm / length) if length else change


def draw_secretly(cluster_ids: Sequence[str], rate: float) -> list[str]:
    """Each cluster with probability q, by the secure source: the accountant counts on nobody knowing who took part."""
    source = random.SystemRandom()
    return [cluster_id for cluster_id in cluster_ids if source.random() < rate]


def draw_by_seed(cluster_ids: Sequence[str], rate: float, key: Sequence[int]) -> list[str]:
    """Each cluster with probability q, the same ones for the same key."""
    shares = np.random.default_rng(list(key)).random(len(cluster_ids))
    return [cluster_id for cluster_id, share in zip(cluster_ids, shares, strict=True) if share < rate]


def check_accountant() -> None:
    """Check that epsilon can be computed, without the seconds that the import takes.

    Raises:
        ConfigError: if opacus is not installed.
    """
    if importlib.util.find_spec("opacus") is None:
        raise ConfigError(
            ["privacy.noise_multiplier: opacus, its accountant, is missing; pip install 'ecogen[privacy]'"]
        )


@lru_cache(maxsize=256)
def epsilon(noise_multiplier: float, rate: float, rounds: int, delta: float) -> float:
    """What so many rounds, or steps, of the Poisson-subsampled Gaussian mechanism cost together: an upper bound.

    Opacus' accountant of privacy loss distributions (Gopi et al. 2021, https://arxiv.org/abs/2106.02848); where there
    is no privacy to speak of, its looser one of Renyi divergences (Mironov et al. 2019,
    https://arxiv.org/abs/1908.10530), since the former's memory grows with epsilon.
    """
    if not rounds:
        return 0.0
    from opacus.accountants import PRVAccountant, RDPAccountant

    history = [(noise_multiplier, rate, rounds)]
    rough, tight = RDPAccountant(), PRVAccountant()
    rough.history, tight.history = history, list(history)
    with np.errstate(divide="ignore"), warnings.catch_warnings():  # log(0) where everybody takes part is meant
        warnings.simplefilter("ignore", UserWarning)  # of the rough one's orders
        bound = float(rough.get_epsilon(delta))
        return bound if bound > _HOPELESS else float(tight.get_epsilon(delta))


def example_noise(spec: Privacy, rows: int, normal: Normal = secure_normal) -> ExampleNoise | None:
    """What protects each example in a recipe's local steps; None where they are not noised.

    Args:
        rows: passages of a batch that are one example, side by side.
    """
    if spec.unit != "example" or not spec.noise_multiplier:
        return None
    return ExampleNoise(spec.clip_norm, spec.noise_multiplier, rows, normal)


@dataclass(frozen=True)
class ExamplePrivacy:
    """What protects each example of one edge: DP-SGD in the local steps of its clusters.

    An example is one device's, and only the steps on that device's examples look at it (parallel composition): so what
    is spent is the most of any device.
    """

    spec: Privacy

    def epsilon(self, sampled: Collection[Sampled], rounds: int) -> float:
        """Spent after so many rounds, each counted as one in which every device took part.

        Args:
            sampled: how devices drew their examples in a round.
        """
        z, delta = self.spec.noise_multiplier, self.spec.delta
        return max((epsilon(z, one.rate, one.steps * rounds, delta) for one in sampled), default=0.0)


@dataclass(frozen=True)
class ClusterPrivacy:
    """What protects the clusters of one edge.

    Attributes:
        rate: q, with which each takes part in a round.
        num_clusters: N, whether they are here or not.
        normal: where the noise comes from; another than the secure source is for tests.
    """

    spec: Privacy
    rate: float
    num_clusters: int
    normal: Normal = secure_normal

    def update(self, before: Mapping[str, Tensor], updates: Sequence[Update]) -> Update:
        """What all updates of a round come to, for a strategy to go on with: whatever it does reveals no more."""
        tunables = private_mean(
            before,
            updates,
            clip_norm=self.spec.clip_norm,
            noise_multiplier=self.spec.noise_multiplier,
            expected=self.rate * self.num_clusters,
            normal=self.normal,
        )
        return Update("all clusters", tunables, self.num_clusters)

    def epsilon(self, rounds: int) -> float:
        """Spent after so many rounds."""
        return epsilon(self.spec.noise_multiplier, self.rate, rounds, self.spec.delta)


def _check_shapes(before: Mapping[str, Tensor], update: Update) -> None:
    """An update is of the tunables that the round began with."""
    found = {name: tensor.shape for name, tensor in update.tunables.items()}
    differing = {n for n, tensor in before.items() if found.get(n) != tensor.shape} | (found.keys() - before.keys())
    if differing:
        raise AggregationError(
            f"the update of {update.sender_id!r} is of other tunables: it differs at {min(differing)!r}"
        )


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


def _unflat(values: Tensor, like: Mapping[str, Tensor]) -> Tunables:
    parts = torch.split(values, [tensor.numel() for tensor in like.values()])
    return {n: part.view(t.shape).to(t.dtype) for (n, t), part in zip(like.items(), parts, strict=True)}
