"""How accurate a run was, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from ecogen.config import Recipe
from ecogen.engines.launch import launch
from ecogen.records import RoundRecord


@dataclass(frozen=True)
class Curve:
    """Accuracy over time, of one run."""

    times_s: list[float]
    accuracies: list[float]

    @classmethod
    def of(cls, records: Sequence[RoundRecord]) -> Curve:
        """Of the edge's rounds; time begins with the first order."""
        own = [record for record in records if record.node_id == "edge-0"]
        began_s = own[0].time_s - own[0].wall_s
        return cls([record.time_s - began_s for record in own], [record.accuracy or 0.0 for record in own])

    def time_to(self, accuracy: float) -> float | None:
        """When it was first as accurate; None for never."""
        return next((t for t, a in zip(self.times_s, self.accuracies, strict=True) if a >= accuracy), None)


def tuned(recipe: Recipe, until: float = 2.0) -> Curve:
    """Run a federation whose first edge is looked at, to its end or until that edge is so accurate."""

    async def tune() -> list[RoundRecord]:
        records = []
        async with launch(recipe) as federation:
            async for record in federation.tune():
                records.append(record)
                if record.node_id == "edge-0" and (record.accuracy or 0.0) >= until:
                    break
        return records

    return Curve.of(asyncio.run(tune()))
