"""Which labels an edge knows: whose examples it gets, how large its head is, and what a place in its head means.

Where edges know different labels, their heads mean different things: heads stay at the edges, and the cloud averages
the rest, as with personal heads (Arivazhagan et al. 2019, https://arxiv.org/abs/1912.00818).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ecogen.config import Data
from ecogen.errors import ConfigError
from ecogen.models.tunables import Tunables, is_head
from ecogen.tuning.data import Examples


@dataclass(frozen=True, slots=True)
class LabelSet:
    """Labels in rising order; a place in the head is a label's place among them."""

    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def keep(self, examples: Examples) -> Examples:
        """Those of these labels, in order, with places for labels."""
        known = torch.tensor(self.labels)
        kept = examples[torch.isin(examples.labels, known).nonzero().flatten()]
        return replace(kept, labels=torch.searchsorted(known, kept.labels))

    def at(self, places: Iterable[int]) -> list[int]:
        """The labels at some places."""
        return [self.labels[place] for place in places]


def label_sets(data: Data, edge_ids: Sequence[str], num_labels: int) -> dict[str, LabelSet]:
    """What each edge knows: all labels, unless the recipe says which.

    Raises:
        ConfigError: if the data set has no such label.
    """
    given = {edge_id: data.labels_of_edges.get(edge_id, range(num_labels)) for edge_id in edge_ids}
    problems = [
        f"data.labels_of_edges.{edge_id}: {max(labels)} is no label of {data.name!r}, which has 0 to {num_labels - 1}"
        for edge_id, labels in given.items()
        if max(labels) >= num_labels
    ]
    if problems:
        raise ConfigError(problems)
    return {edge_id: LabelSet(tuple(sorted(labels))) for edge_id, labels in given.items()}


def common_labels(sets: Mapping[str, LabelSet]) -> LabelSet | None:
    """What all edges know; None where they differ, and heads stay at the edges."""
    first, *others = sets.values()
    return first if all(other == first for other in others) else None


def without_heads(tunables: Mapping[str, Tensor]) -> Tunables:
    """What edges that know different labels share."""
    return {name: tensor for name, tensor in tunables.items() if not is_head(name)}
