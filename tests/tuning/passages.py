"""A cluster that tunes a decoder in a test, and the truth that it is compared with: plain `peft` on one machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from ecogen.config import Tunables as Spec
from ecogen.models.decoder import load_decoder, open_config
from ecogen.models.family import whole_segment
from ecogen.models.profile import decoder_shape
from ecogen.models.segmented import Segmented
from ecogen.models.tunables import adapted_layers, adapter_config, attach_tunables, named_tunables
from ecogen.placement import Placement, Segment, neighbours_of, place, rotations, segments_held
from ecogen.runtime.example_gradients import ExampleNoise
from ecogen.runtime.stage import Stage
from ecogen.tuning.passages import IGNORED, Passages
from ecogen.tuning.route import Route
from tests.texts import LENGTH, NUM_BLOCKS, VOCABULARY

SPEC = Spec(prompts=0, head=False, lora_rank=3, lora_targets=("attention",))


@dataclass(frozen=True)
class TextCase:
    """A decoder, how it is cut, and what trains in it."""

    folder: Path
    cuts: tuple[int, ...] = (1, 2)
    labels: str = "start"
    spec: Spec = field(default_factory=lambda: SPEC)
    owners: int = 1

    @property
    def placement(self) -> Placement:
        nodes = [f"device-{index}" for index in range(len(self.cuts) + 1)]
        return place(nodes, self.cuts, NUM_BLOCKS, self.labels)

    @property
    def routes(self) -> list[Route]:
        shape = decoder_shape(open_config(self.folder), self.spec, LENGTH)
        return [Route(placement, shape) for placement in rotations(self.placement, self.owners)]

    def held_by(self, node_id: str) -> list[Segment]:
        return segments_held(self.placement, self.owners, node_id)

    def neighbours_of(self, node_id: str) -> list[str]:
        return neighbours_of(self.placement, self.owners, node_id)

    def model_of(self, segments: list[Segment]) -> Segmented:
        """Some segments with their tunables."""
        model = load_decoder(self.folder, segments)
        attach_tunables(model, self.spec)
        return model

    def stages(self, noise: ExampleNoise | None = None) -> dict[str, Stage]:
        nodes = self.placement.node_ids
        return {node_id: Stage(self.model_of(self.held_by(node_id)), noise=noise) for node_id in nodes}

    @cached_property
    def tunables(self) -> dict[str, Tensor]:
        """Values for all tunables of the whole model, none of them zero."""
        whole = self.model_of([whole_segment(open_config(self.folder))])
        generator = torch.Generator().manual_seed(1)
        return {name: 0.2 * torch.randn(p.shape, generator=generator) for name, p in named_tunables(whole)}

    def plain(self) -> PeftModel:
        """The whole model with these tunables, by PEFT alone."""
        return plain_peft(self.folder, self.tunables, self.spec)


def plain_peft(folder: Path, tunables: Mapping[str, Tensor], spec: Spec) -> PeftModel:
    """A whole decoder with LoRA of these values, by PEFT alone."""
    config = adapter_config(spec, adapted_layers(tunables))
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).eval()
    for name, parameter in lora_of(plain).items():
        parameter.data.copy_(tunables[name])
    return plain


def lora_of(plain: PeftModel) -> dict[str, torch.nn.Parameter]:
    """What PEFT trains, under the names that travel."""
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in plain.named_parameters()
        if parameter.requires_grad
    }


def plain_loss(plain: PeftModel, batch: Passages) -> Tensor:
    """Mean cross-entropy of all tokens that count."""
    logits = plain(input_ids=batch.tokens).logits
    return cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)


def fine_tune(
    plain: PeftModel, batches: Iterable[Passages], *, rate: float, decay: float, clip_norm: float, epsilon: float
) -> list[float]:
    """AdamW on whole batches, as a textbook has it; returns the loss of each step."""
    parameters, losses = list(lora_of(plain).values()), []
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, eps=epsilon)
    for batch in batches:
        optimizer.zero_grad()
        loss = plain_loss(plain, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def random_passages(count: int, size: int, seed: int = 2) -> list[Passages]:
    """Batches of passages whose lengths differ: of each row, only some tokens count, and what follows is padding."""
    generator, batches = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        tokens = torch.randint(3, VOCABULARY, (size, LENGTH), generator=generator)
        labels = torch.cat([tokens[:, 1:], torch.full((size, 1), IGNORED)], dim=1)
        lengths = torch.randint(2, LENGTH + 1, (size, 1), generator=generator)
        skipped = torch.randint(0, 2, (size, 1), generator=generator)
        places = torch.arange(LENGTH)
        labels = labels.where((places < lengths - 1) & (places >= skipped), IGNORED)
        batches.append(Passages(tokens.where(places < lengths, 0), labels))
    return batches
