"""Segments: a node holds its own tensors under the whole model's names, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from ecogen.errors import CheckpointError
from ecogen.models.tunables import get_tunables, named_tunables, set_tunables, tunables_of
from ecogen.models.vit import load_vit, parameter_names, whole_segment
from ecogen.placement import Segment
from tests.tiny import tiny_config, tiny_vit
from tests.tuning.clusters import Case, cases, cut_model, random_tunables

CONFIG = tiny_config(3)


def tensors_of(segment: Segment) -> dict[str, torch.Tensor]:
    state = tiny_vit(CONFIG).state_dict()
    return {name: state[name] for name in parameter_names(CONFIG, [segment])}


@given(case=cases())
@settings(max_examples=10)
def test_the_nodes_of_a_cluster_share_the_model_out_between_them(case: Case) -> None:
    held = [parameter_names(case.config, case.placement.segments_of(node)) for node in case.placement.node_ids]
    names = [name for part in held for name in part]
    assert sorted(names) == sorted(tiny_vit(case.config).state_dict())


def test_a_node_holds_no_storage_for_what_is_elsewhere() -> None:
    model = load_vit(CONFIG, [Segment(1, 2)], tensors_of(Segment(1, 2)))
    names = [name for name, _ in model.whole.named_parameters()]
    assert names
    assert all(name.startswith("vit.layers.1.") for name in names)
    assert not any(parameter.is_meta for parameter in model.whole.parameters())


@pytest.mark.parametrize("change", ["missing", "left over", "another shape"])
def test_tensors_that_do_not_fit_are_refused(change: str) -> None:
    segment = Segment(0, 2, has_embedding=True)
    tensors = tensors_of(segment)
    name = "vit.layers.1.mlp.fc1.weight"
    if change == "missing":
        del tensors[name]
    elif change == "left over":
        tensors["vit.layers.2.mlp.fc1.weight"] = tensors[name]
    else:
        tensors[name] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match=r"does not fit embedding \+ blocks 0\.\.2"):
        load_vit(CONFIG, [segment], tensors)


@given(case=cases())
@settings(max_examples=10)
def test_tunables_belong_to_the_node_that_trains_them(case: Case) -> None:
    whole = tiny_vit(case.config)
    everything = random_tunables(case)
    parts = []
    for node_id in case.placement.node_ids:
        segments = case.placement.segments_of(node_id)
        model = cut_model(whole, segments, case.spec)
        assert {name for name, _ in named_tunables(model)} == tunables_of(everything, segments).keys()
        set_tunables(model, everything)
        parts.append(get_tunables(model))
    merged = {name: tensor for part in parts for name, tensor in part.items()}
    assert sum(map(len, parts)) == len(merged)
    assert all(torch.equal(merged[name], everything[name]) for name in everything)


def test_tunables_of_another_model_are_refused() -> None:
    case = Case(3)
    model = cut_model(tiny_vit(case.config), [whole_segment(case.config)], case.spec)
    tunables = random_tunables(case)
    with pytest.raises(CheckpointError, match=r"'classifier.bias' should be \(10,\) but is nothing"):
        set_tunables(model, {name: t for name, t in tunables.items() if name != "classifier.bias"})
    with pytest.raises(CheckpointError, match=r"should be \(10,\) but is \(3,\)"):
        set_tunables(model, tunables | {"classifier.bias": torch.zeros(3)})
