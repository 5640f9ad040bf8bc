"""Complete runs in one process: what a federation learns is what plain fine-tuning learns, averaged by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import ViTForImageClassification

from ecogen.config import Recipe
from ecogen.models.adapters import classification_config, load_whole
from ecogen.models.checkpoint import open_foundation
from ecogen.models.profile import model_shape
from ecogen.models.tunables import get_tunables
from ecogen.models.vit import whole_segment
from ecogen.planning.cost import backward_flops, forward_flops
from ecogen.records import EventRecord, RoundRecord
from ecogen.tuning.data import Examples, load_splits, partition_examples
from tests.plain import fine_tune
from tests.runs import Finished, logged, run, running
from tests.tuning.clusters import plain_of

RecipeOf = Callable[..., Recipe]


async def test_frozen_blocks_are_sent_through_once_and_never_again(recipe_of: RecipeOf, tmp_path: Path) -> None:
    """What crosses between devices in each round, in bytes of activations and gradients."""
    sections = {"topology": {"clusters_per_edge": 1, "devices_per_cluster": 3}, "tunables": {"first_block": 1}}
    tuning = {"rounds": 3, "local_epochs": 2, "augmentation": 0.5}
    kept = await run(recipe_of(**sections, tuning=tuning | {"augmentation_views": 2}), tmp_path / "kept")
    none = {"prefix_memory_mib": 0, "prefix_disk_mib": 0}
    sent = await run(recipe_of(**sections, tuning=tuning | {"augmentation_views": 2} | none), tmp_path / "sent")
    assert all(torch.equal(kept.tunables[name], tensor) for name, tensor in sent.tunables.items())
    row = 4 * 5 * 16  # five tokens of width 16
    assert sent_in_rounds(sent) == [row * 48 * 2 * 3 + 4 * 16 * 48 * 2 * 2] * 3
    assert sent_in_rounds(kept)[0] == sent_in_rounds(sent)[0] + 8 * 48 * 2  # a key each
    assert sent_in_rounds(kept)[1:] == [row * 48 * 2 * 2 + 4 * 16 * 48 * 2 * 2] * 2


@pytest.mark.parametrize("is_plain", [True, False])
async def test_what_is_computed_and_sent_is_as_the_wire_says(
    recipe_of: RecipeOf, tmp_path: Path, is_plain: bool
) -> None:
    """Plain split learning computes and sends all tokens to the end; an edge's own evaluation never has to."""
    wire = {"tokens": "all", "gradients_to": "start"} if is_plain else {}
    recipe = recipe_of(
        topology={"edges": 1, "clusters_per_edge": 1, "devices_per_cluster": 3},
        tuning={"rounds": 1, "local_epochs": 2},
        wire=wire,
    )
    finished = await run(recipe, tmp_path / "run")
    (record,) = finished.rounds("edge-0")
    row, cls, passes = 4 * 5 * 16, 4 * 16, record.num_examples * 2
    assert sent_in_rounds(finished) == [passes * 2 * (2 * row + (row if is_plain else cls))]  # three links, both ways
    config = classification_config(open_foundation(Path(recipe.model.source)), 10)
    of_devices, of_edge = (model_shape(config, recipe.tunables, tokens) for tokens in (recipe.wire.tokens, "needed"))
    whole = whole_segment(config)
    tuned = passes * (forward_flops(of_devices, whole) + backward_flops(of_devices, whole))
    assert sum(usage.flops for usage in record.usages if usage.node_id != "edge-0") == tuned
    splits = load_splits(recipe.data, recipe.model.image_size, recipe.seed)
    evaluated = len(getattr(splits, recipe.evaluation.split)) * forward_flops(of_edge, whole)
    assert sum(usage.flops for usage in record.usages if usage.node_id == "edge-0") == evaluated


