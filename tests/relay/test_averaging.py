"""What the cloud begins to learn with: points between its own tunables and the mean of its edges', by what they do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ecogen.errors import ProtocolError
from ecogen.relay.averaging import Measure, begun, checked_tunables, evidence_of
from ecogen.relay.samples import Samples
from ecogen.tuning.ranks import LoraRanks

VALUES = st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=4)
A, B = "q_proj.lora_A.weight", "q_proj.lora_B.weight"


def taught(count: int, caption: str = "one") -> Samples:
    """A lesson of one caption, with so many real examples of it, and more of another that it says nothing of."""
    return Samples(
        torch.zeros(1, 1, dtype=torch.long), [caption], {caption: count, "of which nothing is handed on": 99}
    )


def to(aim: float) -> Sequence[float]:
    return [aim, aim]


def at(values: Sequence[float]) -> dict[str, Tensor]:
    return {"weight": torch.tensor(values)}


def far_from(aim: float) -> Measure:
    """A perplexity that is least, and 1, where the tunables are those aimed at."""
    return lambda tunables: math.exp(float((tunables["weight"].double() - aim).square().mean()))


@given(VALUES, st.integers(1, 50), st.integers(1, 50))
def test_edges_that_have_what_the_cloud_has_change_nothing(values: list[float], one: int, other: int) -> None:
    own, lessons = at(values), {"edge-0": taught(one), "edge-1": taught(other)}
    found = begun(own, {"edge-0": at(values), "edge-1": at(values)}, lessons, [far_from(9.0)])
    assert found.tunables is own
    assert found.share == 0


@pytest.mark.parametrize(("aim", "share"), [(-3.0, 0.0), (0.0, 0.0), (1.1, 0.25), (2.1, 0.5), (2.8, 0.75), (9.0, 1.0)])
def test_the_best_point_of_the_line_is_taken(aim: float, share: float) -> None:
    """The cloud has 0; edges have 3 and 7, of 3 real examples and of 1: their mean is 4."""
    edges, lessons = {"edge-0": at(to(3.0)), "edge-1": at(to(7.0))}, {"edge-0": taught(3), "edge-1": taught(1)}
    found = begun(at(to(0.0)), edges, lessons, [far_from(aim)])
    assert found.share == share
    assert found.tunables["weight"].tolist() == to(4 * share)


def test_all_that_is_measured_counts_alike() -> None:
    """Of two parts one gets worse by more than the other gets better; where there are two of the others, they win."""
    edges, lessons = {"edge-0": at(to(4.0))}, {"edge-0": taught(1)}

    def worse(tunables: Mapping[str, Tensor]) -> float:
        return math.exp(9 + 1.5 * float(tunables["weight"][0]))

    def better(tunables: Mapping[str, Tensor]) -> float:
        return math.exp(9 - float(tunables["weight"][0]))

    assert begun(at(to(0.0)), edges, lessons, [worse, better]).share == 0
    assert begun(at(to(0.0)), edges, lessons, [worse, better, better]).share == 1


@pytest.mark.parametrize("perplexity", [math.nan, math.inf])
def test_what_is_no_number_is_not_chosen(perplexity: float) -> None:
    edges, lessons = {"edge-0": at(to(4.0))}, {"edge-0": taught(1)}
    found = begun(at(to(0.0)), edges, lessons, [lambda t: 5.0 if not t["weight"].any() else perplexity])
    assert found.share == 0


def test_who_teaches_nothing_and_who_has_seen_nothing_has_no_weight() -> None:
    own, edges = at(to(0.0)), {"edge-0": at(to(4.0)), "edge-1": at(to(-4.0))}
    assert begun(own, edges, {}, [far_from(4.0)]).tunables is own
    assert begun(own, edges, {"edge-0": taught(0)}, [far_from(4.0)]).tunables is own
    for lessons in ({"edge-0": taught(1)}, {"edge-0": taught(1), "edge-1": taught(0)}):
        assert begun(own, edges, lessons, [far_from(4.0)]).tunables["weight"].tolist() == to(4.0)


def test_the_evidence_of_a_lesson() -> None:
    codes = torch.zeros(3, 1, dtype=torch.long)
    assert evidence_of(Samples(codes, ["one", "one", "two"], {"one": 5, "two": 7, "three": 11})) == 12


def product(tunables: Mapping[str, Tensor]) -> Tensor:
    return tunables[B].double() @ tunables[A].double()


@pytest.mark.parametrize(("how", "is_kept"), [("factors", False), ("products", True)])
def test_products_are_averaged_where_they_are_between_edges(how: Literal["factors", "products"], is_kept: bool) -> None:
    """An edge whose factors are turned has the same model: so have all points, but where factors are averaged."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator)
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    own, edge = {A: a, B: b}, {A: turn @ a, B: b @ turn.T}
    points = measured(own, edge, LoraRanks(alpha=2.0, how=how))
    assert len(points) == 5
    assert all(torch.allclose(product(point), product(own), atol=1e-5) for point in points) == is_kept


def measured(own: dict[str, Tensor], edge: Mapping[str, Tensor], ranks: LoraRanks) -> list[dict[str, Tensor]]:
    """All points that are."""
    points: list[dict[str, Tensor]] = []

    def keep(tunables: Mapping[str, Tensor]) -> float:
        points.append(dict(tunables))
        return 1.0

    begun(own, {"edge-0": edge}, {"edge-0": taught(1)}, [keep], ranks)
    return points


@pytest.mark.parametrize(
    ("tunables", "said"),
    [
        ({}, r"update of 'edge-0' has nothing as 'weight' instead of \(2,\)"),
        ({"weight": torch.zeros(2), "more": torch.zeros(1)}, r"has \(1,\) as 'more' instead of nothing"),
        ({"weight": torch.zeros(3)}, r"has \(3,\) as 'weight' instead of \(2,\); set relay\.tunables = false"),
        ({"weight": torch.zeros(2, dtype=torch.float64)}, r"have torch\.float64 as 'weight' instead of torch\.float32"),
        ({"weight": torch.tensor([0.0, math.nan])}, "has a value that is not finite in 'weight'"),
        ({"weight": torch.tensor([0.0, -math.inf])}, "has a value that is not finite in 'weight'"),
    ],
)
def test_what_cannot_be_averaged_is_refused(tunables: Mapping[str, Tensor], said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        checked_tunables("edge-0", tunables, at(to(0.0)))
    assert checked_tunables("edge-0", at(to(1.0)), at(to(0.0))).keys() == {"weight"}
