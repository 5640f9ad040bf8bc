"""A federation that tunes a language model: what it learns is what plain `peft` learns, and anybody can load it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ecogen.config import Recipe, build_topology
from ecogen.engines.check import check_recipe
from ecogen.engines.launch import serve
from ecogen.engines.saving import save_run
from ecogen.errors import CheckpointError, ConfigError, DataError
from ecogen.models.adapters import load_tuned, load_whole
from ecogen.models.checkpoint import open_foundation
from ecogen.models.tunables import get_tunables
from ecogen.records import PhaseRecord, RequestRecord
from ecogen.tuning.passages import Passages
from ecogen.tuning.task import task_of
from tests.runs import Finished, run
from tests.texts import save_text_foundation, text_recipe, write_text
from tests.tiny import save_foundation, tiny_recipe
from tests.tuning.passages import fine_tune, lora_of, plain_peft

EPSILON = {"epsilon": 1e-3}


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_foundation(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def batches(recipe: Recipe, passages: Passages, cluster_index: int, round_index: int) -> Iterator[Passages]:
    """The order is a pure function of seed, round, cluster, owner and epoch; 3 is the key of orders."""
    for epoch in range(recipe.tuning.local_epochs):
        key = [recipe.seed, round_index, cluster_index, 0, epoch, 3]
        order = np.random.default_rng(key).permutation(len(passages))
        for begin in range(0, len(order), recipe.tuning.batch_size):
            yield passages[order[begin : begin + recipe.tuning.batch_size]]


def plain_round(recipe: Recipe, tunables: dict[str, Tensor], cluster_index: int, round_index: int) -> dict[str, Tensor]:
    """A round of one cluster, as fine-tuning with PEFT on one machine."""
    topology, folder = build_topology(recipe.topology), Path(recipe.model.source)
    node_id = f"edge-0.cluster-{cluster_index}.device-0"
    own = task_of(recipe, topology, folder).owned(node_id, [node_id])
    assert isinstance(own, Passages)
    plain, tuning = plain_peft(folder, tunables, recipe.tunables), recipe.tuning
    order = batches(recipe, own, cluster_index, round_index)
    fine_tune(
        plain,
        order,
        rate=tuning.learning_rate,
        decay=tuning.weight_decay,
        clip_norm=tuning.clip_norm,
        epsilon=tuning.epsilon,
    )
    return {name: parameter.detach() for name, parameter in lora_of(plain).items()}


def start_values(recipe: Recipe, finished: Finished) -> dict[str, Tensor]:
    foundation = open_foundation(Path(recipe.model.source))
    begun = get_tunables(load_whole(foundation, foundation.config, recipe.tunables, recipe.seed))
    assert begun.keys() == finished.tunables.keys()
    return begun


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
async def test_one_cluster_and_one_round_are_fine_tuning_with_peft(text: Path, tmp_path: Path, kind: str) -> None:
    folder = save_text_foundation(tmp_path / "model", kind)
    recipe = text_recipe(
        folder, text, topology={"clusters_per_edge": 1, "devices_per_cluster": 3}, tuning={"rounds": 1, **EPSILON}
    )
    finished = await run(recipe, tmp_path / "run")
    truth = plain_round(recipe, start_values(recipe, finished), 0, 0)
    for name, tensor in finished.tunables.items():
        torch.testing.assert_close(tensor, truth[name], rtol=1e-4, atol=1e-5)


async def test_a_round_is_the_mean_of_what_the_clusters_learn(foundation: Path, text: Path, tmp_path: Path) -> None:
    recipe = text_recipe(foundation, text, tuning={"rounds": 1, **EPSILON})
    finished = await run(recipe, tmp_path)
    begun = start_values(recipe, finished)
    one, other = (plain_round(recipe, begun, index, 0) for index in (0, 1))
    for name, tensor in finished.tunables.items():
        torch.testing.assert_close(tensor, (one[name] + other[name]) / 2, rtol=1e-4, atol=1e-5)


async def test_what_is_saved_loads_in_plain_peft_with_equal_logits(
    foundation: Path, text: Path, tmp_path: Path
) -> None:
    recipe = text_recipe(foundation, text)
    finished = await run(recipe, tmp_path / "nodes")
    saved = tmp_path / "saved"
    summary = save_run(saved, recipe, finished.records, open_foundation(foundation), finished.tunables, 1.0, "inproc")
    base = AutoModelForCausalLM.from_pretrained(saved / "backbone")
    plain, tuned = PeftModel.from_pretrained(base, saved / "adapter").eval(), load_tuned(saved)
    tokens = AutoTokenizer.from_pretrained(saved / "backbone")("what comes next", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, tuned(tokens).logits)
    held = {name: parameter for name, parameter in tuned.named_parameters() if "lora_" in name}
    assert all(torch.equal(held[n.replace(".weight", ".default.weight")], t) for n, t in finished.tunables.items())
    assert "plain PEFT gives the tuned model's outputs" in (saved / "adapter" / "README.md").read_text()

    found = json.loads((saved / "summary.json").read_text())["perplexity"]["edge-0"]
    last = finished.rounds("edge-0")[-1].perplexity
    assert found == summary["perplexity"]["edge-0"]
    assert found["tuned"] == last < found["delivered"]
    assert found["saved"] == pytest.approx(last, rel=1e-5)  # of one edge the cloud's average is its own
    html = (saved / "report.html").read_text()
    assert "Perplexity on held-out text" in html
    assert "<strong>Not sent:</strong> text." in html

    async with serve(saved) as federation:
        assert federation.recipe.data.is_text


async def test_what_an_edge_was_delivered_is_evaluated_once_and_requests_are_answered(
    foundation: Path, text: Path, tmp_path: Path
) -> None:
    finished = await run(text_recipe(foundation, text, topology={"edges": 2, "clusters_per_edge": 1}), tmp_path)
    delivered = [r for r in finished.records if isinstance(r, PhaseRecord) and r.perplexity is not None]
    assert {record.node_id for record in delivered} == {"edge-0", "edge-1"}
    assert len(delivered) == 2
    assert all(record.accuracy is None and record.perplexity for record in finished.rounds("cloud"))
    assert sum(isinstance(record, RequestRecord) for record in finished.records) == 4
    usages = [usage for record in finished.rounds("edge-0") for usage in record.usages]
    assert all(usage.flops > 0 for usage in usages)


async def test_with_the_lower_blocks_frozen_passages_are_sent_once(
    foundation: Path, text: Path, tmp_path: Path
) -> None:
    recipe = text_recipe(foundation, text, tunables={"first_block": 2}, topology={"clusters_per_edge": 1})
    finished = await run(recipe, tmp_path)
    first, second = (
        sum(t.payload_bytes for usage in record.usages for t in usage.traffic if t.kind == "activations")
        for record in finished.rounds("edge-0")
    )
    assert second < 0.7 * first


# What may be wrong.


def test_a_model_of_the_other_kind_is_refused_by_name(foundation: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a 'vit' model of images, but data\.name 'text' is of text"):
        check_recipe(text_recipe(save_foundation(tmp_path), text))
    with pytest.raises(ConfigError, match=r"is a 'llama' model of text, but data\.name 'digits' is of images"):
        check_recipe(tiny_recipe(foundation))


def test_too_little_text_is_an_error_before_anything_starts(foundation: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"edge-0 has \d passages; data.test 8 \+ data.validation 6 leave none"):
        check_recipe(text_recipe(foundation, write_text(tmp_path, num_words=20)))


def test_a_folder_without_a_tokenizer_is_an_error_before_anything_starts(foundation: Path, text: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (foundation / name).rename(foundation / f"{name}.away")
    try:
        with pytest.raises(CheckpointError, match="has no tokenizer"):
            check_recipe(text_recipe(foundation, text))
    finally:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (foundation / f"{name}.away").rename(foundation / name)


# What works as it does for images.


@pytest.mark.parametrize(
    "sections",
    [
        {"aggregation": {"strategy": "scaffold"}, "tuning": {"optimizer": "sgd", "learning_rate": 0.3}},
        {"aggregation": {"strategy": "fedadam", "server_rate": 0.02}},
        {"aggregation": {"buffer": 1}},
        {"tunables": {"cluster_ranks": {"edge-0.cluster-1": 1}}},
        {"wire": {"activations": "int8", "gradients": "bfloat16", "orders": "bfloat16", "updates": "int8"}},
        {"privacy": {"noise_multiplier": 0.001, "clip_norm": 5.0, "delta": 0.1}},
        {"compute": {"dtype": "bfloat16"}},
        {"placement": {"labels": "end"}, "data": {"owners": 2}},
        {"tunables": {"lora_rank": 0, "ia3": True}, "tuning": {"learning_rate": 0.05}},
        {"tunables": {"lora_kind": "dora", "first_block": 1}, "tuning": {"proximal": 0.1}},
    ],
    ids=str,
)
async def test_strategies_wire_types_and_kinds_of_adapters(
    foundation: Path, text: Path, tmp_path: Path, sections: dict[str, dict[str, object]]
) -> None:
    finished = await run(text_recipe(foundation, text, **sections), tmp_path)
    delivered = next(r.perplexity for r in finished.records if isinstance(r, PhaseRecord) and r.perplexity)
    tuned = finished.rounds("edge-0")[-1].perplexity
    assert tuned is not None
    assert tuned < delivered
