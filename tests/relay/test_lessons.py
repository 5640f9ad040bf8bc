"""What teachers hand on, how receivers mix it, and when they refuse it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecogen.errors import ProtocolError
from ecogen.records import Taught
from ecogen.relay.acceptance import held_out, refusal, take
from ecogen.relay.agreement import asked_of
from ecogen.relay.buffer import mixed
from ecogen.relay.samples import Captions, Samples, balanced, joined, unpacked
from ecogen.relay.teacher import kept_places

CAPTIONS = st.lists(st.sampled_from(["one", "two", "three", "four"]), min_size=1, max_size=40)


def some(captions: list[str], evidence: dict[str, int] | None = None) -> Samples:
    """Samples whose first code tells their place."""
    codes = torch.arange(len(captions))[:, None] * torch.tensor([1, 0, 0])
    return Samples(codes, captions, evidence or {})


def whole(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@given(CAPTIONS)
@settings(deadline=None)
def test_samples_travel(captions: list[str]) -> None:
    samples = some(captions, {caption: len(caption) for caption in captions})
    body, tensors = samples.packed()
    assert sorted(body.captions) == sorted(set(captions))
    back = unpacked(body, tensors, 64, 3, 40)
    assert (list(back.captions), back.evidence) == (captions, samples.evidence)
    assert torch.equal(back.codes, samples.codes)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "'codes' of samples are to be whole numbers with ndim 2, not nothing"),
        ({"codes": whole(2, 3)}, "'shown' of samples are to be whole numbers with ndim 1, not nothing"),
        ({"codes": whole(6), "shown": whole(2)}, r"'codes' .* ndim 2, not torch.uint8 \[6\]"),
        ({"codes": whole(2, 3), "shown": whole()}, r"'shown' .* ndim 1, not torch.uint8 \[\]"),
        ({"codes": whole(2, 3), "shown": whole(2, 1)}, r"'shown' .* ndim 1, not torch.uint8 \[2, 1\]"),
        ({"codes": whole(2, 3) + 0.5, "shown": whole(2)}, r"'codes' .* not torch.float32 \[2, 3\]"),
        ({"codes": whole(2, 3), "shown": whole(2) + 0.5}, r"'shown' .* not torch.float32 \[2\]"),
        ({"codes": whole(2, 3), "shown": whole(2).bool()}, r"'shown' .* not torch.bool \[2\]"),
        ({"codes": whole(2, 4), "shown": whole(2)}, r"codes \[2, 3\], not \[2, 4\]"),
        ({"codes": whole(3, 3), "shown": whole(2)}, r"codes \[2, 3\], not \[3, 3\]"),
        ({"codes": whole(5, 3), "shown": whole(5)}, "5 samples; 4 at most"),
        ({"codes": whole(2, 3) + 64, "shown": whole(2)}, "0..63"),
        ({"codes": whole(2, 3).short() - 1, "shown": whole(2)}, "0..63"),
        ({"codes": whole(2, 3), "shown": whole(2) + 1}, "captions that are not there"),
        ({"codes": whole(2, 3), "shown": whole(2).short() - 1}, "captions that are not there"),
    ],
)
def test_what_are_no_samples(tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        unpacked(Captions(("one",), (1,)), tensors, 64, 3, 4)
    for body in (Captions(("one", "two"), (1,)), Captions(("o" * 300,), (1,))):
        with pytest.raises(ProtocolError, match="256 characters at most, each with its evidence"):
            unpacked(body, {"codes": whole(1, 3), "shown": whole(1)}, 64, 3, 4)


@given(CAPTIONS, st.data())
@settings(deadline=None)
def test_evidence_is_of_what_is_shown(captions: list[str], data: st.DataObject) -> None:
    """Whatever a lesson says of captions that it does not show, nobody counts it."""
    samples = some(captions, {caption: place for place, caption in enumerate(["none", "four", "three", "two", "one"])})
    chosen = samples[data.draw(st.lists(st.integers(0, len(captions) - 1)))]
    assert set(chosen.evidence) == set(chosen.captions)
    assert chosen.evidence.items() <= samples.evidence.items()


def test_thousands_of_captions_without_a_sample_are_no_evidence() -> None:
    names = tuple(f"caption {number}" for number in range(4096))
    for size, shown in ((0, []), (2, [7, 7])):
        tensors = {"codes": whole(size, 3), "shown": torch.tensor(shown, dtype=torch.int16)}
        told = unpacked(Captions(names, (5,) * 4096), tensors, 64, 3, 4)
        assert told.evidence == {names[place]: 5 for place in shown}
        assert not asked_of({"liar": told, "other": some(["caption 1"], {"caption 1": 1})}, "liar")


@given(CAPTIONS, st.integers(0, 50))
@settings(deadline=None)
def test_balanced_over_captions(captions: list[str], number: int) -> None:
    samples = some(captions)
    chosen = balanced(samples, number, generator())
    there, given_counts = Counter(captions), Counter(chosen.captions)
    assert len(chosen) <= number
    assert len(chosen) == min(number, len(captions))
    assert len(set(chosen.codes[:, 0].tolist())) == len(chosen), "each once"
    most = max(given_counts.values(), default=0)
    for caption, count in there.items():  # who has fewer than another has all of its own
        assert given_counts[caption] >= min(count, most - 1)


def test_of_each_caption_the_surest_that_are_read_as_asked_are_handed_on() -> None:
    asked = ["one"] * 40 + ["two"] * 40 + ["three"] * 4
    said = ["one"] * 38 + ["two"] * 2 + ["one"] * 30 + ["two"] * 10 + ["three"] * 4
    sure = torch.linspace(0, -1, 84)
    sure[[5, 39]] = torch.tensor([-9.0, 0.5])  # the one in doubt, the other sure to be something else
    three = [80, 81, 82, 83]
    assert kept_places(asked, said, sure, 12) == [0, 1, 2, 3, 4, 6, *three], (
        "two is mostly read as one: it is not known"
    )
    assert kept_places(asked, said, sure, 4) == [0, 1, 80, 81]
    assert kept_places(asked, said, sure, 99) == [*range(38), *three]
    assert kept_places(["one"] * 4, ["two"] * 4, sure[:4], 4) == []
    assert kept_places([], [], sure[:0], 4) == []


def test_teachers_are_weighed_by_evidence() -> None:
    ours = some(["one"] * 50 + ["two"] * 50, {"one": 30, "two": 0})
    theirs = some(["one"] * 50 + ["three"] * 50, {"one": 10, "three": 5})
    new = mixed({"a": ours, "b": theirs}, 60, generator())
    assert Counter(new.captions) == {"one": 20, "two": 20, "three": 20}
    assert Counter(mixed({"a": ours, "b": some(["one"] * 50, {"one": 0})}, 40, generator()).captions)["one"] == 20
    from_ours = mixed({"a": ours, "b": theirs}, 60, generator())
    assert len(from_ours) == 60
    assert joined([ours, theirs]).evidence == {"one": 40, "two": 0, "three": 5}


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=60))
def test_what_is_held_out_is_not_learnt(codes: list[int]) -> None:
    told, learnt = held_out(Samples(torch.tensor(codes)[:, None], ["one"] * len(codes), {"one": 1}))
    assert len(told) + len(learnt) == len(codes)
    assert len(told)
    assert len(learnt)
    if len(set(codes)) > 40:  # not where one had to be taken
        assert not set(told.codes[:, 0].tolist()) & set(learnt.codes[:, 0].tolist())


def test_what_was_held_out_once_is_so_beside_others() -> None:
    some_codes = torch.randint(1000, (100, 4), generator=generator())
    one, other = (Samples(codes, ["one"] * 50, {"one": 1}) for codes in some_codes.split(50))
    told, learnt = held_out(joined([other, one]))
    assert 10 <= len(told) <= 30
    for part in (one, other):
        own = held_out(part)
        assert {tuple(row) for row in own[0].codes.tolist()} <= {tuple(row) for row in told.codes.tolist()}
        assert {tuple(row) for row in own[1].codes.tolist()} <= {tuple(row) for row in learnt.codes.tolist()}


@pytest.mark.parametrize(("harm", "share"), [(0.1, 1.0), (0.4, 0.5), (0.9, 0.2), (3.0, 0.0)])
def test_as_much_is_taken_as_does_no_harm(harm: float, share: float) -> None:
    before, after = {"weight": torch.zeros(1)}, {"weight": torch.ones(1)}

    def judge(tunables: Mapping[str, torch.Tensor]) -> list[Taught]:
        way = float(tunables["weight"])
        return scores((9.0, 9.0 - way), (1.0, 1.0 + harm * way))

    taken = take(before, after, judge, 0.2)
    assert (taken.share, float(taken.tunables["weight"])) == (share, pytest.approx(share))
    assert bool(taken.reason) == (share == 0)
    if not share:
        assert taken.reason == "perplexity on cloud rose from 1.00 to 4.00"


def scores(new: tuple[float, float], known: tuple[float, float]) -> list[Taught]:
    return [Taught("edge-0", *new, is_new=True), Taught("cloud", *known, is_new=False)]


@pytest.mark.parametrize(
    ("new", "known", "reason"),
    [
        ((9.0, 8.0), (5.0, 5.2), ""),
        ((9.0, 9.0), (5.0, 5.0), "nothing was learnt"),
        ((9.0, 9.5), (5.0, 5.0), "nothing was learnt"),
        ((9.0, math.nan), (5.0, 5.0), "nothing was learnt"),
        ((9.0, math.inf), (5.0, 5.0), "nothing was learnt"),
        ((9.0, 3.0), (5.0, 5.3), "perplexity on cloud rose from 5.00 to 5.30"),
        ((9.0, 3.0), (5.0, math.nan), "perplexity on cloud rose"),
    ],
)
def test_what_is_refused(new: tuple[float, float], known: tuple[float, float], reason: str) -> None:
    said = refusal(scores(new, known), 0.05)
    assert said.startswith(reason)
    assert bool(said) == bool(reason)
