"""Prefix activations are computed and sent once, and nothing but time and traffic is different."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ecogen.config import Tunables as Spec
from ecogen.config import Tuning, Wire
from ecogen.models.profile import model_shape
from ecogen.planning.cost import activation_bytes
from ecogen.runtime.prefix_cache import PrefixCache, prefix_keys
from ecogen.runtime.stage import OptimizerSettings
from ecogen.tuning.data import Examples
from ecogen.tuning.device import LocalData
from ecogen.tuning.prefix import KnownPrefixes, why_not_kept
from tests.tiny import HIDDEN, RecordingNetwork
from tests.tuning.clusters import Case, Tuned, cases, random_batches, random_tunables, tune_cluster

SETTINGS = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5)
TOKENS = 5
SIZE, EPOCHS = 4, 3


def epochs_of(case: Case) -> list[Examples]:
    """Each owner has two batches of its own, which come again in every epoch in another order."""
    owned = [random_batches(1, 2 * SIZE, seed=index)[0] for index in range(case.owners)]
    keyed = [replace(examples, keys=prefix_keys(examples.images, "v")) for examples in owned]
    orders = [torch.randperm(2 * SIZE, generator=torch.Generator().manual_seed(epoch)) for epoch in range(EPOCHS)]
    return [examples[part] for order in orders for examples in keyed for part in order.split(SIZE)]


def tune(case: Case, network: RecordingNetwork, **settings: object) -> Tuned:
    batches, sizes = epochs_of(case), {"num_microbatches": 2, "num_epochs": EPOCHS}
    return asyncio.run(
        tune_cluster(case, random_tunables(case), batches, SETTINGS, network=network, **sizes, **settings)
    )


def caches_of(case: Case, folder: Path, in_memory: int, on_disk: int) -> dict[str, PrefixCache]:
    shape = model_shape(case.config, case.spec)
    row = activation_bytes(shape, shape.lowest_tunable_block)
    return {node: PrefixCache(folder / node, row, in_memory * row, on_disk * row) for node in case.placement.node_ids}


def sent_to_lowest(case: Case, network: RecordingNetwork) -> int:
    """Activations sent, in rows, to the visit of the lowest tunable and those below it."""
    route = case.routes[0]
    below = [route.node_id(visit) for visit in range(route.lowest + 1)]
    links = set(pairwise(below))
    forward = [s for s in network.sent if s.method == "forward" and (s.sender_id, s.receiver_id) in links]
    return sum(len(s.message.tensors["tensor"]) for s in forward if "tensor" in s.message.tensors)


FROZEN_BELOW = Case(4, (1, 2), "start", Spec(prompts=1, lora_rank=1, first_block=2))


@example(FROZEN_BELOW, 100, 0)
@example(FROZEN_BELOW, 3, 100)
@example(FROZEN_BELOW, 0, 5)
@example(Case(3, (1,), "start", Spec(prompts=0, lora_rank=0), owners=2), 100, 0)
@example(Case(3, (1,), "end", Spec(prompts=0, lora_rank=0), owners=2), 1, 3)
@given(case=cases(max_blocks=4), in_memory=st.integers(0, 40), on_disk=st.integers(0, 40))
@settings(max_examples=12)
def test_tuning_with_kept_prefixes_is_the_same_tuning(case: Case, in_memory: int, on_disk: int) -> None:
    assume(model_shape(case.config, case.spec).lowest_tunable_block)
    plain = tune(case, RecordingNetwork())
    with tempfile.TemporaryDirectory() as folder:
        kept = tune(case, RecordingNetwork(), caches=caches_of(case, Path(folder), in_memory, on_disk))
    for name, tensor in plain.tunables.items():
        torch.testing.assert_close(kept.tunables[name], tensor, rtol=1e-3, atol=1e-4)
    assert kept.results["device-0"].loss == pytest.approx(plain.results["device-0"].loss, abs=1e-5)


def test_with_room_for_all_each_example_is_sent_once_and_not_a_bit_is_different(tmp_path: Path) -> None:
    plain_network, network = RecordingNetwork(), RecordingNetwork()
    plain = tune(FROZEN_BELOW, plain_network)
    kept = tune(FROZEN_BELOW, network, caches=caches_of(FROZEN_BELOW, tmp_path, 5, 100))
    assert all(torch.equal(kept.tunables[name], tensor) for name, tensor in plain.tunables.items())
    assert sent_to_lowest(FROZEN_BELOW, plain_network) == EPOCHS * 2 * 2 * SIZE
    assert sent_to_lowest(FROZEN_BELOW, network) == 2 * 2 * SIZE


def test_what_an_earlier_attempt_left_is_recalled(tmp_path: Path) -> None:
    caches, network = caches_of(FROZEN_BELOW, tmp_path, 100, 0), RecordingNetwork()
    first = tune(FROZEN_BELOW, RecordingNetwork(), caches=caches)
    again = tune(FROZEN_BELOW, network, caches=caches)
    assert all(torch.equal(first.tunables[name], tensor) for name, tensor in again.tunables.items())
    assert sent_to_lowest(FROZEN_BELOW, network) == 0
    lost = caches_of(FROZEN_BELOW, tmp_path, 100, 0)  # a device that was started again has nothing any more
    network = RecordingNetwork()
    tune(FROZEN_BELOW, network, caches=lost)
    assert sent_to_lowest(FROZEN_BELOW, network) == 2 * 2 * SIZE


@pytest.mark.parametrize(
    ("tuning", "wire", "spec", "said"),
    [
        ({"augmentation": 0.0}, {}, Spec(first_block=1), None),
        ({"augmentation": 0.5, "augmentation_views": 2}, {}, Spec(first_block=1), None),
        ({"augmentation": 0.5}, {}, Spec(first_block=1), "augmentation draws new images"),
        (
            {"augmentation": 0.0, "unlabelled": {"method": "fixmatch"}},
            {},
            Spec(first_block=1),
            "FixMatch draws new views",
        ),
        ({"augmentation": 0.0}, {}, Spec(first_block=0), "block 0 is tuned"),
        ({"augmentation": 0.0}, {}, Spec(backbone="all"), "block 0 is tuned"),
        ({"augmentation": 0.0}, {"tokens": "all"}, Spec(first_block=1), "as in plain split learning"),
        ({"augmentation": 0.0, "prefix_memory_mib": 0, "prefix_disk_mib": 0}, {}, Spec(first_block=1), "no room"),
    ],
)
def test_where_nothing_can_be_kept_the_reason_is_said(
    tuning: Mapping[str, Any], wire: Mapping[str, str], spec: Spec, said: str | None
) -> None:
    reason = why_not_kept(Tuning(**tuning), Wire(**wire), model_shape(FROZEN_BELOW.config, spec))
    assert (said in reason) if said and reason else reason == said


def test_images_that_come_again_are_the_same_and_others_are_not() -> None:
    data = LocalData(random_batches(1, 6)[0], seed=3, cluster_index=1)
    tuning = Tuning(local_epochs=2, batch_size=4, augmentation=0.5, augmentation_views=3)
    viewed = data.with_views(tuning, "v")
    assert viewed.keys is not None
    assert len(set(viewed.keys.tolist())) == 18
    seen = [_keys(viewed.batches(tuning, epoch // 2, epoch % 2)) for epoch in range(6)]
    assert seen[:3] == seen[3:]
    assert len(set.union(*seen[:3])) == 18
    orders = [[b.keys.tolist() for b in viewed.batches(tuning, 0, epoch)] for epoch in (0, 1)]
    assert orders[0] != orders[1]


def _keys(batches: Sequence[Examples]) -> set[int]:
    return {key for batch in batches for key in batch.keys.tolist()}


def test_without_augmentation_there_is_one_view_and_its_keys_only_where_asked() -> None:
    data = LocalData(random_batches(1, 6)[0], seed=3, cluster_index=1)
    plain = Tuning(augmentation=0.0)
    assert data.with_views(plain, None).keys is None
    one = data.with_views(plain, "v").views
    assert len(one) == 1
    assert torch.equal(one[0].images, data.examples.images)
    assert data.with_views(Tuning(augmentation=0.5), None).views == []


def test_no_more_is_kept_than_there_is_room_for() -> None:
    examples = replace(random_batches(1, 5)[0], keys=torch.tensor([1, 2, 3, 4, 5]))
    known = KnownPrefixes(torch.tensor([2, 9]), 3, examples.keys)
    divided = known.divide(examples)
    assert (divided.fresh, divided.kept.tolist(), divided.recalled.tolist()) == (4, [1, 3], [2])
    assert divided.examples.keys.tolist() == [1, 3, 4, 5, 2]
    again = known.divide(examples)
    assert (again.fresh, again.kept.tolist(), again.recalled.tolist()) == (2, [], [1, 2, 3])


def test_a_row_is_as_large_as_what_crosses_there(tmp_path: Path) -> None:
    shape = model_shape(FROZEN_BELOW.config, Spec(first_block=2))
    assert activation_bytes(shape, 2) == 4 * TOKENS * HIDDEN
