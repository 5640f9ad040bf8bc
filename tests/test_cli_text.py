"""`ecogen run text` from its first step to plain PEFT, as small as it goes, with a process a node."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

SMALL = {
    "model.hidden_size": 16,
    "model.num_blocks": 2,
    "model.num_heads": 2,
    "model.intermediate_size": 32,
    "model.vocabulary_size": 300,
    "model.context_length": 16,
    "pretraining.steps": 3,
    "data.train": 12,
    "data.validation": 4,
    "data.test": 6,
    "tuning.rounds": 2,
    "tuning.local_epochs": 1,
    "topology.clusters_per_edge": 1,
    "topology.devices_per_cluster": 2,
    "evaluation.requests": 1,
}


def settings(**others: object) -> list[str]:
    values = SMALL | {name.replace("__", "."): value for name, value in others.items()}
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("engine", ["inproc", "local"])
def test_a_run_tells_the_perplexity_of_each_edge_before_and_after(
    ecogen: Callable[..., Any], tmp_path: Path, engine: str
) -> None:
    ran = ecogen("run", "text", "--json", "--engine", engine, "--out", tmp_path / "run", *settings())
    assert ran.code == 0, ran.err
    assert set(ran.figures["perplexity"]) == {"edge-0", "edge-1"}
    for found in ran.figures["perplexity"].values():
        assert found["tuned"] < found["delivered"] < 400
        assert found["saved"] < found["delivered"]
        assert len(found["per_round"]) == 2
    assert ran.figures["accuracy"]["last"] is None
    assert ran.figures["traffic_bytes"]["activations"] > 0
    assert "round 2/2  edge-0    perplexity" in ran.err
    assert "edge-0    perplexity" in ran.err.split("round 1/2")[0]  # delivered
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    AutoTokenizer.from_pretrained(tmp_path / "run" / "backbone")
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "backbone").load_adapter(str(tmp_path / "run" / "adapter"))

    shown = ecogen("report", tmp_path / "run", "--json")
    assert shown.figures["perplexity"] == ran.figures["perplexity"]


def test_instructions_of_a_users_own_are_tuned_on_and_a_picture_is_no_question(
    ecogen: Callable[..., Any], tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n} and one?", "completion": f"{n + 1}"} for n in range(12)]
    rows += [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]} for n in range(12)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = settings(data__name="text", data__path=str(tmp_path / "own.jsonl"), topology__edges=1)
    own += ["--set", "data.partition.across_edges=iid"]
    ran = ecogen("run", "text", "--json", "--out", tmp_path / "run", *own)
    assert ran.code == 0, ran.err
    assert ran.figures["perplexity"]["edge-0"]["tuned"] < ran.figures["perplexity"]["edge-0"]["delivered"]

    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG")
    asked = ecogen("predict", tmp_path / "run", picture)
    assert asked.code == 2
    assert "inputs are text, not pictures; ask it with `ecogen serve`" in asked.err


def test_text_that_cannot_be_read_ends_before_anything_is_made(ecogen: Callable[..., Any], tmp_path: Path) -> None:
    ran = ecogen(
        "run", "text", "--out", tmp_path / "run", *settings(data__name="text", data__path=str(tmp_path / "none"))
    )
    assert ran.code == 2
    assert "there is no" in ran.err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_a_plan_needs_no_model(ecogen: Callable[..., Any]) -> None:
    ran = ecogen("plan", "text", "--json", *settings())
    assert ran.code == 0, ran.err
    assert len(ran.figures["clusters"]) == 2
