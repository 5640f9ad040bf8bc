"""What is wrong with a recipe, all of it at once, each problem with its place, its value and the nearest valid one."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ecogen.config.contradictions import Contradiction, of_tunables, takes_products
from ecogen.config.nodes import build_topology, cluster_counts, edge_ids, is_unformed, pool_rows
from ecogen.config.schema import Recipe, TopologyRecipe
from ecogen.topology import Topology

Place = tuple[str, ...]

_WORDS = {
    "dataclass_type": "input should be a section",
    "dict_type": "input should be a section",
    "tuple_type": "input should be a list",
    "too_short": "list has too few values",
    "int_parsing": "input should be a whole number",
    "int_from_float": "input should be a whole number",
    "bool_parsing": "input should be true or false",
    "bool_type": "input should be true or false",
}
"""What the types of pydantic's problems are called here, where its own words are those of Python."""

_MORE_THAN_ONE = "one cluster may have several updates in a buffer, and so outvote the others"
_UNBUFFERED = {
    **dict.fromkeys(("median", "trimmed_mean", "multi_krum"), _MORE_THAN_ONE),
    "scaffold": "a cluster begins its next attempt before its control variate of the last one is committed",
}
"""Strategies that need all clusters' updates of the same round, and why."""

PRIVATE_STRATEGIES = ("fedavg", "fedadam", "fedyogi")
"""Strategies of aggregation that need no more of a round than the mean change."""

MAX_NODES = 1_000_000
"""Of a topology, and so what a recipe can ask a machine to hold."""

_DEPTH = 8  # of nested sections, of which each may go for want of a value in it


def problems_of(table: Mapping[str, Any], error: ValidationError) -> list[str]:
    """What a table that could not be read has wrong: every value by itself, and what the others contradict."""
    problems = explain(error)
    recipe, dropped = _readable_part(table, error)
    told = tuple(f"{place}." for place in dropped)
    return problems + [
        contradiction.text
        for contradiction in contradictions(recipe)
        if not any(f"{place}.".startswith(told) for place in contradiction.places)
    ]


def explain(error: ValidationError, section: Any = Recipe, *, within: Place = ()) -> list[str]:
    """Each of pydantic's problems with a section in a sentence; those of a union's branches in one.

    Args:
        within: where the section is.
    """
    found: dict[Place, list[Any]] = {}
    for problem in error.errors():
        found.setdefault(_place(problem), []).append(problem)
    # A branch that got further is the one that was meant.
    meant = [place for place in found if not any(other != place and other[: len(place)] == place for other in found)]
    return [_sentence(place, found[place], section, within) for place in meant]


def contradictions(recipe: Recipe) -> Iterator[Contradiction]:
    """What is wrong between values that are right by themselves."""
    too_large = list(_of_nodes(recipe.topology))
    yield from too_large
    if too_large:
        return
    yield from _of_sizes(recipe)
    yield from _of_aggregation(recipe)
    yield from _of_feedback(recipe)
    yield from _of_data(recipe)
    topology = recipe.topology
    yield from of_tunables(recipe)
    wrong = list(_of_pool(topology))
    yield from wrong
    if wrong:
        return
    built = build_topology(topology)
    nodes = {**built.nodes, **pool_rows(topology)}
    clusters = _possible_clusters(topology) if is_unformed(topology) else built.clusters
    yield from _of_cuts(recipe, built)
    yield from _unknown("topology.devices", topology.devices, nodes)
    yield from _unknown("topology.sites", topology.sites, built.sites)
    yield from _unknown("compute.nodes", recipe.compute.nodes, nodes)
    yield from _unknown("faults.update_factor", recipe.faults.update_factor, clusters)
    yield from _unknown("tunables.cluster_ranks", recipe.tunables.cluster_ranks, clusters)
    above = (built.cloud_id, *built.edge_ids)
    yield from _unknown("faults.slow", recipe.faults.slow, {name: name for name in nodes if name not in above})
    yield from _of_privacy(recipe)
    yield from _of_labels(recipe, built.edge_ids)


