"""What putting updates together contradicts: the number of clusters, the strategy, privacy and what travels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from ecogen.config.contradictions.contradiction import Contradiction
from ecogen.config.contradictions.examples import of_examples
from ecogen.config.nodes import cluster_counts
from ecogen.config.schema import BESIDE_FAULTY, Recipe

_MORE_THAN_ONE = "one cluster may have several updates in a buffer, and so outvote the others"
_UNBUFFERED = {
    **dict.fromkeys(("median", "trimmed_mean", "multi_krum"), _MORE_THAN_ONE),
    "scaffold": "a cluster begins its next attempt before its control variate of the last one is committed",
}
"""Strategies that need all clusters' updates of the same round, and why."""

_WITHOUT_RATE = ("median", "trimmed_mean", "multi_krum")
"""Strategies that take no server's step."""

_OF_THE_MEAN = ("fedavg", "fedadam", "fedyogi")
"""Strategies that need no more of a round than the mean change."""


_LEAST_NOISE = 1e-9
"""Far below any that protects; with much less the accountant runs out of numbers."""


def of_aggregation(recipe: Recipe) -> Iterator[Contradiction]:
    """What the strategy, the buffer and the number of clusters contradict."""
    if counts := cluster_counts(recipe.topology):
        yield from _of_counts(recipe, min(counts))
    if recipe.aggregation.buffer:
        yield from _of_buffer(recipe)


def _of_counts(recipe: Recipe, fewest: int) -> Iterator[Contradiction]:
    aggregation = recipe.aggregation
    places = ("topology.clusters_per_edge", "topology.clusters", "topology.pool", "aggregation.strategy")
    beside = BESIDE_FAULTY.get(aggregation.strategy)
    needed = 0 if beside is None else 2 * aggregation.faulty + beside
    if needed > fewest:
        text = (
            f"aggregation.faulty: {aggregation.strategy} tolerates {aggregation.faulty} among {needed} clusters of an "
            f"edge or more, not among {fewest}"
        )
        yield Contradiction(("aggregation.faulty", *places), text)
    if aggregation.server_rate and aggregation.strategy in _WITHOUT_RATE:
        text = f"aggregation.server_rate: {aggregation.strategy} has none; set it to 0, or choose another strategy"
        yield Contradiction(("aggregation.server_rate", "aggregation.strategy"), text)
    if aggregation.buffer > fewest:
        text = f"aggregation.buffer: {aggregation.buffer} is more than an edge's {fewest} clusters"
        yield Contradiction(("aggregation.buffer", *places), text)


def _of_buffer(recipe: Recipe) -> Iterator[Contradiction]:
    place, aggregation = "aggregation.buffer", recipe.aggregation
    if reason := _UNBUFFERED.get(aggregation.strategy):
        text = f"{place}: {aggregation.strategy} needs 0, not {aggregation.buffer}: {reason}"
        yield Contradiction((place, "aggregation.strategy"), text)
    drawing = {
        "tuning.participation": recipe.tuning.participation < 1,
        "privacy.noise_multiplier": recipe.privacy.protects_clusters,
    }
    for other in (other for other, is_drawing in drawing.items() if is_drawing):
        text = f"{place}: {other} draws who takes part in a round, and with a buffer who is quickest does"
        yield Contradiction((place, other), f"{text}; set one of them to its default")


def of_feedback(recipe: Recipe) -> Iterator[Contradiction]:
    """Where what rounding left of one change does not belong to the next."""
    if recipe.wire.updates == "float32":
        return
    rest = f"wire.updates: what {recipe.wire.updates} leaves of a change is added to the next one, but"
    if recipe.aggregation.buffer:
        text = f"{rest} with aggregation.buffer that begins before this one is counted; set one of them to its default"
        yield Contradiction(("wire.updates", "aggregation.buffer"), text)
    if takes_products(recipe):
        text = f"{rest} averaging LoRA's products turns its factors in between; set aggregation.lora = 'factors'"
        yield Contradiction(("wire.updates", "aggregation.lora", "tunables.cluster_ranks"), f"{text}, or 'float32'")


def of_privacy(recipe: Recipe) -> Iterator[Contradiction]:
    """What would break the guarantee, or make it mean nothing."""
    noise = recipe.privacy.noise_multiplier
    if not noise:
        return
    if noise < _LEAST_NOISE:
        text = f"privacy.noise_multiplier: {noise:g} protects nobody; set {_LEAST_NOISE:g} or more, or 0"
        yield Contradiction(("privacy.noise_multiplier",), text)
    yield from _of_clusters(recipe) if recipe.privacy.unit == "cluster" else of_examples(recipe)


def _of_clusters(recipe: Recipe) -> Iterator[Contradiction]:
    strategy, delta = recipe.aggregation.strategy, recipe.privacy.delta
    clusters = max(cluster_counts(recipe.topology), default=0)
    if strategy not in _OF_THE_MEAN:
        text = (
            f"aggregation.strategy: {strategy!r} wants each cluster's own update, but with privacy.noise_multiplier "
            f"nobody is shown more than their noised sum; choose one of {', '.join(_OF_THE_MEAN)}"
        )
        yield Contradiction(("aggregation.strategy", "privacy.noise_multiplier"), text)
    if recipe.tunables.cluster_ranks or takes_products(recipe):
        text = "aggregation.lora: products of LoRA are each cluster's own, and nobody is shown more than a noised sum"
        yield Contradiction(("aggregation.lora", "tunables.cluster_ranks", "privacy.noise_multiplier"), text)
    if delta * clusters >= 1:
        text = (
            f"privacy.delta: {delta:g} is not below 1 / clusters of an edge = {1 / clusters:g}: "
            f"telling all about one cluster in {1 / delta:g} would count as private; set a smaller one"
        )
        yield Contradiction(("privacy.delta", "topology.clusters_per_edge", "privacy.noise_multiplier"), text)


def takes_products(recipe: Recipe) -> bool:
    """Whether edges average LoRA's products rather than its factors."""
    return lora_averaging(recipe) != "factors"


def lora_averaging(recipe: Recipe) -> Literal["factors", "products", "changes"]:
    """What edges average of LoRA."""
    how = recipe.aggregation.lora
    if how == "auto":
        return "changes" if recipe.tunables.cluster_ranks else "factors"
    return how
