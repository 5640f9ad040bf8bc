"""An edge's domain that changes with the rounds: what it has then is new, and nobody else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ecogen.config import Recipe, build_topology
from ecogen.errors import ConfigError
from ecogen.relay.assessment import Assessor
from ecogen.tuning.captions import digit_caption
from ecogen.tuning.data import Examples
from ecogen.tuning.device import LocalData
from ecogen.tuning.pair_data import PairSplits, domain_at, domains_of, read_pairs
from ecogen.tuning.task import PassageTask, task_of
from tests.pictures import SIZES, pair_recipe, save_pair_foundation

EDGES = ["edge-0", "edge-1"]
SIZE = (1, SIZES.image_size)


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair_foundation(tmp_path_factory.mktemp("model"))


def changing(foundation: Path, later: dict[str, Any], **sections: Any) -> Recipe:
    sources = {
        "edge-0": {"name": "digits", "labels": [0, 1, 2], "later": later},
        "edge-1": {"name": "digits", "labels": [3, 5]},
    }
    return pair_recipe(foundation, data={"sources": sources}, **{"tuning": {"rounds": 4}} | sections)


def pairs_of(recipe: Recipe, edge: str, domain: int = 0) -> PairSplits:
    return read_pairs(recipe.data, EDGES, edge, SIZE, recipe.seed, domain)


def pictures(*splits: PairSplits) -> set[bytes]:
    parts = [part for own in splits for part in (own.train, own.validation, own.test)]
    return {image.numpy().tobytes() for part in parts for image in part.images}


def test_no_picture_is_there_twice(foundation: Path) -> None:
    """Not even where a later domain has a label of the earlier one, or of another edge."""
    recipe = changing(foundation, {"round": 3, "labels": [2, 3]})
    first, then, other = pairs_of(recipe, "edge-0"), pairs_of(recipe, "edge-0", 1), pairs_of(recipe, "edge-1")
    assert {*first.train.captions} == {digit_caption(digit) for digit in (0, 1, 2)}
    assert {*then.train.captions} == {digit_caption(digit) for digit in (2, 3)}
    sizes = [len(pictures(own)) for own in (first, then, other)]
    assert sizes == [24 + 6 + 20] * 3
    assert len(pictures(first, then, other)) == sum(sizes)


def test_when_it_changes(foundation: Path) -> None:
    data = changing(foundation, {"round": 3, "labels": [3, 4]}).data
    assert [domain_at(data, "edge-0", index) for index in range(5)] == [0, 0, 1, 1, 1]
    assert [domain_at(data, "edge-1", index) for index in range(5)] == [0] * 5
    assert [own.name for own in domains_of(data, "edge-0")] == ["digits", "digits"]
    images = Examples(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]))
    then = LocalData(images, 0, 0)
    own = LocalData(images, 0, 0, later=(2, then))
    assert [own.at(index) is then for index in range(4)] == [False, False, True, True]


def test_nodes_ask_for_the_domain_that_is_theirs(foundation: Path) -> None:
    recipe = changing(foundation, {"round": 3, "labels": [3, 4]})
    task = task_of(recipe, build_topology(recipe.topology), foundation)
    assert isinstance(task, PassageTask)
    task.check()
    start = "edge-0.cluster-0.device-0"
    first, then = task.owned(start, [start]), task.owned(start, [start], 1)
    assert not torch.equal(first.inputs, then.inputs)
    evaluated = task.evaluated("edge-0", 1)
    assert evaluated is not None
    assert torch.equal(task.asked("edge-0", [0, 1]).inputs, evaluated.inputs[:2]), "asked when all rounds are done"


def test_all_that_was_tuned_on_is_what_was_not_sent(foundation: Path) -> None:
    recipe = changing(foundation, {"round": 3, "labels": [3, 4]})
    assessor = Assessor.of(recipe, EDGES)
    assert {*assessor.splits["edge-0"].train.captions} == {digit_caption(digit) for digit in (3, 4)}
    assert 3 * 24 * 64 < assessor.data_bytes < 3 * 24 * (64 + 24)


@pytest.mark.parametrize(
    ("later", "sections", "said"),
    [
        ({"round": 5, "labels": [3]}, {}, r"later\.round: there is no round 5; the last is tuning\.rounds 4"),
        ({"round": 1, "labels": [3]}, {}, r"later\.round: input should be greater than or equal to 2"),
        ({"labels": [3]}, {}, r"data\.sources\.edge-0\.later\.round: is required"),
        ({"round": 2, "labels": [12]}, {}, r"later\.labels: 'digits' has no labels \[12\]"),
        ({"round": 2, "labels": [3]}, {"tuning": {"rounds": 4, "cloud_every": 1}}, r"set tuning\.cloud_every = 0"),
    ],
)
def test_what_cannot_be(later: dict[str, Any], sections: dict[str, Any], said: str, foundation: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        changing(foundation, later, **sections)
