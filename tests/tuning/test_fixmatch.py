"""FixMatch through a split chain equals its published formula on the whole model; nothing else depends on it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Literal, NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from ecogen.config import Tuning, Unlabelled
from ecogen.errors import ProtocolError
from ecogen.runtime.stage import OptimizerSettings
from ecogen.tuning.augment import strongly_augment
from ecogen.tuning.data import Examples
from ecogen.tuning.device import LocalData
from ecogen.tuning.fixmatch import STRONG, WEAK, cut_batch, mixed_batch, targets, without_weak
from tests.plain import PlainModel, fine_tune
from tests.tiny import IMAGE, RecordingNetwork
from tests.tuning.clusters import (
    Case,
    Tuned,
    cases,
    plain_model,
    random_batches,
    random_tunables,
    stages_of,
    tune_cluster,
)

SETTINGS = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5)
SPEC = Unlabelled(method="fixmatch", threshold=0.5, weight=2.0)


class Views(NamedTuple):
    """A batch as the paper has it."""

    labelled: Examples
    strong: Tensor
    weak: Tensor


def random_views(num_steps: int, num_labelled: int, num_unlabelled: int) -> list[Views]:
    """Batches of noise; the strong views are other noise than the weak ones."""
    labelled = random_batches(num_steps, num_labelled, seed=5, dtype=torch.float64)
    strong, weak = (random_batches(num_steps, num_unlabelled, seed=seed, dtype=torch.float64) for seed in (6, 7))
    return [Views(x, s.images, w.images) for x, s, w in zip(labelled, strong, weak, strict=True)]


def published_loss(spec: Unlabelled, shares: list[float], edge: PlainModel | None = None) -> object:
    """Equations 3 and 4 of the paper, image by image; keeps the share of images with a pseudo-label.

    Args:
        edge: whose predictions are the labels; None for the model's own.
    """

    def loss(model: PlainModel, views: Views) -> Tensor:
        total = cross_entropy(model.logits(views.labelled.images).float(), views.labelled.labels)
        num_sure = 0
        for strong, weak in zip(views.strong, views.weak, strict=True):
            with torch.no_grad():
                q = torch.softmax((edge or model).logits(weak[None])[0].float(), dim=0)
            if q.max() >= spec.threshold:
                p = torch.log_softmax(model.logits(strong[None])[0].float(), dim=0)
                total = total - spec.weight * p[q.argmax()] / len(views.strong)
                num_sure += 1
        shares.append(num_sure / len(views.strong))
        return total

    return loss


def tune(case: Case, batches: list[Examples], *, microbatches: int = 1, **kwargs: object) -> Tuned:
    stages, kwargs = stages_of(case, double=True), {"unlabelled": SPEC, **kwargs}
    return asyncio.run(
        tune_cluster(
            case, random_tunables(case), batches, SETTINGS, stages=stages, num_microbatches=microbatches, **kwargs
        )
    )


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


# The formula.


@example(Case(3, (1, 2), "start"), 2, 5, 3, 0.5, "self")
@example(Case(3, (1, 2), "start"), 2, 5, 3, 0.5, "edge")
@example(Case(3, (1, 2), "end", owners=2), 3, 4, 2, 0.5, "edge")
@given(
    case=cases(max_blocks=4),
    num_labelled=st.integers(1, 3),
    num_unlabelled=st.integers(1, 5),
    microbatches=st.integers(1, 4),
    threshold=st.sampled_from([0.0, 0.4, 0.6]),
    teacher=st.sampled_from(["self", "edge"]),
)
@settings(max_examples=16)
def test_fixmatch_through_a_chain_equals_the_published_formula(
    case: Case,
    num_labelled: int,
    num_unlabelled: int,
    microbatches: int,
    threshold: float,
    teacher: Literal["self", "edge"],
) -> None:
    """And with an edge's model as the teacher, the same with the predictions of where the round began."""
    spec = replace(SPEC, threshold=threshold, teacher=teacher)
    views = random_views(3, num_labelled, num_unlabelled)
    tuned = tune(case, [mixed_batch(*batch) for batch in views], microbatches=microbatches, unlabelled=spec)
    plain = plain_model(case, double=True)
    rates = {"learning_rate": 1e-2, "weight_decay": 0.1, "clip_norm": 0.5}
    shares: list[float] = []
    edge = plain_model(case, double=True) if teacher == "edge" else None
    losses = fine_tune(plain, views, objective=published_loss(spec, shares, edge), **rates)
    assert largest_difference(tuned.tunables, {n: t.detach() for n, t in plain.tunables.items()}) < 1e-6
    assert tuned.results["device-0"].loss == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert tuned.results["device-0"].confident == pytest.approx(sum(shares) / 3)


def test_the_case_above_has_sure_and_unsure_images() -> None:
    """So that the equality above is about both."""
    batches = [mixed_batch(*batch) for batch in random_views(3, 2, 5)]
    assert 0 < tune(Case(3, (1, 2)), batches).results["device-0"].confident < 1


def test_where_nothing_is_sure_it_is_tuning_on_the_labels_alone() -> None:
    views = random_views(3, 4, 5)
    mixed = tune(Case(3, (1,)), [mixed_batch(*v) for v in views], microbatches=2, unlabelled=replace(SPEC, threshold=1))
    alone = tune(Case(3, (1,)), [batch.labelled for batch in views], microbatches=2)
    assert mixed.results["device-0"].confident == 0
    assert largest_difference(mixed.tunables, alone.tunables) < 1e-9


