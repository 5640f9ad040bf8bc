"""What a federation learns, and of whose examples: classes of images, or the next token of text.

Nodes ask it for what they are to evaluate, own and answer, and do not ask which of the two it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedConfig

from ecogen.config import Recipe
from ecogen.errors import DataError
from ecogen.models.adapters import classification_config
from ecogen.models.checkpoint import Foundation
from ecogen.models.image_tokenizer import load_image_tokenizer
from ecogen.models.tokenizer import load_tokenizer
from ecogen.models.tunables import Tunables
from ecogen.topology import Topology
from ecogen.tuning.data import Examples, Indices, hide_labels, load_splits, partition_examples
from ecogen.tuning.labels import LabelSet, common_labels, label_sets, without_heads
from ecogen.tuning.pair_data import domain_at, domains_of, read_pair_passages, read_pairs
from ecogen.tuning.passages import Batch, Passages, joined
from ecogen.tuning.text import TextSplits, check_documents, check_text, is_here, read_text


class Task(Protocol):
    """What nodes ask for."""

    def config(self, foundation: Foundation, edge_id: str | None = None) -> PreTrainedConfig:
        """The whole model's configuration, of one edge or, with None, the one that all have in common."""

    def shared(self, tunables: Mapping[str, Tensor]) -> Tunables:
        """What all edges have in common of the tunables, which the cloud averages."""

    def evaluated(self, edge_id: str | None = None, domain: int = 0) -> Batch | None:
        """What an edge or, with None, the cloud is to evaluate; None where it is nothing."""

    def owned(self, node_id: str, owners: Sequence[str], domain: int = 0) -> Batch:
        """A device's own training examples, in one of its edge's domains.

        Args:
            owners: the devices of its cluster that own some, in order.
        """

    def asked(self, edge_id: str, indices: Sequence[int]) -> Batch:
        """Test examples of an edge, of the domain that it has in the end, to send through its chains.

        Raises:
            DataError: if there are no such.
        """

    def check(self) -> None:
        """Check that every cluster has something to tune on.

        Raises:
            DataError: if not.
        """


def task_of(recipe: Recipe, topology: Topology, tokenizer: Path | None) -> Task:
    """The task of a recipe; reads its data.

    Args:
        tokenizer: the folder of a text model's.

    Raises:
        DataError: if the data is missing or damaged, or there is too little.
        CheckpointError: if a text model has no tokenizer.
    """
    if not recipe.data.is_text:
        return ImageTask(recipe, topology)
    assert tokenizer is not None
    return PassageTask(recipe, topology, _reader(recipe, topology.edge_ids, tokenizer))


def check_sources(recipe: Recipe, edge_ids: Sequence[str]) -> None:
    """Check that what a model is to learn from can be read, before there is one that says in which tokens.

    Raises:
        DataError: if not.
    """
    if not recipe.data.is_pairs:
        check_documents(recipe.data, edge_ids)
        return
    size = (recipe.model.num_channels, recipe.model.image_size)
    for edge_id in edge_ids:
        for domain in range(len(domains_of(recipe.data, edge_id))):
            read_pairs(recipe.data, edge_ids, edge_id, size, recipe.seed, domain)


def _reader(recipe: Recipe, edge_ids: Sequence[str], folder: Path) -> Callable[[str, int], TextSplits]:
    """What reads an edge's passages in one of its domains, in the tokens of a model."""
    tokenizer, length = load_tokenizer(folder), recipe.model.context_length
    if recipe.data.is_pairs:
        images = load_image_tokenizer(folder)
        return lambda edge_id, domain: read_pair_passages(recipe, edge_ids, edge_id, tokenizer, images, domain)
    return lambda edge_id, _: read_text(recipe.data, edge_ids, edge_id, tokenizer, length, recipe.seed)


