"""A stage: what it computes on, in which type, and what it says when it cannot."""

from __future__ import annotations

import asyncio

import pytest
import torch

from ecogen.config import Tunables as Spec
from ecogen.errors import ConfigError
from ecogen.placement import Segment
from ecogen.runtime.stage import MicrobatchKey, OptimizerSettings, Stage, clip_scale, resolve_device
from ecogen.tuning.data import Examples
from tests.tuning.clusters import Case, plain_model, random_batches, random_tunables, stages_of, tune_cluster

CASE = Case(3, (1, 2))
SETTINGS = OptimizerSettings(1e-2, 0.1, 0.5)


def outputs(stages: dict[str, Stage], images: torch.Tensor, case: Case = CASE) -> torch.Tensor:
    for stage in stages.values():
        stage.begin(random_tunables(case))
    for visit in case.placement:
        images = stages[visit.node_id].infer(visit.segment, images)
    return images.float().cpu()


def truth(images: torch.Tensor) -> torch.Tensor:
    return plain_model(CASE).logits(images).detach()


def test_a_chain_in_bfloat16_is_close_to_the_whole_model_in_float32() -> None:
    (batch,) = random_batches(1, 16)
    difference = outputs(stages_of(CASE, dtype="bfloat16"), batch.images) - truth(batch.images)
    assert 0 < difference.norm() / truth(batch.images).norm() < 0.05


def test_in_bfloat16_frozen_matrices_are_half_as_large_and_the_rest_stays_exact() -> None:
    stage = stages_of(CASE, dtype="bfloat16")["device-1"]
    for parameter in stage.model.parameters():
        is_lowered = not parameter.requires_grad and parameter.ndim > 1
        assert parameter.dtype == (torch.bfloat16 if is_lowered else torch.float32)


def test_dora_in_bfloat16_is_close_since_what_it_normalises_stays_exact() -> None:
    case = Case(3, (1, 2), spec=Spec(prompts=0, lora_rank=2, lora_kind="dora"))
    stages = stages_of(case, dtype="bfloat16")
    block = stages["device-1"].model.whole.vit.layers[1]
    assert block.attention.q_proj.get_base_layer().weight.dtype == torch.float32
    assert block.attention.k_proj.weight.dtype == torch.bfloat16
    (batch,) = random_batches(1, 16)
    truth = plain_model(case).logits(batch.images).detach()
    assert 0 < (outputs(stages, batch.images, case) - truth).norm() / truth.norm() < 0.05


def test_a_chain_in_bfloat16_learns_nearly_the_same() -> None:
    batches = random_batches(3, 8)
    tuned = [
        asyncio.run(tune_cluster(CASE, random_tunables(CASE), batches, SETTINGS, stages=stages_of(CASE, dtype=dtype)))
        for dtype in ("float32", "bfloat16")
    ]
    exact, rough = (torch.cat([tensor.flatten() for tensor in t.tunables.values()]) for t in tuned)
    start = torch.cat([tensor.flatten() for tensor in random_tunables(CASE).values()])
    assert torch.nn.functional.cosine_similarity(exact - start, rough - start, dim=0) > 0.8


def test_what_a_node_received_is_never_written_into() -> None:
    """Tensors of a message are views of its bytes, which another message may share."""
    whole = Case(3)
    (batch,) = random_batches(1, 8)
    begun = random_tunables(whole)
    stage = stage_of(whole, begun)
    learn(stage, batch)
    handed = stage.hand_over(whole.placement.visits[0].segment)
    assert any("@exp_avg" in name for name in handed)
    received = {name: tensor.clone() for name, tensor in handed.items()}
    other = stage_of(whole, random_tunables(whole))
    other.take_over(received)
    learn(other, batch)
    for name, tensor in random_tunables(whole).items():
        assert torch.equal(begun[name], tensor), name
    for name, tensor in handed.items():
        assert torch.equal(received[name], tensor), name


def stage_of(case: Case, tunables: dict[str, torch.Tensor]) -> Stage:
    (stage,) = stages_of(case).values()
    stage.begin(tunables, SETTINGS)
    return stage


def learn(stage: Stage, batch: Examples) -> None:
    """One local step."""
    segment, key = Segment(0, 3, has_embedding=True, has_head=True), MicrobatchKey(0, 0, 0)
    stage.loss(key, segment, batch.images, batch.labels, len(batch), input_grads=False)
    stage.backward(key, None)
    stage.step(stage.squared_norm(segment))


@pytest.mark.parametrize("name", ["cuda:7", "cuda:99"])
def test_a_device_that_is_not_there_is_a_clear_error(name: str) -> None:
    if torch.cuda.device_count() > 7:
        pytest.skip("this machine has so many")
    with pytest.raises(ConfigError, match=rf"device: '{name}' is not on this machine, which has \d+ CUDA devices"):
        resolve_device(name)


def test_auto_is_always_there() -> None:
    assert resolve_device("auto") in ("cpu", "cuda", "mps")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_a_chain_computes_and_learns_the_same() -> None:
    (batch,) = random_batches(1, 8)
    torch.testing.assert_close(
        outputs(stages_of(CASE, device="cuda:0"), batch.images), truth(batch.images), rtol=1e-3, atol=1e-3
    )
    batches = random_batches(3, 8)
    on_cpu, on_gpu = (
        asyncio.run(tune_cluster(CASE, random_tunables(CASE), batches, SETTINGS, stages=stages_of(CASE, device=device)))
        for device in ("cpu", "cuda:0")
    )
    for name, tensor in on_cpu.tunables.items():
        torch.testing.assert_close(on_gpu.tunables[name], tensor, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize(("squared_norm", "clip_norm", "scale"), [(4.0, 0.0, 1.0), (4.0, 5.0, 1.0), (4.0, 1.0, 0.5)])
def test_the_scale_of_clipping(squared_norm: float, clip_norm: float, scale: float) -> None:
    assert clip_scale(squared_norm, clip_norm) == pytest.approx(scale, rel=1e-6)


def test_a_stage_begun_anew_remembers_nothing() -> None:
    """Neither gradients nor moments nor graphs of an attempt that was broken off."""
    stages, (batch,) = stages_of(Case(2)), random_batches(1, 4)
    stage, case = stages["device-0"], Case(2)
    (segment,) = case.placement.segments_of("device-0")

    def one_step() -> dict[str, torch.Tensor]:
        stage.begin(random_tunables(case), SETTINGS)
        stage.loss((0, 0, 0), segment, batch.images, batch.labels, 4, input_grads=False)
        stage.backward((0, 0, 0), None)
        stage.step(stage.squared_norm(segment))
        return stage.tunables

    first = one_step()
    stage.loss((1, 0, 0), segment, batch.images, batch.labels, 4, input_grads=False)
    stage.backward((1, 0, 0), None)
    again = one_step()
    assert all(torch.equal(first[name], again[name]) for name in first)
