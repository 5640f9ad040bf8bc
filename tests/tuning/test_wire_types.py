"""Tuning with fewer bytes on the wire is plain fine-tuning of a model that rounds at its cuts, written on its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import Tensor

from ecogen.config import Tunables as Spec
from ecogen.runtime.stage import OptimizerSettings
from ecogen.tuning.messages import BACKWARD, FORWARD
from tests.plain import PlainModel, fine_tune
from tests.tiny import RecordingNetwork, tiny_vit
from tests.tuning.clusters import Case, random_batches, random_tunables, tune_cluster

SETTINGS = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5, epsilon=1e-3)


def rounded(numbers: Tensor, wire_type: str) -> Tensor:
    if wire_type == "float32":
        return numbers
    if wire_type == "bfloat16":
        return numbers.bfloat16().float()
    steps = (numbers.abs().max(dim=-1, keepdim=True).values / 127).bfloat16().float()
    return torch.where(steps > 0, torch.round(numbers / steps) * steps, numbers)


class Cut(torch.autograd.Function):
    """Rounds what goes forward and what comes back."""

    @staticmethod
    def forward(context: Any, numbers: Tensor, activations: str, gradients: str) -> Tensor:
        context.gradients = gradients
        return rounded(numbers, activations)

    @staticmethod
    def backward(context: Any, grads: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return rounded(grads, context.gradients), None, None


class RoundingModel(PlainModel):
    """Rounds after the blocks below its cuts, and what goes to a head on another device."""

    def cut(self, cuts: tuple[int, ...], *types: str) -> RoundingModel:
        self.cuts, self.types = cuts, types
        return self

    def _block(self, index: int, layer: torch.nn.Module, hidden: Tensor) -> Tensor:
        outputs = super()._block(index, layer, hidden)
        is_cut = index + 1 in (*self.cuts, len(self.whole.vit.layers))
        return Cut.apply(outputs, *self.types) if is_cut else outputs


@pytest.mark.parametrize("activations", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("gradients", ["float32", "bfloat16", "int8"])
def test_tuning_over_a_narrow_wire_is_tuning_a_model_that_rounds(
    activations: str, gradients: str, one_thread: None
) -> None:
    case = Case(4, (1, 2), "start", Spec(prompts=1, lora_rank=2))
    batches, network = random_batches(3, 4), RecordingNetwork()
    types = {FORWARD: activations, BACKWARD: gradients}
    tuned = asyncio.run(tune_cluster(case, random_tunables(case), batches, SETTINGS, wire_types=types, network=network))
    plain = RoundingModel(tiny_vit(case.config), random_tunables(case), lora_alpha=8.0)
    plain.cut((1, 2), activations, gradients)
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, "clip_norm": 0.5, "epsilon": 1e-3}
    losses = fine_tune(plain, [(b.images, b.labels) for b in batches], **settings)
    for name, tensor in plain.tunables.items():
        torch.testing.assert_close(tuned.tunables[name], tensor.detach(), rtol=1e-3, atol=3e-4)
    assert tuned.results["device-0"].loss == pytest.approx(sum(losses) / 3, abs=1e-4)
    for method, wire_type in types.items():
        sent = {str(s.message.tensors["tensor"].dtype) for s in network.sent if s.method == method}
        assert sent == {f"torch.{wire_type}"}
