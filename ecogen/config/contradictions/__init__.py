"""What is wrong between values of a recipe that are right by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ecogen.config.contradictions.aggregation import of_aggregation, of_feedback, of_privacy
from ecogen.config.contradictions.contradiction import Contradiction, unknown
from ecogen.config.contradictions.text import of_kind
from ecogen.config.contradictions.topology import of_cuts, of_nodes, of_pool, possible_clusters
from ecogen.config.contradictions.tunables import of_tunables
from ecogen.config.nodes import build_topology, is_unformed, pool_rows
from ecogen.config.schema import Recipe

__all__ = ["Contradiction", "contradictions"]


def contradictions(recipe: Recipe) -> Iterator[Contradiction]:
    """What is wrong between the values of a recipe; of its nodes, only once these can be told."""
    too_large = list(of_nodes(recipe.topology))
    yield from too_large
    if too_large:
        return
    parts = (_of_sizes, _of_compute, _of_data, of_kind, of_tunables, of_aggregation, of_feedback, of_privacy)
    for of_part in parts:
        yield from of_part(recipe)
    wrong = list(of_pool(recipe.topology))
    yield from wrong
    if not wrong:
        yield from _of_names(recipe)


def _of_compute(recipe: Recipe) -> Iterator[Contradiction]:
    """Weights in integers are read, never tuned."""
    places = {"compute.dtype": recipe.compute.dtype}
    places |= {f"compute.nodes.{node_id}.dtype": node.dtype for node_id, node in recipe.compute.nodes.items()}
    for place in (place for place, dtype in places.items() if dtype == "int8" and recipe.task != "serve"):
        yield Contradiction((place, "task"), f"{place}: int8 is for serving; tune in float32 or bfloat16")


def _of_names(recipe: Recipe) -> Iterator[Contradiction]:
    """Names of nodes, clusters, sites and edges that this topology has not, and what is said of those it has."""
    topology = recipe.topology
    built = build_topology(topology)
    nodes = {**built.nodes, **pool_rows(topology)}
    clusters = possible_clusters(topology) if is_unformed(topology) else built.clusters
    above = (built.cloud_id, *built.edge_ids)
    yield from of_cuts(recipe, built)
    yield from unknown("topology.devices", topology.devices, nodes)
    yield from unknown("topology.sites", topology.sites, built.sites)
    yield from unknown("compute.nodes", recipe.compute.nodes, nodes)
    yield from unknown("faults.update_factor", recipe.faults.update_factor, clusters)
    yield from unknown("tunables.cluster_ranks", recipe.tunables.cluster_ranks, clusters)
    yield from unknown("faults.slow", recipe.faults.slow, {name: name for name in nodes if name not in above})
    yield from _of_labels(recipe, built.edge_ids)


def _of_sizes(recipe: Recipe) -> Iterator[Contradiction]:
    for part, whole in (("model.patch_size", "model.image_size"), ("model.num_heads", "model.hidden_size")):
        if (value := _value(recipe, whole)) % _value(recipe, part):
            text = f"{part}: {_value(recipe, part)} does not divide {whole} {value}"
            yield Contradiction((part, whole), text)
    pairs = [("tuning.microbatches", "tuning.batch_size"), ("tunables.first_block", "model.num_blocks")]
    if not recipe.topology.pool:
        pairs.append(("data.owners", "topology.devices_per_cluster"))
    for less, more in pairs:
        if _value(recipe, less) > _value(recipe, more):
            text = f"{less}: {_value(recipe, less)} is more than {more} {_value(recipe, more)}"
            yield Contradiction((less, more), text)


def _of_labels(recipe: Recipe, edge_ids: Sequence[str]) -> Iterator[Contradiction]:
    given = recipe.data.labels_of_edges
    yield from unknown("data.labels_of_edges", given, dict.fromkeys(edge_ids))
    for name, labels in given.items():
        if len(set(labels)) < len(labels):
            text = f"data.labels_of_edges.{name}: a label stands there twice; give each once"
            yield Contradiction(("data.labels_of_edges",), text)
    if given and not recipe.tunables.head:
        text = "tunables.head: a head for chosen labels has to be tuned; set it to true, or drop data.labels_of_edges"
        yield Contradiction(("tunables.head", "data.labels_of_edges"), text)


def _of_data(recipe: Recipe) -> Iterator[Contradiction]:
    if recipe.evaluation.split == "validation" and not recipe.data.validation:
        text = "evaluation.split: 'validation' has no examples; set data.validation above 0, or choose 'test'"
        yield Contradiction(("evaluation.split", "data.validation"), text)
    yield from unknown("data.sources", recipe.data.sources, dict.fromkeys(build_topology(recipe.topology).edge_ids))
    if recipe.data.name != "digits":
        return
    if recipe.data.path:
        text = f"data.path: digits come with scikit-learn, not from {recipe.data.path!r}; set data.name or leave it out"
        yield Contradiction(("data.path", "data.name"), text)
    if recipe.pretraining.corpus == "data":
        text = "pretraining.corpus: 'data' needs a data set with images that no device owns, such as mnist, not digits"
        yield Contradiction(("pretraining.corpus", "data.name"), text)


def _value(recipe: Recipe, place: str) -> int:
    section, _, key = place.partition(".")
    return int(getattr(getattr(recipe, section), key))
