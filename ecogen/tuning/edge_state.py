"""What an edge knows between rounds, committed to its disk as a whole: an edge that was killed goes on from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ecogen.models.checkpoint import load_metadata, load_tensors, save_tensors
from ecogen.records import RelayRecord, RoundRecord, from_line, to_line
from ecogen.tuning.messages import Sampled

_MEMORY = "memory of the strategy: "


class Counted(NamedTuple):
    """A cluster's last attempt that is in the tunables, and how many of its attempts are."""

    attempt: int
    times: int


_NEVER = Counted(-1, 0)


@dataclass(frozen=True)
class EdgeState:
    """What an edge knows between rounds.

    Attributes:
        next_round: the round to do next.
        unsynced: examples behind the tunables where the cloud has not averaged them yet; None where nothing is due.
        record: of the round that was committed last, so that it is published even if the edge dies before.
        memory: what the strategy of aggregation keeps from round to round.
        counted: the attempts of each cluster that are in the tunables; all others never were.
        sampled: how devices drew their examples, where each is protected; of all that ever took part.
        is_untaught: whether lessons are still to be exchanged with the cloud after the last round.
        drift: how probable this edge's pairs would be without a drift of its domain, where that is why they are.
        version: which of its versions the tunables are, or were before the rounds since.
        latest: the largest version that there ever was; -1 before the first.
        lesson: the record of the last one, so that it is published even if the edge dies before.
    """

    tunables: Mapping[str, Tensor]
    next_round: int = 0
    unsynced: int | None = None
    record: RoundRecord | None = None
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    counted: Mapping[str, Counted] = field(default_factory=dict)
    is_untaught: bool = False
    drift: float | None = None
    version: int = 0
    latest: int = -1
    lesson: RelayRecord | None = None
    sampled: frozenset[Sampled] = frozenset()

    def times_counted(self, cluster_id: str) -> int:
        """How many of a cluster's attempts are in the tunables."""
        return self.counted.get(cluster_id, _NEVER).times

    def count(self, attempts: Iterable[tuple[str, int]]) -> Mapping[str, Counted]:
        """`counted` with more attempts, each a cluster and a number."""
        counted = dict(self.counted)
        for cluster_id, attempt in attempts:
            counted[cluster_id] = Counted(attempt, counted.get(cluster_id, _NEVER).times + 1)
        return counted

    def save(self, path: Path) -> None:
        """Write it atomically."""
        names = ("next_round", "unsynced", "counted", "is_untaught", "drift", "version", "latest")
        values = {name: getattr(self, name) for name in names} | {"sampled": sorted(self.sampled)}
        record, lesson = (to_line(told).decode() if told else "" for told in (self.record, self.lesson))
        tensors = {**self.tunables, **{_MEMORY + name: tensor for name, tensor in self.memory.items()}}
        save_tensors(path, tensors, {"state": json.dumps(values), "record": record, "lesson": lesson})

    @classmethod
    def load(cls, path: Path) -> EdgeState:
        """The state that `save` wrote."""
        metadata = load_metadata(path)
        record = from_line(metadata["record"]) if metadata["record"] else None
        lesson = from_line(metadata["lesson"]) if metadata.get("lesson") else None
        assert record is None or isinstance(record, RoundRecord)
        assert lesson is None or isinstance(lesson, RelayRecord)
        tensors = load_tensors(path)
        memory = {name.removeprefix(_MEMORY): tensors.pop(name) for name in [*tensors] if name.startswith(_MEMORY)}
        values = json.loads(metadata["state"])
        counted = {cluster: Counted(*numbers) for cluster, numbers in values.pop("counted", {}).items()}
        sampled = frozenset(Sampled(*numbers) for numbers in values.pop("sampled", ()))
        kept: dict[str, Any] = {"memory": memory, "counted": counted, "sampled": sampled}
        return cls(tensors, record=record, lesson=lesson, **kept, **values)
