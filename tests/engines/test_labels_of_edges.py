"""Edges that know different labels: heads stay where they are, the rest is averaged, answers are true labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from ecogen.config import Recipe
from ecogen.engines.launch import launch, serve
from ecogen.engines.saving import rebuild_report
from ecogen.errors import CheckpointError, RunError
from ecogen.models.adapters import load_tuned
from ecogen.tuning.aggregate import Update, aggregate
from ecogen.tuning.data import load_pictures, load_splits
from ecogen.tuning.messages import SYNC, SyncOrder
from tests.runs import finish, run, running
from tests.tiny import RecordingNetwork

RecipeOf = Callable[..., Recipe]

EDGES = {"edges": 2, "clusters_per_edge": 1, "devices_per_cluster": 1}
LABELS = {"edge-0": [4, 0, 2], "edge-1": [1, 3, 5, 7]}


@pytest.fixture
def uneven(recipe_of: RecipeOf) -> Callable[..., Recipe]:
    def make(**sections: object) -> Recipe:
        data = {"labels_of_edges": LABELS}
        return recipe_of(**{"data": data, "topology": EDGES, "evaluation": {"requests": 1}} | sections)

    return make


async def test_the_rest_is_averaged_and_heads_never_reach_the_cloud(
    uneven: Callable[..., Recipe], tmp_path: Path
) -> None:
    network = RecordingNetwork()
    async with running(uneven(), tmp_path, network) as (federation, _):
        finished = await finish(federation)
        edges = {edge: await federation.tunables_of(edge) for edge in ("edge-0", "edge-1")}
    shared = finished.tunables
    assert shared
    assert not [name for name in shared if name.startswith("classifier.")]
    for own in edges.values():
        assert all(torch.equal(own[name], shared[name]) for name in shared)
    assert edges["edge-0"]["classifier.weight"].shape == (3, 16)
    assert edges["edge-1"]["classifier.weight"].shape == (4, 16)
    assert all(float(own["classifier.weight"].abs().max()) > 0 for own in edges.values())

    to_cloud = [sent for sent in network.sent if sent.receiver_id == "cloud"]
    assert not [name for sent in to_cloud for name in sent.message.tensors if name.startswith("classifier.")]
    last = [sent for sent in to_cloud if sent.method == SYNC and sent.message.read(SyncOrder).round_index == 1]
    updates = [Update(sent.sender_id, sent.message.tensors, sent.message.read(SyncOrder).num_examples) for sent in last]
    assert len({update.num_examples for update in updates}) == 2
    mean = aggregate(updates)
    assert all(torch.equal(mean[name], shared[name]) for name in shared)
    assert [record.accuracy for record in finished.rounds("cloud")] == [None, None]


async def test_where_sets_are_the_same_nothing_changes(recipe_of: RecipeOf, tmp_path: Path) -> None:
    everything = {"labels_of_edges": {"edge-0": list(reversed(range(10))), "edge-1": list(range(10))}}
    plain = await run(recipe_of(topology=EDGES), tmp_path / "plain", timeout_s=90)
    given = await run(recipe_of(topology=EDGES, data=everything), tmp_path / "given", timeout_s=90)
    assert plain.tunables.keys() == given.tunables.keys()
    assert all(torch.equal(plain.tunables[name], given.tunables[name]) for name in plain.tunables)
    assert [r.accuracy for r in plain.rounds("cloud")] == [r.accuracy for r in given.rounds("cloud")]


async def test_an_edge_that_starts_again_keeps_its_head(uneven: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = uneven(tuning={"rounds": 4})
    undisturbed = await run(recipe, tmp_path / "one", timeout_s=90)
    async with running(recipe, tmp_path / "other") as (federation, engine):
        async for record in federation.tune():
            if record.node_id == "edge-0" and record.round_index == 1:
                await engine.kill("edge-0")
                await engine.start_node("edge-0")
        resumed = await federation.tunables()
        head = (await federation.tunables_of("edge-0"))["classifier.weight"]
    assert head.shape == (3, 16)
    assert all(torch.equal(undisturbed.tunables[name], resumed[name]) for name in resumed)


@pytest.mark.parametrize("cloud_every", [1, 0])
async def test_a_saved_run_answers_with_true_labels_of_each_edge(
    uneven: Callable[..., Recipe], tmp_path: Path, cloud_every: int
) -> None:
    recipe = uneven(tuning={"cloud_every": cloud_every, "rounds": 3})
    async with launch(recipe) as federation:
        async for _ in federation.tune():
            pass
        summary = await federation.save(tmp_path / "run")
    picture = tmp_path / "picture.png"
    image = load_splits(recipe.data, 8, recipe.seed).test.images[0, 0]
    Image.fromarray(((image + 1) * 127.5).byte().numpy()).save(picture)
    for edge, labels in LABELS.items():
        model = load_tuned(tmp_path / "run", edge=edge)
        assert list(model.config.id2label.values()) == [str(label) for label in sorted(labels)]
        place = int(model(pixel_values=load_pictures([picture], 8)).logits.argmax())
        async with serve(tmp_path / "run", edge=edge) as federation:
            asked = await federation.ask("edge-0.cluster-0.device-0", [picture])
        assert asked.labels == [sorted(labels)[place]]
        adapter = json.loads((tmp_path / "run" / "edges" / edge / "adapter" / "adapter_config.json").read_text())
        backbone = tmp_path / "run" / "edges" / edge / "adapter" / adapter["base_model_name_or_path"]
        assert (backbone / "config.json").exists()

    # The headline weighs the edges by the examples of their labels.
    truth = load_splits(recipe.data, 8, recipe.seed).validation.labels.tolist()
    counts = {edge: sum(label in labels for label in truth) for edge, labels in LABELS.items()}
    last = {edge: summary["accuracy"]["per_edge"][edge][-1] for edge in LABELS}
    mean = sum(counts[edge] * last[edge] for edge in LABELS) / sum(counts.values())
    assert summary["accuracy"]["last"] == pytest.approx(mean)
    assert rebuild_report(tmp_path / "run")["accuracy"] == summary["accuracy"]
    if cloud_every == 0:  # nobody changed the models after the edges evaluated them
        facts = json.loads((tmp_path / "run" / "facts.json").read_text())
        assert facts["saved_accuracy"] == pytest.approx(last)
    assert "The edges know different labels" in (tmp_path / "run" / "report.html").read_text()

    with pytest.raises(CheckpointError, match=r"has a model for each edge; name one: edge-0, edge-1"):
        load_tuned(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"name one: edge-0, edge-1, not 'edge-7'"):
        load_tuned(tmp_path / "run", edge="edge-7")


async def test_an_ordinary_run_has_one_model_for_all_its_edges(recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of(topology=EDGES, tuning={"rounds": 1}, evaluation={"requests": 0})
    async with launch(recipe) as federation:
        async for _ in federation.tune():
            pass
        await federation.save(tmp_path / "run")
    assert load_tuned(tmp_path / "run").config.num_labels == 10
    with pytest.raises(RunError, match=r"has no edge 'edge-9'; name one of edge-0, edge-1"):
        async with serve(tmp_path / "run", edge="edge-9"):
            pass
