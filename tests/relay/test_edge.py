"""What an edge rehearses beside a lesson: what it handed on itself, or else what it draws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from ecogen.config import Relay
from ecogen.relay.edge import Asked, Domain, EdgeRelay
from ecogen.relay.samples import Samples
from ecogen.tuning.passages import Passages

BEFORE = {"weight": torch.zeros(1)}


class Rehearsing:
    """In place of a generator: writes down what is rehearsed."""

    def __init__(self) -> None:
        self.rehearsed: list[int] = []

    def passages(self, samples: Samples) -> Passages:
        return Passages(samples.codes, samples.codes)

    def perplexity(self, _: Passages) -> Any:
        return lambda tunables: 2.0 - float(tunables["weight"])

    def rehearse(self, _: object, evidence: Mapping[str, int], *__: object) -> Samples:
        return some(7, *evidence)

    def learn(self, _: object, __: Passages, known: Passages, *___: object, share: float) -> dict[str, Tensor]:
        assert share < 1
        self.rehearsed += known.tokens[:, 0].tolist()
        return {"weight": torch.ones(1)}


def some(code: int, *captions: str) -> Samples:
    return Samples(torch.full((len(captions), 4), code), captions, dict.fromkeys(captions, 1))


@pytest.mark.parametrize(("own", "rehearsed"), [(some(3, "mine", "mine"), [3, 3]), (some(3), [7])])
def test_what_is_rehearsed(own: Samples, rehearsed: list[int], tmp_path: Path) -> None:
    generator, held_out = Rehearsing(), Passages(torch.zeros(1, 4), torch.zeros(1, 4))
    edge = EdgeRelay(
        "edge-0",
        0,
        cast(Any, generator),
        cast(Any, SimpleNamespace()),
        Relay(every=1),
        lambda _: Domain({"mine": 5}, held_out),
        tmp_path,
        seed=0,
        num_edges=2,
    )
    taken = edge._taken(Asked("schedule", 0, 0), BEFORE, own, some(5, *["theirs"] * 9))
    assert generator.rehearsed == rehearsed
    assert (taken.reason, taken.share) == ("", 1.0)
