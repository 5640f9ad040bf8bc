"""The local steps of a cluster equal plain fine-tuning of the whole model, however it is cut and slow its links."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ecogen.config import Tunables as Spec
from ecogen.errors import NodeLostError
from ecogen.runtime.stage import OptimizerSettings
from ecogen.transport.memory import MemoryNetwork
from ecogen.tuning.local import LocalSteps
from tests.plain import fine_tune
from tests.tiny import RecordingNetwork
from tests.tuning.clusters import (
    KINDS,
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


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def tune(case: Case, *, steps: int = 3, batch_size: int = 4, microbatches: int = 2, **kwargs: object) -> Tuned:
    batches = random_batches(steps, batch_size, dtype=torch.float64)
    return asyncio.run(
        tune_cluster(
            case,
            random_tunables(case),
            batches,
            kwargs.pop("settings", SETTINGS),
            stages=stages_of(case, double=True),
            num_microbatches=microbatches,
            **kwargs,
        )
    )


@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_with_every_kind_of_tunables_local_steps_are_plain_fine_tuning(spec: Spec) -> None:
    case = Case(3, (1, 2), spec=spec, owners=2)
    tuned, plain = tune(case, steps=2), plain_model(case, double=True)
    batches = [(b.images, b.labels) for b in random_batches(2, 4, dtype=torch.float64)]
    fine_tune(plain, batches, learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5)
    assert largest_difference(tuned.tunables, {n: t.detach() for n, t in plain.tunables.items()}) < 1e-6


@example(Case(3, (1, 2), "end", owners=3), 4, 2, 0.5, 0.1, 2, 0.0)
@example(Case(3, (1, 2), "start", owners=3), 4, 2, 0.5, 0.1, 2, 0.3)
@given(
    case=cases(),
    batch_size=st.integers(1, 5),
    microbatches=st.integers(1, 4),
    clip_norm=st.sampled_from([0.0, 0.05, 1e6]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    num_epochs=st.integers(1, 2),
    proximal=st.sampled_from([0.0, 0.0, 0.3]),
)
@settings(max_examples=25)
def test_local_steps_equal_plain_fine_tuning_of_the_whole_model(
    case: Case,
    batch_size: int,
    microbatches: int,
    clip_norm: float,
    weight_decay: float,
    num_epochs: int,
    proximal: float,
) -> None:
    # A key's bias has no gradient but rounding's, which the proximal term and a small epsilon would blow up.
    epsilon = 1e-3 if proximal else 1e-8
    chosen = OptimizerSettings(1e-2, weight_decay, clip_norm, epsilon, proximal)
    sizes = {"batch_size": batch_size, "microbatches": microbatches, "num_epochs": num_epochs}
    tuned = tune(case, steps=4, settings=chosen, **sizes)
    plain = plain_model(case, double=True)
    batches = random_batches(4, batch_size, dtype=torch.float64)
    losses = fine_tune(
        plain,
        [(b.images, b.labels) for b in batches],
        learning_rate=1e-2,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        proximal=proximal,
        epsilon=epsilon,
    )
    assert largest_difference(tuned.tunables, {n: t.detach() for n, t in plain.tunables.items()}) < 1e-6
    assert {result.num_steps for result in tuned.results.values()} == {4}
    assert tuned.results["device-0"].loss == pytest.approx(sum(losses) / 4, abs=1e-6)


def test_tuning_changes_every_tunable() -> None:
    """So that the equality above is not one of models that stand still."""
    case = Case(3, (1, 2))
    before, after = random_tunables(case), tune(case).tunables
    assert all(not torch.equal(before[name], after[name].float()) for name in before)


def test_nothing_to_do_leaves_tunables_as_they_were() -> None:
    case = Case(3, (1,))
    tuned = tune(case, steps=0)
    assert largest_difference(tuned.tunables, random_tunables(case)) == 0
    assert {result.loss for result in tuned.results.values()} == {None}


def test_in_float32_one_microbatch_is_plain_fine_tuning_to_rounding(one_thread: None) -> None:
    case = Case(3, (1, 2))
    batches = random_batches(3, 4)
    tuned = asyncio.run(tune_cluster(case, random_tunables(case), batches, SETTINGS))
    plain = plain_model(case)
    fine_tune(plain, [(b.images, b.labels) for b in batches], learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5)
    assert largest_difference(tuned.tunables, {n: t.detach() for n, t in plain.tunables.items()}) < 1e-5


# The cycle of a U-shaped route.


def jittery(seed: int, longest_s: float) -> Callable[[str, str, int], float]:
    """A delay of its own for each message, drawn anew."""
    draws = random.Random(seed)
    return lambda sender, receiver, num_bytes: draws.random() * longest_s


@given(
    num_devices=st.integers(1, 4),
    owners=st.integers(1, 4),
    labels=st.sampled_from(["start", "end"]),
    window=st.integers(1, 4),
    microbatches=st.integers(1, 5),
    batch_size=st.integers(1, 5),
    delays=st.one_of(
        st.integers(0, 2**32).map(lambda seed: jittery(seed, 0.002)),
        st.sampled_from([0, 1, 2, 3]).map(lambda slow: lambda sender, _, __: 0.003 * sender.endswith(str(slow))),
    ),
)
@settings(max_examples=15)
def test_the_cycle_never_blocks_itself_whatever_the_delays_and_windows(
    num_devices: int,
    owners: int,
    labels: str,
    window: int,
    microbatches: int,
    batch_size: int,
    delays: Callable[..., float],
) -> None:
    case = Case(4, tuple(range(1, num_devices)), labels, owners=min(owners, num_devices))
    sizes = {"batch_size": batch_size, "microbatches": microbatches}
    slow = tune(case, network=MemoryNetwork(window=window, delay=delays), timeout_s=20, **sizes)
    fast = tune(case, **sizes)
    assert largest_difference(slow.tunables, fast.tunables) == 0
    assert slow.results == fast.results


# Backward stops below the lowest tunable.


@pytest.mark.parametrize("labels", ["start", "end"])
@pytest.mark.parametrize(
    ("spec", "lowest_device"),
    [
        (Spec(prompts=1, lora_rank=0, first_block=0), 0),
        (Spec(prompts=0, lora_rank=1, first_block=1), 1),
        (Spec(prompts=1, lora_rank=1, first_block=3), 2),
        (Spec(prompts=0, lora_rank=0), 3),
    ],
)
def test_no_gradient_crosses_a_cut_below_the_lowest_tunable(labels: str, spec: Spec, lowest_device: int) -> None:
    case = Case(4, (1, 2), labels, spec)
    network = RecordingNetwork()
    tuned = tune(case, network=network)
    visits = [visit.node_id for visit in case.placement]
    lowest = min(lowest_device, len(visits) - 1)
    expected = {(visits[visit], visits[visit - 1]) for visit in range(lowest + 1, len(visits))}
    assert network.links("backward") == expected
    counts = Counter((sent.sender_id, sent.receiver_id) for sent in network.sent if sent.method == "backward")
    assert set(counts.values()) <= {6}  # three steps of two microbatches
    plain = plain_model(case, double=True)
    batches = random_batches(3, 4, dtype=torch.float64)
    fine_tune(plain, [(b.images, b.labels) for b in batches], learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5)
    assert largest_difference(tuned.tunables, {n: t.detach() for n, t in plain.tunables.items()}) < 1e-6


@pytest.mark.parametrize("labels", ["start", "end"])
@pytest.mark.parametrize("spec", [Spec(prompts=1, lora_rank=1, first_block=3), Spec(prompts=0, lora_rank=0)])
def test_in_plain_split_learning_gradients_cross_every_cut_and_nothing_else_is_different(
    labels: str, spec: Spec
) -> None:
    network = RecordingNetwork()
    plain = tune(Case(4, (1, 2), labels, spec, goes_down=True), network=network)
    visits = [visit.node_id for visit in Case(4, (1, 2), labels).placement]
    assert network.links("backward") == set(zip(visits[1:], visits[:-1], strict=True))
    assert largest_difference(plain.tunables, tune(Case(4, (1, 2), labels, spec)).tunables) < 1e-12


def test_in_a_u_shape_labels_and_images_cross_no_link() -> None:
    network = RecordingNetwork()
    tune(Case(3, (1, 2), "start"), network=network)
    assert {sent.method for sent in network.sent} == {"forward", "backward", "finish"}
    network = RecordingNetwork()
    tune(Case(3, (1, 2), "end"), network=network)
    assert network.links("labels") == {("device-0", "device-2")}


@pytest.mark.parametrize(("labels", "limit"), [("start", 5), ("end", 2)])
def test_as_many_microbatches_are_in_flight_as_the_route_needs(labels: str, limit: int) -> None:
    case = Case(3, (1,), labels)
    most, under_way = 0, set()
    inner = LocalSteps.deliver

    def watch(self: LocalSteps, message: object, flow: object) -> None:
        nonlocal most
        if message.method == "forward":
            under_way.add((flow.step, flow.microbatch))
        if message.method == "returned":
            under_way.discard((flow.step, flow.microbatch))
        most = max(most, len(under_way))
        inner(self, message, flow)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalSteps, "deliver", watch)
        tune(case, batch_size=8, microbatches=8)
    assert limit // 2 < most <= limit


def test_a_lost_device_ends_the_attempt_at_all_others() -> None:
    case = Case(3, (1, 2))

    async def lose_one() -> Tuned:
        network = MemoryNetwork(delay=lambda *_: 0.005)
        batches = random_batches(400, 4)
        tuning = tune_cluster(case, random_tunables(case), batches, SETTINGS, network=network, keeps_errors=True)
        work = asyncio.create_task(tuning)
        await asyncio.sleep(1.0)
        network.kill("device-1")
        return await work

    results = asyncio.run(lose_one()).results
    for node_id in ("device-0", "device-2"):
        problem = results[node_id]
        assert isinstance(problem, NodeLostError)
        assert problem.node_id == "device-1"