def _of_aggregation(recipe: Recipe) -> Iterator[Contradiction]:
    aggregation = recipe.aggregation
    reason = _UNBUFFERED.get(aggregation.strategy)
    if aggregation.buffer and reason:
        text = f"aggregation.buffer: {aggregation.strategy} needs 0, not {aggregation.buffer}: {reason}"
        yield Contradiction(("aggregation.buffer", "aggregation.strategy"), text)
    fewest = min(cluster_counts(recipe.topology), default=aggregation.buffer + aggregation.faulty + 1)
    places = ("topology.clusters_per_edge", "topology.clusters", "aggregation.strategy")
    if aggregation.strategy in ("trimmed_mean", "multi_krum") and aggregation.faulty >= fewest:
        text = f"aggregation.faulty: {aggregation.faulty} of an edge's {fewest} clusters leave none to trust"
        yield Contradiction(("aggregation.faulty", *places), text)
    if aggregation.buffer > fewest:
        text = f"aggregation.buffer: {aggregation.buffer} is more than an edge's {fewest} clusters"
        yield Contradiction(("aggregation.buffer", *places), text)
    for place, is_there in (
        ("tuning.participation", recipe.tuning.participation < 1),
        ("privacy.noise_multiplier", recipe.privacy.noise_multiplier > 0),
    ):
        if aggregation.buffer and is_there:
            text = (
                f"aggregation.buffer: {place} draws who takes part in a round, and with a buffer who is quickest does"
            )
            yield Contradiction(("aggregation.buffer", place), f"{text}; set one of them to its default")


def _of_feedback(recipe: Recipe) -> Iterator[Contradiction]:
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


def _readable_part(table: Mapping[str, Any], error: ValidationError) -> tuple[Recipe, set[str]]:
    """The recipe without what is wrong by itself, and the places of that."""
    dropped: set[str] = set()
    for _ in range(_DEPTH):
        # What lacks a value that has no default goes as a whole.
        wrong = [_place(problem)[: -1 if problem["type"] == "missing" else None] for problem in error.errors()]
        dropped |= {".".join(place) for place in wrong}
        table = _without(table, wrong)
        try:
            return TypeAdapter(Recipe).validate_python(table), dropped
        except ValidationError as next_error:
            error = next_error
    return Recipe(), dropped


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


def _of_nodes(topology: TopologyRecipe) -> Iterator[Contradiction]:
    """More nodes than a topology may have."""
    per_edge = topology.clusters_per_edge
    devices = topology.edges * topology.devices_per_cluster * (1 if per_edge == "auto" else per_edge)
    names = ["topology.edges", "topology.clusters_per_edge", "topology.devices_per_cluster"]
    if topology.pool:
        names, devices = ["topology.pool"], sum(row.count for row in topology.pool)
    total = max(devices, topology.edges)
    if total > MAX_NODES:
        yield Contradiction(
            tuple(names), f"{', '.join(names)}: {total} nodes are more than the {MAX_NODES} there may be"
        )


def _of_pool(topology: TopologyRecipe) -> Iterator[Contradiction]:
    """Rows of unknown edges, edges without enough devices, and clusters of other devices than the pool's."""
    if not topology.pool:
        if topology.clusters_per_edge == "auto":
            text = "topology.clusters_per_edge: 'auto' forms clusters of a pool; give topology.pool, or a number"
            yield Contradiction(("topology.clusters_per_edge", "topology.pool"), text)
        if topology.clusters:
            text = "topology.clusters: names devices of a pool; give topology.pool, or leave it out"
            yield Contradiction(("topology.clusters", "topology.pool"), text)
        return
    edges, places = edge_ids(topology), ("topology.edges", "topology.pool", "topology.clusters")
    for index, row in enumerate(topology.pool):
        if row.edge not in edges:
            text = f"topology.pool.{index}.edge: no edge {row.edge!r} in this topology; valid: {', '.join(edges)}"
            yield Contradiction(places, text)
    yield from _of_clusters(topology) if topology.clusters else _too_few(topology)


def _too_few(topology: TopologyRecipe) -> Iterator[Contradiction]:
    """Edges with fewer devices than clusters."""
    wanted = 1 if topology.clusters_per_edge == "auto" else topology.clusters_per_edge
    for edge in edge_ids(topology):
        count = sum(row.count for row in topology.pool if row.edge == edge)
        if count < wanted:
            text = f"topology.pool: {edge} has {count} devices for {wanted} clusters; add devices, or ask for fewer"
            yield Contradiction(("topology.edges", "topology.pool", "topology.clusters_per_edge"), text)