def test_weak_views_go_forward_only_and_no_label_leaves_a_u_shape() -> None:
    network = RecordingNetwork()
    tune(Case(3, (1, 2)), [mixed_batch(*batch) for batch in random_views(2, 3, 4)], network=network)
    rows = {
        method: {len(sent.message.tensors["tensor"]) for sent in network.sent if sent.method == method}
        for method in ("forward", "backward", "labels")
    }
    assert rows == {"forward": {3 + 2 * 4}, "backward": {3 + 4}, "labels": set()}


# Batches.


def known(num_labelled: int, num_unlabelled: int) -> LocalData:
    """A device whose images all differ, and tell their index; the last ones have no label."""
    indices = torch.arange(num_labelled + num_unlabelled)
    images = indices.float()[:, None, None, None].expand(-1, 1, IMAGE, IMAGE)
    return LocalData(Examples(images, torch.where(indices < num_labelled, indices, -1)), 0, 0)


def indices_of(images: Tensor) -> list[int]:
    return [int(image[0, 0, 0]) for image in images]


@given(
    num_labelled=st.integers(1, 12),
    num_unlabelled=st.integers(1, 40),
    batch_size=st.integers(1, 8),
    ratio=st.integers(1, 5),
    microbatches=st.integers(1, 4),
)
@settings(max_examples=40)
def test_an_epoch_goes_once_through_the_unlabelled_and_evenly_through_the_labelled(
    num_labelled: int, num_unlabelled: int, batch_size: int, ratio: int, microbatches: int
) -> None:
    tuning = Tuning(batch_size=batch_size, augmentation=0.0, unlabelled=Unlabelled("fixmatch", ratio=ratio, strength=0))
    batches = list(known(num_labelled, num_unlabelled).batches(tuning, 0, 0))
    parts = [part for batch in batches for part in cut_batch(batch, microbatches)]
    for part in parts:
        assert indices_of(part.images[part.labels == STRONG]) == indices_of(part.images[part.labels == WEAK])
        assert indices_of(part.images[part.labels >= 0]) == part.labels[part.labels >= 0].tolist()
    weak = [index for part in parts for index in indices_of(part.images[part.labels == WEAK])]
    assert sorted(weak) == list(range(num_labelled, num_labelled + num_unlabelled))
    times = torch.cat([batch.labels[batch.labels >= 0] for batch in batches]).bincount(minlength=num_labelled)
    assert times.max() - times.min() <= 1
    size = min(batch_size, num_labelled)
    assert {int((batch.labels >= 0).sum()) for batch in batches} == {size}
    assert all(int((batch.labels == WEAK).sum()) == ratio * size for batch in batches[:-1])


def test_with_all_labels_fixmatch_changes_nothing() -> None:
    ignoring, matching = (Tuning(batch_size=4, unlabelled=Unlabelled(method)) for method in ("ignore", "fixmatch"))
    data = known(10, 0)
    pairs = list(zip(data.batches(ignoring, 1, 0), data.batches(matching, 1, 0), strict=True))
    assert len(pairs) == 3
    assert all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs)
    assert [data.num_examples(tuning) for tuning in (ignoring, matching)] == [10, 10]


def test_labels_alone_tune_on_nothing_else() -> None:
    data, tuning = known(7, 30), Tuning(batch_size=4, augmentation=0.0)
    batches = list(data.batches(tuning, 0, 0))
    assert [len(batch) for batch in batches] == [4, 3]
    assert sorted(torch.cat([batch.labels for batch in batches]).tolist()) == list(range(7))
    assert data.num_examples(tuning) == 7
    assert data.num_examples(replace(tuning, unlabelled=Unlabelled("fixmatch"))) == 37


# What a neighbour may get wrong.


@pytest.mark.parametrize(
    "labels", [[1, STRONG], [1, WEAK, STRONG], [1, STRONG, WEAK, WEAK], [1, 1, WEAK], [1, -3, WEAK], [STRONG] * 3]
)
def test_labels_that_do_not_fit_their_rows_are_refused(labels: list[int]) -> None:
    with pytest.raises(ProtocolError, match=rf"2 rows and 1 weak views, of a batch of 1, came with {len(labels)} lab"):
        targets(torch.tensor(labels), 2, torch.zeros(1, 10), SPEC, batch_size=1, num_unlabelled=1)
    fine = targets(torch.tensor([1, STRONG, WEAK]), 2, torch.eye(10)[3:4] * 9, SPEC, batch_size=1, num_unlabelled=1)
    assert fine.labels.tolist() == [1, 3]


def test_unlabelled_rows_without_weak_views_are_refused() -> None:
    with pytest.raises(ProtocolError, match="3 labels, 1 of strong and 0 of weak views"):
        targets(torch.tensor([1, 1, STRONG]), 3, None, SPEC, batch_size=2, num_unlabelled=1)
    with pytest.raises(ProtocolError, match="3 weak views in a microbatch of 2 rows"):
        without_weak(torch.zeros(2, 1), 3)


# The strong augmentation.


def test_the_strong_augmentation_is_keyed_and_makes_holes() -> None:
    images = torch.ones(200, 1, 16, 16)
    one, same, other = (strongly_augment(images, 1.0, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    holes = (one == 0).flatten(1).float().mean(1)  # of a square, whose side is 0 to a half of the image's
    assert holes.max() <= 1 / 4
    assert 0.03 < holes.mean() < 1 / 12  # 1/12 if none lay partly outside
    assert torch.equal(strongly_augment(images, 0.0, torch.Generator()), images)


def test_a_device_without_examples_has_no_batches_whatever_is_made_of_those_without_a_label() -> None:
    for unlabelled in (Unlabelled(), SPEC):
        assert list(known(0, 0).batches(Tuning(unlabelled=unlabelled), 0, 0)) == []
