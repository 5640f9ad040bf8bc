"""LoRA between an edge of rank R and clusters of ranks r_i <= R: what each begins with, and what the edge ends with.

The change of a weight is s B A with B [O, r] and A [r, I]; the scale s is alpha / r, with rsLoRA alpha / sqrt(r), so it
is another one for every rank. Matrices O x I are never formed: a sum of products is the product of stacked factors
(FLoRA, Wang et al. 2024, https://arxiv.org/abs/2409.05976), and its singular values are those of the small product of
the factors' triangles (QR). All of it is in double precision.

products: a cluster begins with the best approximation of its rank, and the edge ends with the best one of rank R of the
    exact mean of products (HLoRA, Liu et al. 2025, https://arxiv.org/abs/2503.00813). Exact where sum r_i <= R.
changes: as products, but what a cluster was sent is taken off its product, and the mean of these changes is added to
    the edge's product. What was cut off did not reach the cluster and is missing in its product: with plain products
    the directions fade, round by round, that only some clusters have room for (rank collapse, Wu et al. 2026,
    https://arxiv.org/abs/2602.13486).
factors: a cluster begins with the first r_i rows of A and columns of B, and what it returns is padded with zeros, then
    averaged factor by factor (HetLoRA without its pruning, Cho et al. 2024, https://arxiv.org/abs/2401.06432).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ecogen.config import Aggregation, Recipe, lora_averaging
from ecogen.models.tunables import Tunables
from ecogen.tuning.aggregate import Update, aggregate, check_updates
from ecogen.tuning.strategies import Strategy, fedavg

_A, _B = ".lora_A.weight", ".lora_B.weight"


class Product(NamedTuple):
    """A matrix left @ right that is not formed: left [O, k], right [k, I]."""

    left: Tensor
    right: Tensor

    @property
    def norm(self) -> float:
        """Its Frobenius norm."""
        left, right = (torch.linalg.qr(part, mode="r").R for part in (self.left, self.right.T))
        return float(torch.linalg.norm(left @ right.T))

    def decompose(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [O, q], singular values [q] from the largest, V^T [q, I], with q = min(k, O, I)."""
        of_left, left = torch.linalg.qr(self.left)
        of_right, right = torch.linalg.qr(self.right.T)
        u, singular, vt = torch.linalg.svd(left @ right.T, full_matrices=False)
        return of_left @ u, singular, vt @ of_right.T


class Together(NamedTuple):
    """What became of the updates of a round.

    Attributes:
        memory: what the strategy wants to be given in the next round.
        error: the Frobenius norm by which LoRA's products miss the mean of the clusters' products, over that mean's.
    """

    tunables: Tunables
    memory: Tunables
    error: float | None = None