def _of_clusters(topology: TopologyRecipe) -> Iterator[Contradiction]:
    """Clusters that are no edge's, or hold devices that are not there or in another one too."""
    places, pool = ("topology.clusters", "topology.pool", "topology.edges"), pool_rows(topology)
    named: list[str] = []
    for cluster_id, node_ids in topology.clusters.items():
        at, (edge, _, number) = f"topology.clusters.{cluster_id}", cluster_id.partition(".cluster-")
        if edge not in edge_ids(topology) or not number.isdigit():
            yield Contradiction(places, f"{at}: a cluster is named after its edge, such as 'edge-0.cluster-0'")
            continue
        if not node_ids:
            yield Contradiction(places, f"{at}: has no device; name one or more of the pool")
        own = [node_id for node_id in pool if node_id.startswith(f"{edge}.")]
        for node_id in node_ids:
            if node_id not in own:
                close = difflib.get_close_matches(node_id, own, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                yield Contradiction(places, f"{at}: no device {node_id!r} in the pool of {edge!r}{hint}")
            if node_id in named:
                yield Contradiction(places, f"{at}: {node_id!r} is named twice; a device is in one cluster")
            named.append(node_id)
    for edge in edge_ids(topology):
        if not any(name.startswith(f"{edge}.") for name in topology.clusters):
            yield Contradiction(places, f"topology.clusters: {edge} has none; each edge has at least one")


def _possible_clusters(topology: TopologyRecipe) -> dict[str, None]:
    """The ids that clusters formed of the pool may have."""
    sizes = {edge: sum(row.count for row in topology.pool if row.edge == edge) for edge in edge_ids(topology)}
    count = topology.clusters_per_edge
    return {
        f"{edge}.cluster-{index}": None
        for edge, size in sizes.items()
        for index in range(size if count == "auto" else count)
    }


def _of_cuts(recipe: Recipe, built: Topology) -> Iterator[Contradiction]:
    """Cuts where clusters have yet to be formed, of no cluster, or as many as do not divide it."""
    placement, places = recipe.placement, ("placement.cuts_of", "placement.cuts", "topology.pool")
    if is_unformed(recipe.topology):
        if placement.cuts != "auto" or placement.cuts_of:
            name = "cuts" if placement.cuts != "auto" else "cuts_of"
            text = f"placement.{name}: forming clusters chooses their cuts; leave it out, or say topology.clusters too"
            yield Contradiction(places, text)
        return
    yield from _unknown("placement.cuts_of", placement.cuts_of, built.clusters)
    for cluster_id, cuts in placement.cuts_of.items():
        devices = len(built.clusters[cluster_id].node_ids) if cluster_id in built.clusters else len(cuts) + 1
        if len(cuts) != devices - 1 or any(a >= b for a, b in pairwise(cuts)):
            text = f"placement.cuts_of.{cluster_id}: {list(cuts)} does not divide the model over {devices} devices; "
            text += f"give {devices - 1} rising cut{'s' * (devices != 2)}"
            yield Contradiction((*places, "topology.devices_per_cluster"), text)


def _of_privacy(recipe: Recipe) -> Iterator[Contradiction]:
    """What would break the guarantee, or make it mean nothing."""
    if not recipe.privacy.noise_multiplier:
        return
    strategy, delta = recipe.aggregation.strategy, recipe.privacy.delta
    clusters = max(cluster_counts(recipe.topology), default=0)
    if strategy not in PRIVATE_STRATEGIES:
        text = (
            f"aggregation.strategy: {strategy!r} wants each cluster's own update, but with privacy.noise_multiplier "
            f"nobody is shown more than their noised sum; choose one of {', '.join(PRIVATE_STRATEGIES)}"
        )
        yield Contradiction(("aggregation.strategy", "privacy.noise_multiplier"), text)
    if recipe.tunables.cluster_ranks or takes_products(recipe):
        text = "aggregation.lora: products of LoRA are each cluster's own, and nobody is shown more than a noised sum"
        yield Contradiction(("aggregation.lora", "tunables.cluster_ranks", "privacy.noise_multiplier"), text)
    if delta * clusters >= 1:
        text = (
            f"privacy.delta: {delta:g} is not below 1 / clusters of an edge = {1 / clusters:g}: "
            f"telling all about one cluster in {1 / delta:g} would count as private"
        )
        yield Contradiction(("privacy.delta", "topology.clusters_per_edge", "privacy.noise_multiplier"), text)


def _of_labels(recipe: Recipe, edge_ids: Sequence[str]) -> Iterator[Contradiction]:
    given = recipe.data.labels_of_edges
    yield from _unknown("data.labels_of_edges", given, dict.fromkeys(edge_ids))
    for name, labels in given.items():
        if len(set(labels)) < len(labels):
            yield Contradiction(("data.labels_of_edges",), f"data.labels_of_edges.{name}: a label stands there twice")
    if given and not recipe.tunables.head:
        text = "tunables.head: a head for chosen labels has to be tuned; set it to true, or drop data.labels_of_edges"
        yield Contradiction(("tunables.head", "data.labels_of_edges"), text)


def _of_data(recipe: Recipe) -> Iterator[Contradiction]:
    if recipe.data.name != "digits":
        return
    if recipe.data.path:
        text = f"data.path: digits come with scikit-learn, not from {recipe.data.path!r}; set data.name or leave it out"
        yield Contradiction(("data.path", "data.name"), text)
    if recipe.pretraining.corpus == "data":
        text = "pretraining.corpus: 'data' needs a data set with images that no device owns, such as mnist, not digits"
        yield Contradiction(("pretraining.corpus", "data.name"), text)


def _unknown(place: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[Contradiction]:
    counts = ("topology.edges", "topology.clusters_per_edge", "topology.devices_per_cluster")
    for name in sorted(given.keys() - known.keys()):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(list(known)[:6])}, ..."
        yield Contradiction(counts, f"{place}.{name}: no such name in this topology; {hint}")


def _value(recipe: Recipe, place: str) -> int:
    section, _, key = place.partition(".")
    return int(getattr(getattr(recipe, section), key))


def _sentence(place: Place, problems: Sequence[Any], section: Any, within: Place) -> str:
    """One problem, or what each branch of a union has against the same value."""
    kind, at, key = problems[0]["type"], ".".join((*within, *place)) or "the whole", place[-1] if place else ""
    if kind == "missing":
        return f"{at}: is required"
    is_unknown = kind == "unexpected_keyword_argument"
    names = [name for name in _keys_at(section, place[:-1]) if name != key]
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5 if is_unknown else 0.8)
    hint = f"did you mean {close[0]!r}?" if close else f"valid keys: {', '.join(names)}"
    if is_unknown:
        return f"{at}: unknown key; {hint}"
    first, *others = (_WORDS.get(problem["type"], problem["msg"]) for problem in problems)
    text = " or ".join([first, *(other.removeprefix("input should be ") for other in others)])
    sentence = f"{at}: {text[0].lower()}{text[1:]}, not {problems[0]['input']!r}"
    return f"{sentence}; {hint}" if kind == "dataclass_type" and close else sentence


def _place(problem: Any) -> Place:
    """Where a problem is; pydantic names the branch of a union too, which people do not want to read."""
    return tuple(str(part) for part in problem["loc"] if not _is_branch(part))


def _is_branch(part: Any) -> bool:
    return isinstance(part, str) and part.startswith(("literal[", "tuple["))


def _without(table: Mapping[str, Any], places: Sequence[Place]) -> dict[str, Any]:
    """A copy that says nothing at those places; of a list, nothing at all."""
    rest = copy.deepcopy(dict(table))
    for place in places:
        section: Any = rest
        for index, part in enumerate(place):
            if not isinstance(section.get(part), dict) or index == len(place) - 1:
                section.pop(part, None)
                break
            section = section[part]
    return rest


def _keys_at(section: Any, path: Sequence[Any]) -> list[str]:
    """The valid keys of the section at `path` in another."""
    for part in path:
        if dataclasses.is_dataclass(section):
            section = typing.get_type_hints(section).get(str(part))
        elif typing.get_origin(section) is not None:
            section = typing.get_args(section)[0 if typing.get_origin(section) is tuple else -1]
    return [f.name for f in dataclasses.fields(section)] if dataclasses.is_dataclass(section) else []