class ImageTask:
    """Classes of images, of which an edge may know some only.

    Raises:
        ConfigError: if the recipe names a label that the data set has not.
    """

    def __init__(self, recipe: Recipe, topology: Topology) -> None:
        self._recipe, self._topology = recipe, topology
        self._splits = load_splits(recipe.data, recipe.model.image_size, recipe.seed)
        self._labels = label_sets(recipe.data, topology.edge_ids, self._splits.num_labels)
        self._common = common_labels(self._labels)

    def config(self, foundation: Foundation, edge_id: str | None = None) -> PreTrainedConfig:
        known = self._common if edge_id is None else self._labels[edge_id]
        return classification_config(foundation, known.labels if known else range(self._splits.num_labels))

    def shared(self, tunables: Mapping[str, Tensor]) -> Tunables:
        return dict(tunables) if self._common else without_heads(tunables)

    def evaluated(self, edge_id: str | None = None, domain: int = 0) -> Examples | None:
        known = self._common if edge_id is None else self._labels[edge_id]
        split = self._recipe.evaluation.split
        if split == "none" or known is None:  # without common labels there is no head in the cloud
            return None
        return known.keep(getattr(self._splits, split))

    def owned(self, node_id: str, owners: Sequence[str], domain: int = 0) -> Examples:
        recipe, topology, owner_index = self._recipe, self._topology, owners.index(node_id)
        cluster = topology.cluster_of(node_id)
        place = topology.clusters_of(cluster.edge_id).index(cluster)
        edge_index = topology.edge_ids.index(cluster.edge_id)
        own = self._partition()[edge_index][place][owner_index :: len(owners)]
        labelled = self._labels[cluster.edge_id].keep(self._splits.train[own])
        cluster_index = list(topology.clusters).index(cluster.cluster_id)
        return hide_labels(labelled, recipe.data.labelled, [recipe.seed, cluster_index, owner_index])

    def asked(self, edge_id: str, indices: Sequence[int]) -> Examples:
        given = self._recipe.data.labels_of_edges.get(edge_id)
        test = LabelSet(tuple(sorted(given))).keep(self._splits.test) if given else self._splits.test
        return test[_checked(indices, len(test))]

    def check(self) -> None:
        self._partition()

    def _partition(self) -> list[list[Indices]]:
        counts = [len(self._topology.clusters_of(edge_id)) for edge_id in self._topology.edge_ids]
        known = [labels.labels for labels in self._labels.values()]
        recipe = self._recipe
        return partition_examples(self._splits.train.labels, recipe.data.partition, counts, recipe.seed, known)


class PassageTask:
    """The next token of passages: of text, or of images with captions.

    Args:
        read: an edge's passages in one of its domains.
    """

    def __init__(self, recipe: Recipe, topology: Topology, read: Callable[[str, int], TextSplits]) -> None:
        self._recipe, self._topology, self._edge = recipe, topology, lru_cache(maxsize=None)(read)

    def config(self, foundation: Foundation, edge_id: str | None = None) -> PreTrainedConfig:
        return foundation.config

    def shared(self, tunables: Mapping[str, Tensor]) -> Tunables:
        return dict(tunables)

    def evaluated(self, edge_id: str | None = None, domain: int = 0) -> Passages | None:
        split = self._recipe.evaluation.split
        if split == "none":
            return None
        edge_ids = self._topology.edge_ids if edge_id is None else [edge_id]
        here = [name for name in edge_ids if name == edge_id or is_here(self._recipe.data, name)]
        return joined([getattr(self._edge(name, domain), split) for name in here]) if here else None

    def owned(self, node_id: str, owners: Sequence[str], domain: int = 0) -> Passages:
        cluster = self._topology.cluster_of(node_id)
        clusters = self._topology.clusters_of(cluster.edge_id)
        own = self._edge(cluster.edge_id, domain).of_cluster(clusters.index(cluster), len(clusters))
        return own.examples(range(owners.index(node_id), own.num_examples, len(owners)))

    def asked(self, edge_id: str, indices: Sequence[int]) -> Passages:
        data, last = self._recipe.data, self._recipe.tuning.rounds - 1
        edge = self._edge(edge_id, domain_at(data, edge_id, last))
        held_out = edge.test if len(edge.test) else edge.validation
        return held_out[_checked(indices, len(held_out))]

    def check(self) -> None:
        for edge_id in self._topology.edge_ids:
            for domain in range(len(domains_of(self._recipe.data, edge_id))):
                check_text(self._edge(edge_id, domain), len(self._topology.clusters_of(edge_id)), edge_id)


def _checked(indices: Sequence[int], count: int) -> Sequence[int]:
    if not indices or max(indices) >= count:
        raise DataError(f"ask for test examples 0..{count - 1} or for files, not {list(indices)}")
    return indices
