"""How good drawn images are: a distance to real ones, and how many are copies of what was learnt from.

Shapes: N drawn images, M real ones, F numbers of a feature.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COPIED = 0.01
_ROOM = 1e-6
_AT_ONCE = 256


def frechet_distance(ours: Tensor, theirs: Tensor) -> float:
    """Between Gaussians fitted to two sets of features [N, F] and [M, F], 0 or more.

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", arXiv
    1706.08500, equation 6. It is the larger the fewer there are: compare sets of the same sizes only.
    """
    ours, theirs = ours.double(), theirs.double()
    one, other = torch.cov(ours.T), torch.cov(theirs.T)
    root = _root(one)
    shared = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    apart = (ours.mean(0) - theirs.mean(0)).square().sum()
    return max(0.0, float(apart + one.trace() + other.trace() - 2 * shared))


def _root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def copied_share(drawn: Tensor, learnt: Tensor, held_out: Tensor) -> float:
    """The share of drawn images [N, ...] that are near copies of some that were learnt from [M, ...].

    Near is what only one in a hundred held-out real images is to the nearest one that was learnt from; so about 0.01
    is what images have that know nothing of these, and the more there are above it, the more were remembered.
    """
    near = nearest_distances(held_out, learnt).quantile(_COPIED)
    return float((nearest_distances(drawn, learnt) < near * (1 - _ROOM)).double().mean())


def told_apart(members: Tensor, others: Tensor) -> float:
    """How well a score tells members [N] from others [M]: the probability that a member's is higher (AUC).

    0.5 is guessing. Ties count half (Fawcett, "An introduction to ROC analysis", 2006, section 7).
    """
    differences = members[:, None] - others[None]
    return float(((differences > 0).double() + (differences == 0).double() / 2).mean())


def nearest_distances(ours: Tensor, theirs: Tensor) -> Tensor:
    """From each of ours to the nearest of theirs, in the numbers of all pixels [N]."""
    flat = theirs.flatten(1)
    return torch.cat([torch.cdist(part.flatten(1), flat).min(1).values for part in torch.split(ours, _AT_ONCE)])
