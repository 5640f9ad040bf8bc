"""Tunables in fewer bytes equal the formula of error feedback, written here once more; nothing that rounding leaves of
a change is lost, whoever is killed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import ViTForImageClassification

from ecogen.config import Recipe, Wire, WireType
from ecogen.models.adapters import classification_config
from ecogen.models.checkpoint import open_foundation
from ecogen.runtime.compression import restore_all
from ecogen.tuning.data import load_splits, partition_examples
from ecogen.tuning.device import LocalData
from ecogen.tuning.edge_state import EdgeState
from ecogen.tuning.feedback import Feedback
from ecogen.tuning.messages import TUNE, TuneOrder
from tests.plain import fine_tune
from tests.runs import finish, in_background, run, running, until
from tests.tiny import RecordingNetwork, Sent
from tests.tuning.clusters import plain_of

Tunables = dict[str, Tensor]
SHAPES = {"a": (4, 7), "b": (7, 4), "bias": (5,)}


def random_tensors(seed: int, size: float = 1.0) -> Tunables:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def rounded(tensor: Tensor, wire_type: str) -> Tensor:
    """To bfloat16, or to 255 steps of each vector along the longest dimension."""
    if wire_type == "bfloat16":
        return tensor.bfloat16().float()
    dim = max(range(tensor.ndim), key=lambda axis: (tensor.shape[axis], axis))
    steps = (tensor.abs().amax(dim, keepdim=True) / 127).bfloat16().float()
    return torch.where(steps > 0, torch.round(tensor / steps) * steps, tensor)


@given(
    seed=st.integers(0, 1000),
    wire_type=st.sampled_from(["bfloat16", "int8"]),
    counted=st.lists(st.booleans(), min_size=1, max_size=6),
    restarts=st.booleans(),
)
@settings(max_examples=20)
def test_all_that_was_counted_is_all_that_was_changed_but_for_the_last_rounding(
    tmp_path_factory: pytest.TempPathFactory, seed: int, wire_type: WireType, counted: list[bool], restarts: bool
) -> None:
    path = tmp_path_factory.mktemp("device") / "feedback.safetensors"
    feedback, last, zeros = Feedback(path, wire_type), None, {name: torch.zeros(s) for name, s in SHAPES.items()}
    sent, changed, error = dict(zeros), dict(zeros), dict(zeros)
    for attempt, is_counted in enumerate(counted):
        feedback = Feedback(path, wire_type) if restarts else feedback
        feedback.begin(last)
        begun, change = random_tensors(seed + attempt), random_tensors(seed + 100 + attempt, 0.1)
        answer = restore_all(feedback.end(attempt, begun, {name: begun[name] + change[name] for name in begun}))
        if is_counted:
            last = attempt
            for name in SHAPES:
                sent[name], changed[name] = sent[name] + answer[name], changed[name] + change[name]
                whole = change[name] + error[name]
                error[name] = whole - rounded(whole, wire_type)
    for name in SHAPES:
        torch.testing.assert_close(sent[name] + error[name], changed[name], rtol=0, atol=2e-6)


def test_a_device_that_lost_its_disk_begins_with_nothing_left(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / "feedback.safetensors", "int8")
    feedback.begin(7)
    begun = random_tensors(1)
    answer = restore_all(feedback.end(8, begun, {name: 2 * tensor for name, tensor in begun.items()}))
    for name, tensor in answer.items():
        assert torch.equal(tensor, rounded(begun[name], "int8"))


# The whole.


def by_hand(recipe: Recipe, initial: Tunables, foundation: Path) -> Tunables:
    """FedAvg over both clusters, each on the whole model, with rounded orders and fed back changes."""
    opened, tuning = open_foundation(foundation), recipe.tuning
    splits = load_splits(recipe.data, recipe.model.image_size, recipe.seed)
    parts = partition_examples(splits.train.labels, recipe.data.partition, [2], recipe.seed)[0]
    x, errors = initial, [{name: torch.zeros_like(tensor) for name, tensor in initial.items()} for _ in parts]
    for round_index in range(tuning.rounds):
        total = {name: torch.zeros_like(tensor) for name, tensor in x.items()}
        for index, own in enumerate(parts):
            data = LocalData(splits.train[own], recipe.seed, index)
            whole = ViTForImageClassification(classification_config(opened, 10)).eval()
            whole.load_state_dict(opened.read(whole.state_dict()), strict=False)
            begun = {name: rounded(tensor, recipe.wire.orders) for name, tensor in x.items()}
            model = plain_of(whole, begun, recipe.tunables)
            fine_tune(
                model,
                [(b.images, b.labels) for b in data.batches(tuning, round_index, 0)],
                learning_rate=tuning.learning_rate,
                weight_decay=tuning.weight_decay,
                clip_norm=tuning.clip_norm,
                epsilon=tuning.epsilon,
            )
            for name, tensor in model.tunables.items():
                wanted = tensor.detach() - begun[name] + errors[index][name]
                change = rounded(wanted, recipe.wire.updates)
                errors[index][name] = wanted - change
                total[name] += change / len(parts)
        x = {name: x[name] + total[name] for name in x}
    return x


def most_apart(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    return max(float((some[name] - others[name]).abs().max()) for name in some)


@pytest.mark.parametrize("wire_type", ["bfloat16", "int8"])
async def test_rounding_orders_alone_leaves_the_edges_tunables_as_exact_as_they_are(
    recipe_of: Callable[..., Recipe], tmp_path: Path, wire_type: WireType
) -> None:
    """Where devices change nothing, nothing changes, though what they begin with is rounded."""
    still = {"local_epochs": 0, "rounds": 1, "cloud_every": 0}
    exact = await run(recipe_of(tuning=still), tmp_path / "exact")
    narrow = replace(recipe_of(tuning=still | {"rounds": 3}), wire=Wire(orders=wire_type))
    rounded_orders = await run(narrow, tmp_path / "narrow")
    assert most_apart(exact.tunables, rounded_orders.tunables) < 1e-7


SMOOTH = {"epsilon": 0.1, "cloud_every": 0}  # steps as gradients are, so that a rounding here is none there


@pytest.mark.parametrize("wire_type", ["bfloat16", "int8"])
async def test_a_federation_with_few_bytes_is_the_formula(
    recipe_of: Callable[..., Recipe], foundation: Path, tmp_path: Path, one_thread: None, wire_type: WireType
) -> None:
    recipe = recipe_of(tuning=SMOOTH | {"rounds": 3}, evaluation={"requests": 0})
    none = replace(recipe, tuning=replace(recipe.tuning, local_epochs=0, rounds=1))
    begun = (await run(none, tmp_path / "begun")).tunables
    narrow, network = replace(recipe, wire=Wire(orders=wire_type, updates=wire_type)), RecordingNetwork()
    tuned = (await run(narrow, tmp_path / "narrow", network)).tunables
    exact = (await run(recipe, tmp_path / "exact")).tunables
    truth = by_hand(narrow, begun, foundation)
    # One number that is rounded the other way, here or there, is a step of its vector away.
    apart = sum(float((tuned[name] - truth[name]).abs().mean()) for name in truth) / len(truth)
    off = sum(float((exact[name] - truth[name]).abs().mean()) for name in truth) / len(truth)
    assert apart < off / 10
    assert most_apart(tuned, truth) < 1e-3
    sent = [s.message for s in network.sent if s.method == TUNE and s.message.tensors]
    types = {str(t.dtype) for m in sent for n, t in m.tensors.items() if not n.startswith("scale of ")}
    assert len(sent) == 24  # three rounds of four devices, there and back
    assert types == {f"torch.{wire_type}"}


async def test_an_edge_that_is_killed_goes_on_as_if_it_had_not_been(
    recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    """And its devices with it: an attempt that it did not count leaves nothing behind."""
    recipe = replace(recipe_of(tuning={"rounds": 4}), wire=Wire(orders="bfloat16", updates="int8"))
    network = RecordingNetwork(delay=lambda *_: 0.004)
    async with running(recipe, tmp_path / "disturbed", network) as (federation, engine):
        work = in_background(finish(federation))
        await until(lambda: any(s.message.read(TuneOrder).key.round_index == 2 for s in network.sent if is_order(s)))
        await engine.kill("edge-0")
        await engine.start_node("edge-0")
        finished = await asyncio.wait_for(work, 40)
    undisturbed = await run(recipe, tmp_path / "undisturbed")
    assert most_apart(undisturbed.tunables, finished.tunables) == 0
    check_errors(tmp_path)


def is_order(sent: Sent) -> bool:
    return sent.method == TUNE and sent.receiver_id.count(".") == 2


def check_errors(runs: Path) -> None:
    """Devices of both runs keep the same of the attempt that was counted last."""
    kept = {}
    for name in ("disturbed", "undisturbed"):
        nodes = runs / name / "nodes"
        state = EdgeState.load(nodes / "edge-0" / "state.safetensors")
        for folder in sorted(nodes.glob("edge-0.cluster-*")):
            feedback = Feedback(folder / "feedback.safetensors", "int8")
            feedback.begin(state.counted[folder.name.rpartition(".")[0]].attempt)
            zeros = {n: torch.zeros_like(t) for n, t in state.tunables.items()}
            kept.setdefault(folder.name, []).append(feedback.end(-1, zeros, zeros))
    assert len(kept) == 4
    for one, other in kept.values():
        assert any(bool(tensor.abs().sum() > 0) for tensor in one.values())
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
