"""A chain of unequal segments equals the whole model, for every model type that is accepted: bit for bit in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from ecogen.models.decoder import State, block_index, load_decoder, names_of_segments, new_cache, open_config
from ecogen.models.families import ACCEPTED
from ecogen.models.folder import open_folder, write_index, write_shard
from ecogen.placement import Segment
from tests.models.decoders import NUM_BLOCKS, save_decoder

SEGMENTS = [Segment(0, 1, has_embedding=True), Segment(1, 4), Segment(4, NUM_BLOCKS, has_head=True)]
PROMPT, PADDING, DECODED = 12, 4, 5


class Chain:
    """Three nodes, each with its segment, in a folder that has nothing else."""

    def __init__(self, folder: Path) -> None:
        self.parts = [load_decoder(own_folder(folder, segment), [segment]) for segment in SEGMENTS]
        self.caches = [new_cache(part) for part in self.parts]

    def __call__(self, ids: Tensor, *, cached: bool = False, **arguments: Tensor) -> Tensor:
        state: State = ids
        for part, segment, cache in zip(self.parts, SEGMENTS, self.caches, strict=True):
            state = part(state, segment, cache=cache if cached else None, **arguments)
        assert isinstance(state, Tensor)
        return state

    def backward(self, ids: Tensor, labels: Tensor) -> None:
        """As nodes do: each sends the gradient of what it was sent."""
        visits: list[tuple[list[Tensor], list[Tensor]]] = []
        state: State = ids
        for part, segment in zip(self.parts, SEGMENTS, strict=True):
            given = state if not visits else detached(state)
            state = part(given, segment)
            visits.append((tensors_of(given), tensors_of(state)))
        nn.functional.cross_entropy(state.flatten(0, 1), labels.flatten()).backward()
        for (_, outputs), (inputs, _) in zip(visits[-2::-1], visits[:0:-1], strict=True):
            pairs = [(o, i.grad) for o, i in zip(outputs, inputs, strict=True) if i.grad is not None]
            torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])


def own_folder(folder: Path, segment: Segment) -> Path:
    """What a device has on its disk."""
    whole, own = open_folder(folder), folder / str(segment)
    names = names_of_segments(open_config(folder), [segment], whole.files)
    shards: dict[str, list[str]] = {}
    for name in names:
        shards.setdefault(f"block-{block_index(name)}", []).append(name)
    assert {block_index(name) for name in names} - {None} <= set(segment.blocks)
    for shard, held in shards.items():
        write_shard(own, shard, whole.read(held))
    write_index(own, whole.config, shards)
    return own


def tensors_of(state: State) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state)


def detached(state: State) -> State:
    tensors = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors_of(state)]
    return tensors[0] if isinstance(state, Tensor) else tuple(tensors)


@pytest.fixture
def whole_and_chain(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, Chain]:
    whole = save_decoder(request.param, tmp_path)
    return whole, Chain(tmp_path)


@pytest.mark.parametrize("whole_and_chain", sorted(ACCEPTED), indirect=True)
def test_a_chain_equals_the_whole_model(whole_and_chain: tuple[PreTrainedModel, Chain]) -> None:
    whole, chain = whole_and_chain
    ids = torch.randint(3, 99, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(chain(ids), whole(ids, use_cache=False).logits)
        check_decoding(whole, chain, ids)
    check_lora_gradients(whole, chain, ids)


def check_decoding(whole: PreTrainedModel, chain: Chain, ids: Tensor) -> None:
    """A left-padded batch and cached tokens after it, of which the whole model says what comes next."""
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    past = None
    for _ in range(1 + DECODED):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        own = chain(ids, attention_mask=mask, position_ids=positions, cached=True)
        outputs = whole(ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True)
        assert torch.equal(own, outputs.logits)
        past, ids = outputs.past_key_values, outputs.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)


def check_lora_gradients(whole: PreTrainedModel, chain: Chain, ids: Tensor) -> None:
    labels = ids.roll(1)
    linear = linear_layers(whole)
    named = attach_lora(whole, linear)
    own = {name: p for part in chain.parts for name, p in attach_lora(part.whole, linear).items()}
    assert own.keys() == named.keys()
    for name, parameter in named.items():
        nn.init.normal_(parameter, std=0.1)
        own[name].data.copy_(parameter.data)
    nn.functional.cross_entropy(whole(ids, use_cache=False).logits.flatten(0, 1), labels.flatten()).backward()
    chain.backward(ids, labels)
    for name, parameter in named.items():
        grad = own[name].grad
        assert (grad is None) == (parameter.grad is None), name
        assert grad is None or torch.equal(grad, parameter.grad), name


def linear_layers(model: PreTrainedModel) -> list[str]:
    """The last parts of their names, in the blocks."""
    modules = model.base_model.layers.named_modules()
    return sorted({name.split(".")[-1] for name, module in modules if isinstance(module, nn.Linear)})


def attach_lora(model: PreTrainedModel, names: list[str]) -> dict[str, nn.Parameter]:
    """LoRA on the linear layers of these names; returns what trains."""
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=names), model)
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
