"""How an edge makes one set of tunables of its clusters' updates. A strategy is a function; yours may be one too.

A package offers its own under the entry point group `ecogen.strategies`; a recipe names it as `aggregation.strategy`.

Shapes: n updates of tunables w_i with k_i examples; w are the tunables that the round began with.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Protocol

import torch
from torch import Tensor

from ecogen.config import BESIDE_FAULTY, Aggregation
from ecogen.errors import ConfigError
from ecogen.models.tunables import Tunables
from ecogen.tuning.aggregate import Update, aggregate, check_updates
from ecogen.tuning.messages import CONTROL

logger = logging.getLogger(__name__)

GROUP = "ecogen.strategies"

_EXAMPLES = "examples of "


class Strategy(Protocol):
    """Makes the tunables that the next round begins with."""

    def __call__(
        self, before: Mapping[str, Tensor], updates: Sequence[Update], memory: Mapping[str, Tensor], spec: Aggregation
    ) -> tuple[Tunables, Tunables]:
        """The tunables after the round, and what the strategy wants to be given in the next one.

        Args:
            before: what the round began with.
            updates: one a cluster that finished, in the order of their names.
            memory: what it returned after the round before; empty in the first. Committed with the round.

        Raises:
            AggregationError: if the updates cannot be put together.
        """


def strategy_of(spec: Aggregation) -> Strategy:
    """The strategy of a recipe.

    Raises:
        ConfigError: if there is none of that name; it lists the closest.
    """
    if spec.strategy in STRATEGIES:
        return STRATEGIES[spec.strategy]
    offered = {point.name: point for point in entry_points(group=GROUP)}
    if spec.strategy in offered:
        strategy: Strategy = offered[spec.strategy].load()
        return strategy
    known = [*STRATEGIES, *offered]
    close = difflib.get_close_matches(spec.strategy, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
    raise ConfigError([f"aggregation.strategy: {spec.strategy!r} is no strategy; {hint}"])


def fedavg(
    before: Mapping[str, Tensor], updates: Sequence[Update], memory: Mapping[str, Tensor], spec: Aggregation
) -> tuple[Tunables, Tunables]:
    """The mean, weighted by examples: McMahan et al. 2017, Algorithm 1, https://arxiv.org/abs/1602.05629

    With a server rate other than 1 it is gone towards by so much: w + rate (mean(w_i) - w), Reddi et al. 2021's FedAvg.
    """
    return _towards(before, aggregate(updates), spec), {}


def median(
    before: Mapping[str, Tensor], updates: Sequence[Update], memory: Mapping[str, Tensor], spec: Aggregation
) -> tuple[Tunables, Tunables]:
    """The median of each coordinate, without weights: Yin et al. 2018, definition 1, https://arxiv.org/abs/1803.01498

    Of an even number it is the mean of the two in the middle.
    """
    return _by_coordinate(updates, lambda stacked: stacked.quantile(0.5, dim=0)), {}


def trimmed_mean(
    before: Mapping[str, Tensor], updates: Sequence[Update], memory: Mapping[str, Tensor], spec: Aggregation
) -> tuple[Tunables, Tunables]:
    """The mean of each coordinate without its `faulty` largest and smallest values: Yin et al. 2018, definition 2."""
    trimmed = _tolerated(spec, len(updates), "trimmed_mean")

    def mean(stacked: Tensor) -> Tensor:
        return stacked.sort(dim=0).values[trimmed : len(updates) - trimmed].mean(dim=0)

    return _by_coordinate(updates, mean), {}


def multi_krum(
    before: Mapping[str, Tensor], updates: Sequence[Update], memory: Mapping[str, Tensor], spec: Aggregation
) -> tuple[Tunables, Tunables]:
    """The mean of the n - f updates that lie closest to their neighbours: Blanchard et al. 2017, section 4,
    https://arxiv.org/abs/1703.02757. An update's score is the sum of its squared distances to the n - f - 2 nearest.
    """
    check_updates(updates)
    faulty = _tolerated(spec, len(updates), "multi_krum")
    flat = torch.stack([torch.cat([update.tunables[n].double().flatten() for n in before]) for update in updates])
    distances = torch.cdist(flat, flat).square().fill_diagonal_(torch.inf)
    num_near = max(1, len(updates) - faulty - 2)
    scores = distances.sort(dim=1).values[:, : min(num_near, len(updates) - 1)].sum(dim=1)
    chosen = scores.argsort(stable=True)[: len(updates) - faulty].sort().values
    return aggregate([updates[index] for index in chosen.tolist()]), {}


def fedadam(
    before: Mapping[str, Tensor], updates: Sequence[Update], memory: Mapping[str, Tensor], spec: Aggregation
) -> tuple[Tunables, Tunables]:
    """Adam on the server: Reddi et al. 2021, Algorithm 2, https://arxiv.org/abs/2003.00295"""
    return _adaptive(before, updates, memory, spec, lambda v, d: spec.beta_2 * v + (1 - spec.beta_2) * d.square())


