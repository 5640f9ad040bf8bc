"""Accuracy is that of the whole model, and what is frozen below the tunables is computed once where there is room."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ecogen.config import Tunables as Spec
from ecogen.metering.meter import null_meter
from ecogen.models.profile import model_shape
from ecogen.models.vit import whole_segment
from ecogen.placement import Segment
from ecogen.planning.cost import activation_bytes, forward_flops
from ecogen.runtime.stage import Stage
from ecogen.runtime.worker import Worker
from ecogen.transport.base import TrafficCounter
from ecogen.tuning.data import Examples
from ecogen.tuning.evaluate import Evaluator
from tests.tiny import tiny_vit
from tests.tuning.clusters import Case, cases, cut_model, plain_of, random_batches, random_tunables

COUNT = 150  # more than a batch
IMAGES = random_batches(1, COUNT)[0].images


def evaluator_of(case: Case, labels: Tensor, kept_bytes: int) -> tuple[Evaluator, Worker]:
    stage = Stage(cut_model(tiny_vit(case.config), [whole_segment(case.config)], case.spec))
    worker = Worker(null_meter("edge"), TrafficCounter())
    shape = model_shape(case.config, case.spec)
    return Evaluator(stage, shape, worker, Examples(IMAGES, labels), kept_bytes), worker


def plain_classes(case: Case, tunables: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return plain_of(tiny_vit(case.config), tunables, case.spec).logits(IMAGES).argmax(-1)


@given(case=cases(max_blocks=3), kept_bytes=st.sampled_from([0, 2**30]))
@settings(max_examples=15)
def test_the_accuracy_is_that_of_a_plain_model_for_one_tunables_after_another(case: Case, kept_bytes: int) -> None:
    tunables = [random_tunables(case, seed) for seed in (1, 2)]
    classes = plain_classes(case, tunables[0])
    evaluate, _ = evaluator_of(case, classes, kept_bytes)
    assert evaluate(tunables[0]).accuracy == 1
    shared = (plain_classes(case, tunables[1]) == classes).float().mean()
    assert evaluate(tunables[1]).accuracy == pytest.approx(float(shared))
    assert evaluate(tunables[0]).accuracy == 1


@pytest.mark.parametrize("has_room", [True, False])
@pytest.mark.parametrize("first_block", [0, 1, 3])
def test_what_is_frozen_below_is_computed_once_where_there_is_room(
    first_block: int, has_room: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    case = Case(3, spec=Spec(prompts=0, lora_rank=2, first_block=first_block))
    shape, whole = model_shape(case.config, case.spec), whole_segment(case.config)
    room = COUNT * activation_bytes(shape, first_block) - (not has_room)
    evaluate, worker = evaluator_of(case, torch.zeros(COUNT, dtype=torch.int64), room)
    counted = []
    for _ in range(3):
        evaluate(random_tunables(case))
        counted.append(worker.meter.take("evaluation").flops)
    above = forward_flops(shape, Segment(first_block, 3, has_head=True), COUNT)
    every = forward_flops(shape, whole, COUNT)
    assert counted == [every, above, above] if has_room and first_block else [every] * 3
    assert ("tuning.prefix_memory_mib = " in caplog.text) is (bool(first_block) and not has_room)
