"""Recipes of text: the built-in one holds, and what only images have is refused by name, all in one pass."""

from __future__ import annotations

from typing import Any

import pytest

from ecogen import config
from ecogen.errors import ConfigError


def table(**sections: dict[str, Any]) -> dict[str, Any]:
    """The built-in recipe's table with some values changed."""
    whole = config.to_table(config.load("text"))
    return {name: value | sections.get(name, {}) if isinstance(value, dict) else value for name, value in whole.items()}


def problems(**sections: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        config.from_table(table(**sections))
    return raised.value.problems


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        (
            {"tunables": {"prompts": 4}},
            "tunables.prompts: prompts are visual ones, which a decoder of text has not; set 0",
        ),
        (
            {"tunables": {"head": True}},
            "tunables.head: a decoder of text has no head of its own for the task; set false",
        ),
        ({"tunables": {"backbone": "biases"}}, "tunables.backbone: of a decoder of text only adapters train"),
        (
            {"tunables": {"bottleneck": 4}},
            "tunables.bottleneck: plain PEFT has none, so nothing else could load the model",
        ),
        ({"tunables": {"blocks": {"0..1": {"prompts": 1}}}}, "tunables.prompts: prompts are visual"),
        ({"tuning": {"augmentation": 0.5}}, "tuning.augmentation: moves images; set 0 for text"),
        ({"tuning": {"augmentation_views": 2}}, "tuning.augmentation_views: are of images; set 0 for text"),
        ({"tuning": {"unlabelled": {"method": "fixmatch"}}}, "tuning.unlabelled.method: text needs no labels"),
        ({"data": {"labelled": 0.5}}, "data.labelled: text needs no labels; set 1"),
        ({"data": {"labels_of_edges": {"edge-0": [0, 1]}}}, "data.labels_of_edges: text has no classes; leave it out"),
        ({"data": {"partition": {"across_edges": "dirichlet"}}}, "data.partition.across_edges: Dirichlet draws are of"),
        (
            {"data": {"partition": {"across_edges": "iid", "within_edge": "dirichlet"}}},
            "data.partition.within_edge: Dir",
        ),
        ({"data": {"test": 0}}, "data.test: say how many passages of each edge are held out"),
        ({"data": {"name": "text"}}, "data.path: 'text' is what data.path names; give one"),
        ({"data": {"path": "own.txt"}}, "data.path: set data.name = 'text'"),
        (
            {"data": {"name": "pairs", "path": "mnist.npz"}},
            "data.path: pairs come from data.sources, which are read below ECOGEN_DATA",
        ),
        ({"evaluation": {"inversion": True}}, "evaluation.inversion: the attacks are on images; set false for text"),
        (
            {"pretraining": {"corpus": "glyphs"}},
            "pretraining.corpus: a model for 'documentation' learns from text; set 'documentation'",
        ),
        ({"model": {"num_heads": 64}}, "model.num_heads: 64 heads of width 3, which is to be even"),
        ({"tunables": {"lora_targets": []}}, "tunables.lora_targets: name one projection or more"),
        ({"tunables": {"lora_targets": ["q proj"]}}, "tunables.lora_targets.0: string should match pattern"),
        ({"model": {"vocabulary_size": 100}}, "model.vocabulary_size: input should be greater than or equal to 300"),
    ],
)
def test_what_contradicts_text_is_refused_by_name(sections: dict[str, Any], problem: str) -> None:
    assert any(found.startswith(problem) for found in problems(**sections)), problems(**sections)


def test_all_of_it_is_told_at_once() -> None:
    found = problems(
        tunables={"prompts": 4, "head": True}, tuning={"augmentation": 1.0}, evaluation={"inversion": True}
    )
    assert len(found) == 4


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"data": {"partition": {"across_edges": "domain"}}}, "data.partition.across_edges: images have no domains"),
        ({"pretraining": {"corpus": "documentation"}}, "pretraining.corpus: 'documentation' is text; set 'glyphs' or"),
    ],
)
def test_what_only_text_has_is_refused_for_images(sections: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        config.from_table(sections)


def test_a_study_of_text_is_refused_since_it_has_no_accuracy(tmp_path: Any) -> None:
    from ecogen.reports.toml import to_toml

    path = tmp_path / "study.toml"
    path.write_text(to_toml(table()) + '\n[sweep]\nseeds = [0]\n[[sweep.cases]]\nname = "a"\n')
    with pytest.raises(ConfigError, match="a study is a table of accuracies, which language models have none of"):
        config.load_study(path)
