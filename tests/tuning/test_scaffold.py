"""SCAFFOLD equals Karimireddy et al. 2020, Algorithm 1 with option II, written here once more; and what an attempt
leaves on a device's disk counts only where the edge has counted the attempt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import ViTForImageClassification

from ecogen.config import Aggregation, Recipe
from ecogen.errors import AggregationError, ProtocolError
from ecogen.models.adapters import classification_config
from ecogen.models.checkpoint import open_foundation
from ecogen.models.tunables import tunables_of
from ecogen.runtime import membership
from ecogen.runtime.stage import OptimizerSettings
from ecogen.tuning.aggregate import Update, check_update
from ecogen.tuning.controls import Controls
from ecogen.tuning.data import load_splits, partition_examples
from ecogen.tuning.device import LocalData
from ecogen.tuning.edge_state import EdgeState
from ecogen.tuning.messages import CONTROL, TUNE, TuneOrder, split_controls
from ecogen.tuning.strategies import scaffold
from tests.plain import PlainModel
from tests.runs import finish, in_background, run, running, until
from tests.tiny import RecordingNetwork, Sent, tiny_vit
from tests.tuning.clusters import Case, cases, plain_of, random_batches, random_tunables, stages_of, tune_cluster

RATE = 0.05
Tunables = dict[str, Tensor]


def option_ii(
    model: PlainModel, batches: Sequence[tuple[Tensor, Tensor]], c: Mapping[str, Tensor], c_i: Mapping[str, Tensor]
) -> tuple[Tunables, Tunables]:
    """Lines 7 to 12 of the algorithm at one client, with plain SGD: y_i and c_i+."""
    y = model.tunables
    x = {name: tensor.detach().clone() for name, tensor in y.items()}
    for images, labels in batches:
        loss = cross_entropy(model.logits(images), labels)
        gradients = torch.autograd.grad(loss, list(y.values()), allow_unused=True)
        with torch.no_grad():
            for (name, value), gradient in zip(y.items(), gradients, strict=True):
                g = torch.zeros_like(value) if gradient is None else gradient
                value -= RATE * (g - c_i[name] + c[name])
    after = {name: tensor.detach() for name, tensor in y.items()}
    new = {n: c_i[n] - c[n] + (x[n] - after[n]) / (len(batches) * RATE) for n in x} if batches else dict(c_i)
    return after, new


@example(Case(3, (1, 2), "start", owners=3), 2, 2)
@example(Case(3, (1, 2), "end", owners=2), 1, 1)
@given(case=cases(max_blocks=4), microbatches=st.integers(1, 3), num_epochs=st.integers(1, 2))
@settings(max_examples=6)
def test_local_steps_with_a_correction_are_the_algorithms_wherever_the_model_is_cut(
    case: Case, microbatches: int, num_epochs: int
) -> None:
    begun = {name: tensor.double() for name, tensor in random_tunables(case).items()}
    c, c_i = ({n: 0.2 * t.double() for n, t in random_tunables(case, seed).items()} for seed in (5, 6))
    batches = random_batches(4, 4, dtype=torch.float64)
    stages = stages_of(case, double=True)
    tuned = asyncio.run(
        tune_cluster(
            case,
            begun,
            batches,
            OptimizerSettings(RATE, optimizer="sgd"),
            stages=stages,
            num_microbatches=microbatches,
            num_epochs=num_epochs,
            correction={name: c[name] - c_i[name] for name in c},
        )
    )
    model = plain_of(tiny_vit(case.config).double(), begun, case.spec)
    y, new = option_ii(model, [(b.images, b.labels) for b in batches], c, c_i)
    torch.testing.assert_close(tuned.tunables, y, rtol=0, atol=1e-6)
    for node_id, stage in stages.items():  # of several owners each knows the mean of what only the start tunes
        sums = stage.gradient_sums()
        assert sums.keys() == tunables_of(begun, case.held_by(node_id)).keys()
        for name, total in sums.items():
            torch.testing.assert_close(total / 4, new[name], rtol=0, atol=1e-6)


def test_clipping_and_the_proximal_term_come_after_the_correction() -> None:
    """And the mean of the gradients is that of the loss alone."""
    case = Case(2, (1,))
    begun = {name: tensor.double() for name, tensor in random_tunables(case).items()}
    correction = {n: t.double() for n, t in random_tunables(case, 5).items()}
    (batch,) = random_batches(1, 4, dtype=torch.float64)
    stages = stages_of(case, double=True)
    chosen = OptimizerSettings(RATE, clip_norm=0.5, proximal=3.0, optimizer="sgd")
    tuned = asyncio.run(tune_cluster(case, begun, [batch], chosen, stages=stages, correction=correction))
    model = plain_of(tiny_vit(case.config).double(), begun, case.spec)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in begun.items()}
    _, gradient = option_ii(model, [(batch.images, batch.labels)], zeros, zeros)
    total = {name: gradient[name] + correction[name] for name in gradient}  # proximal: nothing away yet at step one
    norm = torch.stack([t.square().sum() for t in total.values()]).sum().sqrt()
    expected = {name: begun[name] - RATE * total[name] * min(1, 0.5 / norm) for name in begun}
    torch.testing.assert_close(tuned.tunables, expected, rtol=0, atol=1e-6)
    sums = {name: t for stage in stages.values() for name, t in stage.gradient_sums().items()}
    torch.testing.assert_close(sums, gradient, rtol=0, atol=1e-6)


# The server.


@given(st.integers(0, 100), st.booleans())
def test_the_server_is_the_algorithms_over_rounds_in_which_clusters_are_missing(seed: int, alike: bool) -> None:
    """Clients weigh as their examples; where they have equally many, that is the paper's formula to the letter."""
    rng = np.random.default_rng(seed)
    examples = [10, 10, 10] if alike else [10, 20, 5]
    spec = Aggregation(strategy="scaffold", server_rate=0.7)
    x, c, memory = rng.normal(size=3), np.zeros(3), {}
    tunables = {"w": torch.tensor(x)}
    for chosen in ([0, 1, 2], [0, 2], [1], [0, 1, 2]):
        y, dc = rng.normal(size=(2, 3, 3))
        updates = [Update(f"c{i}", {"w": torch.tensor(y[i])}, examples[i], {"w": torch.tensor(dc[i])}) for i in chosen]
        tunables, memory = scaffold(tunables, updates, memory, spec)
        k = np.array(examples)[chosen]
        x = x + 0.7 * (k @ (y[chosen] - x)) / k.sum()
        c = c + (len(chosen) / 3 * dc[chosen].mean(axis=0) if alike else k @ dc[chosen] / sum(examples))
        np.testing.assert_allclose(tunables["w"].numpy(), x, atol=1e-12)
        np.testing.assert_allclose(memory[CONTROL + "w"].numpy(), c, atol=1e-12)


