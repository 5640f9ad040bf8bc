"""The passages of each edge: its own documents or a share of all, split once, and divided over its clusters.

Every node makes the same split from the seed. Where edges have documents of their own, no node reads another edge's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ecogen.config import Data
from ecogen.errors import DataError
from ecogen.tuning.documentation import topics_of_edges
from ecogen.tuning.documents import Document, read_documents
from ecogen.tuning.encoding import encode
from ecogen.tuning.passages import Passages

_SPLIT_KEY, _DEAL_KEY = 8, 9  # so that the same seed draws different numbers for different purposes


@dataclass(frozen=True)
class TextSplits:
    """An edge's passages, disjoint: what its devices tune on, what is chosen by, and what results are told of."""

    train: Passages
    validation: Passages
    test: Passages

    def of_cluster(self, index: int, num_clusters: int) -> Passages:
        """The training passages of one of its clusters; all of them have nearly as many."""
        return self.train.split_examples(num_clusters)[index]


def read_text(
    data: Data, edge_ids: Sequence[str], edge_id: str, tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> TextSplits:
    """An edge's passages of `length` tokens.

    Raises:
        DataError: if text is missing or damaged, or there is too little.
    """
    index = edge_ids.index(edge_id)
    if data.partition.across_edges == "domain":
        own = encode(_domain(data, edge_ids, edge_id), tokenizer, length)
    else:
        own = _dealt(encode(_all_documents(data, edge_ids), tokenizer, length), len(edge_ids), seed)[index]
    return _split(own, data, edge_id, [seed, index])


def is_here(data: Data, edge_id: str) -> bool:
    """Whether this machine has the text of an edge."""
    is_apart = data.name == "text" and data.partition.across_edges == "domain" and not data.path.startswith("hf:")
    return not is_apart or _folder(data, edge_id).is_dir()


def check_documents(data: Data, edge_ids: Sequence[str]) -> None:
    """Check that every edge's documents can be read.

    Raises:
        DataError: if not.
    """
    if data.partition.across_edges != "domain":
        _all_documents(data, edge_ids)
        return
    for edge_id in edge_ids:
        _domain(data, edge_ids, edge_id)


def check_text(splits: TextSplits, num_clusters: int, edge_id: str) -> None:
    """Check that each cluster has something to tune on.

    Raises:
        DataError: if not.
    """
    if (count := splits.train.num_examples) < num_clusters:
        raise DataError(f"{edge_id} has {count} training passages for {num_clusters} clusters; add text")


def _folder(data: Data, edge_id: str) -> Path:
    return Path(data.path).expanduser() / edge_id


def _domain(data: Data, edge_ids: Sequence[str], edge_id: str) -> list[Document]:
    """An edge's own documents."""
    if data.name == "documentation":
        return list(map(Document, topics_of_edges(edge_ids)[edge_id]))
    if data.path.startswith("hf:"):
        raise DataError(f"{data.path} has no folders of edges; set data.partition.across_edges = 'iid'")
    if not is_here(data, edge_id):
        raise DataError(
            f"there is no folder {_folder(data, edge_id)}: with data.partition.across_edges = 'domain' each edge has "
            "its own; make it, or set 'iid'"
        )
    return read_documents(str(_folder(data, edge_id)))


def _all_documents(data: Data, edge_ids: Sequence[str]) -> list[Document]:
    if data.name == "text":
        return read_documents(data.path)
    return [Document(text) for texts in topics_of_edges(edge_ids).values() for text in texts]


def _dealt(passages: Passages, num_edges: int, seed: int) -> list[Passages]:
    order = np.random.default_rng([seed, _DEAL_KEY]).permutation(len(passages))
    return [passages[np.sort(share)] for share in np.array_split(order, num_edges)]


def _split(passages: Passages, data: Data, edge_id: str, key: Sequence[int]) -> TextSplits:
    """Validation and test as many as asked for, and of the rest so many to train."""
    held_out = data.test + data.validation
    if held_out >= len(passages):
        raise DataError(
            f"{edge_id} has {len(passages)} passages; data.test {data.test} + data.validation {data.validation} leave "
            "none to tune on; lower one of them, model.context_length, or add text"
        )
    order = np.random.default_rng([*key, _SPLIT_KEY]).permutation(len(passages))
    test, validation, rest = np.split(order, [data.test, held_out])
    return TextSplits(passages[rest[: data.train]], passages[validation], passages[test])