@dataclass(frozen=True)
class LoraRanks:
    """How LoRA is averaged where factor by factor will not do.

    Attributes:
        alpha: over the rank it is the scale, over its root with `root_of_rank` (rsLoRA).
        how: what is averaged, see above.
        of_clusters: the largest rank of some clusters; the others have the edge's.
    """

    alpha: float
    root_of_rank: bool = False
    how: Literal["factors", "products", "changes"] = "changes"
    of_clusters: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe) -> LoraRanks | None:
        """That of a recipe; None where all ranks are the same and factors are averaged one by one, as FedAvg does."""
        tunables, how = recipe.tunables, lora_averaging(recipe)
        if how == "factors" and not tunables.cluster_ranks:
            return None
        return cls(tunables.lora_alpha, tunables.lora_kind == "rslora", how, tunables.cluster_ranks)

    def scale(self, rank: int) -> float:
        """What a product of factors of this rank is multiplied by."""
        return self.alpha / (math.sqrt(rank) if self.root_of_rank else rank)

    def cut(self, tunables: Mapping[str, Tensor], most: int | None) -> Tunables:
        """What a cluster of LoRA rank `most` begins or serves with; None is the edge's own rank."""
        reduced = dict(tunables)
        for name in lora_modules(tunables) if most else ():
            a, b = tunables[name + _A], tunables[name + _B]
            if most is not None and len(a) > most:
                reduced[name + _A], reduced[name + _B] = self._cut(a, b, most)
        return reduced

    def put_together(
        self,
        before: Mapping[str, Tensor],
        updates: Sequence[Update],
        memory: Mapping[str, Tensor],
        strategy: Strategy,
        spec: Aggregation,
    ) -> Together:
        """The tunables after a round: LoRA as said above, everything else by the strategy.

        Args:
            updates: that were checked, see `check_update`.
        """
        modules = lora_modules(before)
        if self.how != "factors":
            rest = [replace(update, tunables=_without(update.tunables, modules)) for update in updates]
            tunables, memory = strategy(_without(before, modules), rest, memory, spec)
            for name in modules:
                tunables |= self._nearest(name, before, updates)
        else:
            padded = [self._padded(update, before, modules) for update in updates]
            tunables, memory = strategy(before, padded, memory, spec)
        tunables = {name: tunables[name] for name in before}
        return Together(tunables, memory, self.error(tunables, before, updates))

    def error(
        self, tunables: Mapping[str, Tensor], before: Mapping[str, Tensor], updates: Sequence[Update]
    ) -> float | None:
        """How far LoRA's products are from what they should be, `mean`, over all weights; None without LoRA."""
        missed, whole, modules = 0.0, 0.0, lora_modules(tunables)
        for name in modules:
            mean = self.mean(name, before, updates)
            whole += mean.norm**2
            missed += _sum([(1.0, mean), (-1.0, self._product(tunables, name))]).norm ** 2
        return math.sqrt(missed / whole) if whole else 0.0 if modules else None

    def mean(self, name: str, before: Mapping[str, Tensor], updates: Sequence[Update]) -> Product:
        """The mean of the updates' products, weighted by examples: sum w_i s_i B_i A_i, exact, of rank sum r_i.

        Of changes: each update's product with what the edge had and did not send to it.
        """
        total, terms = sum(update.num_examples for update in updates), []
        for update in updates:
            share, rank = update.num_examples / total, len(update.tunables[name + _A])
            terms.append((share, self._product(update.tunables, name)))
            if self.how == "changes" and rank < len(before[name + _A]):
                terms += [(share, self._product(before, name)), (-share, self._sent(before, name, rank))]
        return _sum(terms)

    def _sent(self, before: Mapping[str, Tensor], name: str, rank: int) -> Product:
        """The product that a cluster of a rank began with."""
        a, b = self._cut(before[name + _A], before[name + _B], rank)
        return self._product({name + _A: a, name + _B: b}, name)

    def _product(self, tunables: Mapping[str, Tensor], name: str) -> Product:
        a, b = tunables[name + _A].double(), tunables[name + _B].double()
        return Product(b * self.scale(len(a)), a)

    def _nearest(self, name: str, before: Mapping[str, Tensor], updates: Sequence[Update]) -> Tunables:
        """The factors of the edge's rank whose product is nearest to the mean (Eckart and Young 1936).

        The rows of A before are in the stack with a weight of zero: where the mean has less rank than R, A keeps
        directions to learn in, with columns of zeros in B, as LoRA begins.
        """
        a = before[name + _A]
        stacked = _sum([(1.0, self.mean(name, before, updates)), (0.0, self._product(before, name))])
        new_a, new_b = self._factors(stacked, len(a), like=a)
        return {name + _A: new_a, name + _B: new_b}

    def _cut(self, a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        scale = self.scale(len(a))
        if self.how != "factors":
            return self._factors(Product(b.double() * scale, a.double()), rank, like=a)
        return a[:rank].clone(), b[:, :rank] * (scale / self.scale(rank))

    def _factors(self, product: Product, rank: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of a rank with the nearest product. A's rows are orthogonal and as long as those of `like`.

        So A stays what an optimizer can work with, also where the product is zero; B takes the singular values.
        """
        u, singular, vt = (part.narrow(dim, 0, rank) for part, dim in zip(product.decompose(), (1, 0, 0), strict=True))
        length = float(like.double().norm()) / math.sqrt(len(like)) or 1.0
        return (length * vt).to(like.dtype), (u * (singular / (length * self.scale(rank)))).to(like.dtype)

    def _padded(self, update: Update, before: Mapping[str, Tensor], modules: Sequence[str]) -> Update:
        """The update with factors of the edge's rank: zeros where its own have nothing, and the edge's scale in B."""
        tunables = dict(update.tunables)
        for name in modules:
            a, b, rank = tunables[name + _A], tunables[name + _B], len(before[name + _A])
            missing, scale = rank - len(a), self.scale(len(a)) / self.scale(rank)
            tunables[name + _A] = torch.cat([a, a.new_zeros(missing, a.shape[1])])
            tunables[name + _B] = torch.cat([b * scale, b.new_zeros(len(b), missing)], 1)
        return replace(update, tunables=tunables)


def average(before: Mapping[str, Tensor], updates: Sequence[Update], ranks: LoraRanks | None) -> Together:
    """The mean of models of one rank, weighted by examples, as the cloud takes it over edges.

    Args:
        before: which has all names, and of which A keeps directions where the mean has fewer; see `LoraRanks`.
        ranks: how LoRA is averaged where its products are: edges have turned their factors, each in its own way.

    Raises:
        AggregationError: as `aggregate`.
    """
    if ranks is None or ranks.how == "factors":
        return Together(aggregate(updates), {})
    check_updates(updates)
    ordered = sorted(updates, key=lambda update: update.sender_id)
    return ranks.put_together(before, ordered, {}, fedavg, Aggregation())


def lora_modules(tunables: Mapping[str, Tensor]) -> list[str]:
    """The modules that have LoRA's factors."""
    return [name.removesuffix(_A) for name in tunables if name.endswith(_A)]


def _sum(terms: Sequence[tuple[float, Product]]) -> Product:
    """The weighted sum of products: that of their factors side by side."""
    left = torch.cat([weight * product.left for weight, product in terms], 1)
    return Product(left, torch.cat([product.right for _, product in terms]))


def _without(tunables: Mapping[str, Tensor], modules: Sequence[str]) -> Tunables:
    factors = {name + part for name in modules for part in (_A, _B)}
    return {name: tensor for name, tensor in tunables.items() if name not in factors}