async def test_leaving_before_the_end_loses_no_node(
    recipe_of: RecipeOf, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a child to its parent nor a parent to its children, which send it heartbeats all the time."""
    monkeypatch.setattr("ecogen.runtime.membership.HEARTBEAT_S", 0.002)
    async with running(recipe_of(tuning={"rounds": 50}), tmp_path) as (federation, _):
        async for record in federation.watch():
            if isinstance(record, RoundRecord):
                break
    lost = [entry.getMessage() for entry in caplog.records if "lost" in entry.getMessage()]
    assert not lost
    assert not [record for record in logged(tmp_path) if isinstance(record, EventRecord) and "lost" in record.event]


def sent_in_rounds(finished: Finished) -> list[int]:
    """Payload bytes of activations and gradients in each round of the edge, before any request is served."""
    return [
        sum(
            traffic.payload_bytes
            for usage in record.usages
            for traffic in usage.traffic
            if traffic.kind in ("activations", "gradients")
        )
        for record in finished.rounds("edge-0")
    ]


def start_values(recipe: Recipe) -> dict[str, Tensor]:
    """The tunables that a federation begins with."""
    foundation = open_foundation(Path(recipe.model.source))
    config = classification_config(foundation, 10)
    return get_tunables(load_whole(foundation, config, recipe.tunables, recipe.seed))


def plain_round(
    recipe: Recipe, tunables: dict[str, Tensor], examples: Examples, cluster_index: int, round_index: int = 0
) -> dict[str, Tensor]:
    """A round of one cluster, as plain fine-tuning of the whole model."""
    whole = ViTForImageClassification.from_pretrained(recipe.model.source, num_labels=10).eval()
    with torch.no_grad():
        whole.classifier.weight.zero_(), whole.classifier.bias.zero_()
    plain = plain_of(whole, tunables, recipe.tunables)
    tuning = recipe.tuning
    fine_tune(
        plain,
        batches(recipe, examples, cluster_index, round_index),
        learning_rate=tuning.learning_rate * tuning.learning_rate_decay**round_index,
        weight_decay=tuning.weight_decay,
        clip_norm=tuning.clip_norm,
    )
    return {name: tensor.detach() for name, tensor in plain.tunables.items()}


def batches(
    recipe: Recipe, examples: Examples, cluster_index: int, round_index: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The order is a pure function of seed, round, cluster, owner and epoch; 3 is the key of orders."""
    owners = recipe.data.owners
    for epoch in range(recipe.tuning.local_epochs):
        for owner in range(owners):
            own = torch.arange(len(examples))[owner::owners]
            key = [recipe.seed, round_index, cluster_index, owner, epoch, 3]
            order = own[torch.from_numpy(np.random.default_rng(key).permutation(len(own)))]
            for part in order.split(recipe.tuning.batch_size):
                yield examples.images[part], examples.labels[part]


def weighted_mean(parts: list[tuple[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
    total = sum(weight for weight, _ in parts)
    names = parts[0][1]
    return {name: sum(tensors[name].double() * (weight / total) for weight, tensors in parts).float() for name in names}


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    worst = max(float((left[name] - right[name]).abs().max()) for name in left)
    assert worst < tolerance


@pytest.mark.parametrize(
    ("labels", "devices", "microbatches", "owners"),
    [
        ("start", 3, 1, 1),
        ("start", 2, 3, 2),
        ("end", 3, 2, 1),
        ("end", 3, 1, 3),
        ("start", 1, 1, 1),
        ("start", 3, 2, 3),
    ],
)
async def test_one_cluster_is_plain_fine_tuning_of_the_whole_model(
    recipe_of: RecipeOf, tmp_path: Path, labels: str, devices: int, microbatches: int, owners: int
) -> None:
    recipe = recipe_of(
        topology={"clusters_per_edge": 1, "devices_per_cluster": devices},
        data={"owners": owners},
        placement={"labels": labels},
        tuning={"rounds": 2, "local_epochs": 2, "microbatches": microbatches, "learning_rate_decay": 0.5},
        evaluation={"split": "none", "requests": 0},
    )
    finished = await run(recipe, tmp_path)
    examples = load_splits(recipe.data, 8, recipe.seed).train
    plain = start_values(recipe)
    for round_index in range(2):
        plain = plain_round(recipe, plain, examples, 0, round_index)
    moved = max(float((plain[name] - start).abs().max()) for name, start in start_values(recipe).items())
    assert moved > 0.05
    assert_close(finished.tunables, plain, 2e-4)
    assert [record.num_examples for record in finished.rounds("edge-0")] == [48, 48]


async def test_clusters_and_edges_are_averaged_by_their_examples(recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of(
        data={"train": 60, "partition": {"across_edges": "dirichlet", "within_edge": "dirichlet", "alpha": 0.7}},
        topology={"edges": 2, "clusters_per_edge": 2},
        tuning={"rounds": 1},
        evaluation={"requests": 0},
    )
    finished = await run(recipe, tmp_path)
    train = load_splits(recipe.data, 8, recipe.seed).train
    edges = partition_examples(train.labels, recipe.data.partition, [2, 2], recipe.seed)
    clusters = [part for edge in edges for part in edge]
    assert len({len(part) for part in clusters}) > 1
    start = start_values(recipe)
    parts = [(len(part), plain_round(recipe, start, train[part], index)) for index, part in enumerate(clusters)]
    assert_close(finished.tunables, weighted_mean(parts), 2e-4)
    for edge, record in zip(edges, (finished.rounds("edge-0")[0], finished.rounds("edge-1")[0]), strict=True):
        assert record.num_examples == sum(len(part) for part in edge)
    assert finished.rounds("cloud")[0].num_examples == 60


async def test_the_same_recipe_gives_the_same_bits(recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of(tuning={"augmentation": 0.5}, topology={"devices_per_cluster": 3})
    one, other = await run(recipe, tmp_path / "one"), await run(recipe, tmp_path / "other")
    assert all(torch.equal(one.tunables[name], other.tunables[name]) for name in one.tunables)
    assert [r.accuracy for r in one.rounds("cloud")] == [r.accuracy for r in other.rounds("cloud")]
    assert [r.loss for r in one.rounds("edge-0")] == [r.loss for r in other.rounds("edge-0")]


async def test_where_labels_are_and_where_the_model_is_cut_changes_nothing_that_is_learned(
    recipe_of: RecipeOf, tmp_path: Path
) -> None:
    runs = [
        await run(recipe_of(placement=placement, topology={"devices_per_cluster": devices}), tmp_path / str(index))
        for index, (devices, placement) in enumerate(
            [(1, {}), (2, {"cuts": [1]}), (2, {"cuts": [2], "labels": "end"}), (3, {"labels": "start"})]
        )
    ]
    for other in runs[1:]:
        assert_close(other.tunables, runs[0].tunables, 2e-4)


async def test_edges_alone_learn_from_their_own_clusters_only(recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of(
        topology={"edges": 2, "clusters_per_edge": 1}, tuning={"cloud_every": 0}, evaluation={"requests": 0}
    )
    finished = await run(recipe, tmp_path)
    assert not finished.rounds("cloud")
    train = load_splits(recipe.data, 8, recipe.seed).train
    (own,), _ = partition_examples(train.labels, recipe.data.partition, [1, 1], recipe.seed)
    plain = start_values(recipe)
    for round_index in range(2):
        plain = plain_round(recipe, plain, train[own], 0, round_index)
    assert_close(finished.tunables, plain, 2e-4)


async def test_every_phase_is_reported_once_and_every_node_in_it(recipe_of: RecipeOf, tmp_path: Path) -> None:
    finished = await run(recipe_of(), tmp_path)
    phases = [record for record in finished.records if type(record).__name__ == "PhaseRecord"]
    assert sorted((record.phase, record.node_id) for record in phases) == [
        ("delivery", "edge-0"),
        ("delivery", "edge-0.cluster-0.device-0"),
        ("delivery", "edge-0.cluster-0.device-1"),
        ("delivery", "edge-0.cluster-1.device-0"),
        ("delivery", "edge-0.cluster-1.device-1"),
        ("pretraining", "cloud"),
        ("serving", "cloud"),
        ("serving", "edge-0"),
    ]
    serving = next(record for record in phases if (record.phase, record.node_id) == ("serving", "edge-0"))
    assert len({usage.node_id for usage in serving.usages}) == 5
    assert [event.node_id for event in finished.events("finished")] == ["edge-0", "cloud"]
