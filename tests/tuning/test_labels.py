"""Labels of edges: whose examples an edge gets, and what a place in its head means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecogen.config import Data, Partition, from_table
from ecogen.errors import ConfigError, DataError
from ecogen.tuning.data import Examples, partition_examples
from ecogen.tuning.labels import LabelSet, common_labels, label_sets, without_heads

LABELS = torch.arange(200) % 10
EVERYTHING = list(range(10))
label_lists = st.lists(st.integers(0, 9), min_size=2, unique=True)


def test_places_and_labels_are_each_others_inverse() -> None:
    known = LabelSet((2, 5, 7))
    examples = Examples(torch.arange(200.0)[:, None], LABELS)
    kept = known.keep(examples)
    assert kept.images.flatten().tolist() == [n for n in range(200) if n % 10 in (2, 5, 7)]
    assert kept.labels.unique().tolist() == [0, 1, 2]
    assert known.at(kept.labels.tolist()) == [int(n) % 10 for n in kept.images.flatten()]


def test_the_order_in_a_recipe_means_nothing() -> None:
    one, other = (label_sets(Data(labels_of_edges={"edge-0": order}), ["edge-0"], 10) for order in ((7, 2), (2, 7)))
    assert one == other == {"edge-0": LabelSet((2, 7))}


@settings(max_examples=25)
@given(label_lists, label_lists, st.sampled_from(["iid", "dirichlet"]))
def test_every_example_goes_once_to_an_edge_that_knows_its_label(one: list[int], other: list[int], how: str) -> None:
    partition = Partition(across_edges=how, within_edge="iid")
    edges = partition_examples(LABELS, partition, [2, 1], 3, [one, other])
    given = np.concatenate([part for edge in edges for part in edge])
    assert sorted(given) == [n for n in range(200) if n % 10 in {*one, *other}]
    for known, edge in zip((one, other), edges, strict=True):
        assert {n % 10 for part in edge for n in part.tolist()} <= set(known)


@pytest.mark.parametrize("how", ["iid", "dirichlet"])
def test_where_all_edges_know_all_labels_nothing_changes(how: str) -> None:
    partition = Partition(across_edges=how, within_edge="dirichlet")
    plain = partition_examples(LABELS, partition, [2, 3], 5)
    given = partition_examples(LABELS, partition, [2, 3], 5, [EVERYTHING, EVERYTHING])
    assert all(np.array_equal(a, b) for p, g in zip(plain, given, strict=True) for a, b in zip(p, g, strict=True))


def test_labels_that_both_know_are_shared_by_their_clusters() -> None:
    partition = Partition(across_edges="iid", within_edge="iid")
    edges = partition_examples(LABELS, partition, [1, 3], 0, [[0, 1], [1, 2]])
    of_one = [sum((part % 10 == 1).sum() for part in edge) for edge in edges]
    assert of_one == [5, 15]


def test_an_edge_without_examples_of_its_labels_is_told() -> None:
    with pytest.raises(DataError, match=r"edge 1 has 1 training examples of its labels, for 2 clusters"):
        partition_examples(torch.tensor([0, 0, 0, 1]), Partition(), [1, 2], 0, [[0, 2], [1, 3]])


def test_common_labels_are_those_of_all_edges_or_none() -> None:
    edges = ["edge-0", "edge-1"]
    assert common_labels(label_sets(Data(), edges, 4)) == LabelSet((0, 1, 2, 3))
    assert common_labels(label_sets(Data(labels_of_edges={"edge-0": (3, 0, 1, 2)}), edges, 4)) == LabelSet((0, 1, 2, 3))
    assert common_labels(label_sets(Data(labels_of_edges={"edge-0": (0, 1)}), edges, 4)) is None


def test_a_head_is_all_that_is_not_shared() -> None:
    names = ["classifier.bias", "classifier.weight", "vit.layernorm.weight", "vit.layers.0.prompts"]
    assert list(without_heads(dict.fromkeys(names, torch.zeros(1)))) == names[2:]


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"data": {"labels_of_edges": {"edge-9": [0, 1]}}}, "data.labels_of_edges.edge-9: no such name"),
        ({"data": {"labels_of_edges": {"edge-0": [0, 0]}}}, "data.labels_of_edges.edge-0: a label stands there twice"),
        ({"data": {"labels_of_edges": {"edge-0": [0]}}}, "data.labels_of_edges.edge-0: "),
        (
            {"data": {"labels_of_edges": {"edge-0": [0, 1]}}, "tunables": {"head": False}},
            "tunables.head: a head for chosen labels has to be tuned",
        ),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(sections: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_table(sections)
    assert problem in str(caught.value)


def test_a_label_that_the_data_lack_is_told() -> None:
    with pytest.raises(ConfigError, match=r"data.labels_of_edges.edge-0: 12 is no label of 'digits', which has 0 to 9"):
        label_sets(Data(labels_of_edges={"edge-0": (3, 12)}), ["edge-0"], 10)