def fedyogi(
    before: Mapping[str, Tensor], updates: Sequence[Update], memory: Mapping[str, Tensor], spec: Aggregation
) -> tuple[Tunables, Tunables]:
    """Yogi on the server: Reddi et al. 2021, Algorithm 2."""
    return _adaptive(
        before, updates, memory, spec, lambda v, d: v - (1 - spec.beta_2) * d.square() * (v - d.square()).sign()
    )


def scaffold(
    before: Mapping[str, Tensor], updates: Sequence[Update], memory: Mapping[str, Tensor], spec: Aggregation
) -> tuple[Tunables, Tunables]:
    """SCAFFOLD's server: Karimireddy et al. 2020, Algorithm 1, https://arxiv.org/abs/1910.06378

    x <- x + rate mean(w_i - x); c <- c + sum_i k_i dc_i / k. Clusters weigh as their examples k_i (the paper's weigh
    alike), and k are the examples of all that have answered so far: so c stays the mean of all c_i.
    """
    known = {name: float(tensor) for name, tensor in memory.items() if name.startswith(_EXAMPLES)}
    told = {_EXAMPLES + update.sender_id: float(update.num_examples) for update in updates}
    known_examples, total = sum(known.values()), sum((known | told).values())
    controls: Tunables = {}
    for name, value in before.items():
        c = memory.get(CONTROL + name, torch.zeros(value.shape, dtype=torch.float64)) * known_examples
        for update in updates:
            c = c + update.num_examples * update.control_change[name].double()
        controls[CONTROL + name] = c / total
    counts = {name: torch.tensor(count, dtype=torch.float64) for name, count in (known | told).items()}
    return _towards(before, aggregate(updates), spec), controls | counts


STRATEGIES: Mapping[str, Strategy] = {
    "fedavg": fedavg,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "multi_krum": multi_krum,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "scaffold": scaffold,
}


def _towards(before: Mapping[str, Tensor], mean: Tunables, spec: Aggregation) -> Tunables:
    rate = spec.server_rate or 1.0
    return mean if rate == 1 else {name: torch.lerp(before[name], mean[name], rate) for name in mean}


def _adaptive(
    before: Mapping[str, Tensor],
    updates: Sequence[Update],
    memory: Mapping[str, Tensor],
    spec: Aggregation,
    second_moment: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tunables, Tunables]:
    """d = mean(w_i) - w; m <- b1 m + (1 - b1) d; v as given, from tau^2; w <- w + rate m / (sqrt(v) + tau)."""
    after: Tunables = {}
    moments: Tunables = {}
    rate = spec.server_rate or 0.01
    for name, mean in aggregate(updates).items():
        value = before[name].double()
        change = mean.double() - value
        m = spec.beta_1 * memory.get(f"m:{name}", torch.zeros(())) + (1 - spec.beta_1) * change
        v = second_moment(memory.get(f"v:{name}", torch.full_like(change, spec.tau**2)), change)
        after[name] = (value + rate * m / (v.sqrt() + spec.tau)).to(before[name].dtype)
        moments |= {f"m:{name}": m, f"v:{name}": v}
    return after, moments


def _by_coordinate(updates: Sequence[Update], reduce: Callable[[Tensor], Tensor]) -> Tunables:
    """Each coordinate reduced over the updates, in double precision."""
    check_updates(updates)
    names = updates[0].tunables
    return {
        name: reduce(torch.stack([update.tunables[name].double() for update in updates])).to(names[name].dtype)
        for name in names
    }


def _tolerated(spec: Aggregation, num_updates: int, strategy: str) -> int:
    """How many faulty updates the formula is given: fewer than asked for where too many clusters are missing."""
    most = (num_updates - BESIDE_FAULTY[strategy]) // 2
    if spec.faulty > most:
        logger.warning(
            "%d updates cannot tolerate %d faulty ones; tolerating %d", num_updates, spec.faulty, max(0, most)
        )
    return max(0, min(spec.faulty, most))
