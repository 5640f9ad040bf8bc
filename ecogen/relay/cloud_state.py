"""What the cloud knows between lessons, committed to its disk as a whole: a cloud that was killed goes on from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from torch import Tensor

from ecogen.models.checkpoint import load_metadata, load_tensors, save_tensors
from ecogen.models.tunables import Tunables
from ecogen.records import RelayRecord, from_line, to_line
from ecogen.relay.samples import CODES, SHOWN, Captions, Samples
from ecogen.relay.teacher import Lesson
from ecogen.relay.versions import Version

_LESSON = "lesson: "


class Remembered(NamedTuple):
    """What an edge taught: of each caption the last that was accepted, and the cycle of the last of these lessons."""

    samples: Samples
    cycle: int


@dataclass(frozen=True)
class RelayState:
    """What the cloud knows after its last lesson.

    Attributes:
        number: of that lesson's cycle, in the order in which they were closed; -1 before the first.
        cycle: of the schedule, that was closed last; -1 before the first.
        alone: by edge, the round after which it was last taught alone, since its domain had drifted.
        version: of the tunables; 0 is the model that was delivered.
        latest: the largest version there ever was, which after a rollback is another.
        lesson: what it drew for the edges then; None before the first, and after a rollback.
        taught: by edge.
        record: of the last lesson, so that it is published even if the cloud dies before.
    """

    tunables: Tunables
    number: int = -1
    cycle: int = -1
    alone: Mapping[str, int] = field(default_factory=dict)
    version: int = 0
    latest: int = 0
    lesson: Lesson | None = None
    taught: Mapping[str, Remembered] = field(default_factory=dict)
    record: RelayRecord | None = None

    def back_to(self, version: Version, tunables: Tunables) -> RelayState:
        """The state that goes on from an earlier version; what was taught since then is forgotten."""
        last = -1 if version.cycle is None else version.cycle
        taught = {edge: own for edge, own in self.taught.items() if own.cycle <= last}
        return replace(self, tunables=tunables, version=version.number, lesson=None, taught=taught)

    def save(self, path: Path) -> None:
        """Write it atomically."""
        facts: dict[str, Any] = {name: getattr(self, name) for name in ("number", "cycle", "version", "latest")}
        facts["alone"], tensors = dict(self.alone), dict(self.tunables)
        if self.lesson is not None:
            body, own = self.lesson.samples.packed()
            tensors |= _named(_LESSON, own)
            facts |= {"num_drawn": self.lesson.num_drawn, "captions": msgspec.to_builtins(body)}
        facts["taught"] = {}
        for edge, (samples, cycle) in self.taught.items():
            body, own = samples.packed()
            tensors |= _named(_of(edge), own)
            facts["taught"][edge] = {"cycle": cycle, "captions": msgspec.to_builtins(body)}
        record = to_line(self.record).decode() if self.record else ""
        save_tensors(path, tensors, {"state": json.dumps(facts), "record": record})

    @classmethod
    def load(cls, path: Path) -> RelayState:
        """The state that `save` wrote."""
        metadata, tensors = load_metadata(path), load_tensors(path)
        facts = json.loads(metadata["state"])
        lesson = None
        if "captions" in facts:
            lesson = Lesson(_samples(facts["captions"], tensors, _LESSON), facts["num_drawn"])
        taught = {
            edge: Remembered(_samples(own["captions"], tensors, _of(edge)), own["cycle"])
            for edge, own in facts.get("taught", {}).items()
        }
        record = from_line(metadata["record"]) if metadata.get("record") else None
        assert record is None or isinstance(record, RelayRecord)
        cycle, version = facts["cycle"], facts["version"]
        number, latest = facts.get("number", cycle), facts.get("latest", version)
        return cls(tensors, number, cycle, facts.get("alone", {}), version, latest, lesson, taught, record)


def remaining(taught: Mapping[str, Remembered], lessons: Mapping[str, Samples]) -> dict[str, Samples]:
    """Of each edge, what it taught before of captions of which it teaches nothing now."""
    now = {edge: samples.captions for edge, samples in lessons.items()}
    rest = {edge: _without(own.samples, now.get(edge, ())) for edge, own in sorted(taught.items())}
    return {edge: samples for edge, samples in rest.items() if len(samples)}


def _without(samples: Samples, captions: Iterable[str]) -> Samples:
    told = set(captions)
    return samples[[place for place, caption in enumerate(samples.captions) if caption not in told]]


def _of(edge: str) -> str:
    return f"taught by {edge}: "


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _samples(captions: Any, tensors: dict[str, Tensor], prefix: str) -> Samples:
    """Taken out of the tensors."""
    body = msgspec.convert(captions, Captions)
    codes, shown = (tensors.pop(f"{prefix}{name}") for name in (CODES, SHOWN))
    evidence = dict(zip(body.captions, body.evidence, strict=True))
    return Samples(codes.long(), [body.captions[place] for place in shown.tolist()], evidence)