@pytest.mark.parametrize("wrong", [{"w": torch.tensor([torch.nan])}, {"w": torch.zeros(2)}, {"v": torch.zeros(1)}])
def test_control_variates_that_are_none_are_refused(wrong: Tunables) -> None:
    with pytest.raises(AggregationError, match="update of 'far' has"):
        check_update(Update("far", {"w": torch.zeros(1)}, 10, wrong), {"w": torch.zeros(1)})


# The whole.


def by_hand(recipe: Recipe, initial: Tunables, foundation: Path, rounds: int) -> Tunables:
    """Algorithm 1 over all clusters of the recipe, on the whole model."""
    opened = open_foundation(foundation)
    splits = load_splits(recipe.data, recipe.model.image_size, recipe.seed)
    parts = partition_examples(splits.train.labels, recipe.data.partition, [2], recipe.seed)[0]
    data = [LocalData(splits.train[own], recipe.seed, index) for index, own in enumerate(parts)]
    x = initial
    c = {name: torch.zeros_like(tensor) for name, tensor in x.items()}
    c_i = [dict(c), dict(c)]
    for round_index in range(rounds):
        ys, news = [], []
        for index, own in enumerate(data):
            whole = ViTForImageClassification(classification_config(opened, 10)).eval()
            whole.load_state_dict(opened.read(whole.state_dict()), strict=False)
            model = plain_of(whole, x, recipe.tunables)
            batches = [(b.images, b.labels) for b in own.batches(recipe.tuning, round_index, 0)]
            y, new = option_ii(model, batches, c, c_i[index])
            ys.append(y)
            news.append(new)
        x = {name: (ys[0][name] + ys[1][name]) / 2 for name in x}
        c = {name: c[name] + sum(news[i][name] - c_i[i][name] for i in (0, 1)) / 2 for name in c}
        c_i = news
    return x


SGD = {"optimizer": "sgd", "learning_rate": RATE, "clip_norm": 0.0, "weight_decay": 0.0, "cloud_every": 0}


async def test_a_federation_with_plain_sgd_is_the_published_algorithm(
    recipe_of: Callable[..., Recipe], foundation: Path, tmp_path: Path, one_thread: None
) -> None:
    recipe = recipe_of(aggregation={"strategy": "scaffold"}, tuning=SGD | {"rounds": 3}, evaluation={"requests": 0})
    begun = (
        await run(replace(recipe, tuning=replace(recipe.tuning, local_epochs=0, rounds=1)), tmp_path / "0")
    ).tunables
    tuned = (await run(recipe, tmp_path / "3")).tunables
    truth = by_hand(recipe, begun, foundation, 3)
    fedavg = await run(replace(recipe, aggregation=Aggregation()), tmp_path / "fedavg")
    assert max(float((tuned[name] - truth[name]).abs().max()) for name in truth) < 1e-5
    assert max(float((fedavg.tunables[name] - truth[name]).abs().max()) for name in truth) > 1e-4


# What an attempt leaves behind.

HELD = {"a": torch.zeros(2), "b": torch.zeros(3)}


def sums_of(value: float) -> Tunables:
    return {name: torch.full_like(tensor, value) for name, tensor in HELD.items()}


def values(tensors: Mapping[str, Tensor]) -> set[float]:
    assert tensors.keys() == HELD.keys()
    return {value for tensor in tensors.values() for value in tensor.tolist()}


def test_each_attempt_goes_on_from_the_last_that_was_counted(tmp_path: Path) -> None:
    """And not from what a broken-off one left, whether the device lives on or comes back from its disk."""
    for is_new in (False, True):
        path = tmp_path / f"{is_new}.safetensors"
        controls = Controls(path)

        def c_i(counted: int | None, held: Controls) -> float:
            (value,) = values(held.begin(counted, {}, HELD))
            return -value or 0.0

        assert c_i(None, controls) == 0
        assert values(controls.end(1, sums_of(6.0), 2)) == {3.0}
        controls = Controls(path) if is_new else controls
        assert c_i(None, controls) == 0  # the edge died before it counted attempt 1
        assert values(controls.end(2, sums_of(8.0), 2)) == {4.0}
        controls = Controls(path) if is_new else controls
        assert c_i(2, controls) == 4
        assert values(controls.end(3, sums_of(2.0), 2)) == {-3.0}
        controls = Controls(path) if is_new else controls
        assert c_i(2, controls) == 4  # attempt 3 was broken off elsewhere in the cluster
        controls = Controls(path) if is_new else controls
        assert c_i(3, controls) == 1  # unless the edge says that it counted it
        with pytest.raises(
            ProtocolError, match=r"does not have the control variate of attempt 9, .* those of \[2, 3\]"
        ):
            controls.begin(9, {}, HELD)


def test_the_correction_is_c_minus_c_i_and_no_steps_change_nothing(tmp_path: Path) -> None:
    controls = Controls(tmp_path / "controls.safetensors")
    assert values(controls.begin(None, sums_of(5.0), HELD)) == {5.0}
    controls.end(1, sums_of(3.0), 1)
    assert values(controls.begin(1, sums_of(5.0), HELD)) == {2.0}
    assert values(controls.end(2, sums_of(0.0), 0)) == {0.0}
    assert values(controls.begin(2, sums_of(5.0), HELD)) == {2.0}


MIDDLE = "edge-0.cluster-0.device-1"


@pytest.mark.parametrize(("lost", "owners"), [("edge-0", 1), ("edge-0", 2), (MIDDLE, 1), (MIDDLE, 2)])
async def test_whoever_is_killed_c_stays_the_mean_of_all_c_i(
    recipe_of: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, owners: int
) -> None:
    """And after an edge's death, all is as in an undisturbed run."""
    monkeypatch.setattr(membership, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(membership, "SILENCE_S", 20.0)
    recipe = recipe_of(aggregation={"strategy": "scaffold"}, tuning={"rounds": 4}, data={"owners": owners})
    network = RecordingNetwork(delay=lambda *_: 0.004)
    async with running(recipe, tmp_path / "disturbed", network) as (federation, engine):
        work = in_background(finish(federation))
        await until(lambda: any(s.message.read(TuneOrder).key.round_index == 2 for s in network.sent if is_order(s)))
        await engine.kill(lost)
        await engine.start_node(lost)
        finished = await asyncio.wait_for(work, 40)
    check_controls(tmp_path / "disturbed" / "nodes")
    if lost == "edge-0":
        undisturbed = await run(recipe, tmp_path / "undisturbed")
        assert all(torch.equal(tensor, finished.tunables[name]) for name, tensor in undisturbed.tunables.items())


def is_order(sent: Sent) -> bool:
    return sent.method == TUNE and sent.receiver_id.count(".") == 2


def check_controls(nodes: Path) -> None:
    """The edge's c is the mean of what its devices hold of the attempts that it counted; both clusters are as large."""
    state = EdgeState.load(nodes / "edge-0" / "state.safetensors")
    _, c = split_controls(state.memory)
    assert all(tensor.abs().max() > 0 for tensor in c.values())
    held: dict[str, dict[str, Tensor]] = {}
    for folder in sorted(nodes.glob("edge-0.cluster-*")):
        cluster_id = folder.name.rpartition(".")[0]
        own = Controls(folder / "controls.safetensors").begin(state.counted[cluster_id].attempt, {}, c)
        for name, tensor in own.items():  # what several devices hold, they agree on
            assert torch.equal(held.setdefault(cluster_id, {}).setdefault(name, tensor), tensor)
    for name, tensor in c.items():
        mean = -sum(cluster[name].double() for cluster in held.values()) / len(held)
        torch.testing.assert_close(tensor, mean, rtol=1e-4, atol=1e-6)
