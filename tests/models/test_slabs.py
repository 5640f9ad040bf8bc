"""Many requests in one forward give what each gives alone, through a chain, at lengths of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ecogen.errors import ServingError
from ecogen.models.decoder import load_decoder
from ecogen.models.slabs import Rows, SlabCache
from ecogen.placement import Segment
from tests.models.decoders import NUM_BLOCKS, save_decoder, tiny_config

SEGMENTS = [Segment(0, 2, has_embedding=True), Segment(2, NUM_BLOCKS, has_head=True)]
NUM_SLOTS, MAX_TOKENS, CHUNK = 6, 48, 4
ANSWER = 10


class Chain:
    """Two stages, each with slabs; remembers how long each slot's request is."""

    def __init__(self, folder: Path) -> None:
        self.parts = [load_decoder(folder, [segment]) for segment in SEGMENTS]
        self.caches = [SlabCache(part.whole.config, NUM_SLOTS, MAX_TOKENS) for part in self.parts]
        self.lengths: list[int] = []

    @torch.no_grad()
    def step(self, ids: Tensor, rows: Rows) -> Tensor:
        state = ids
        for part, segment, cache in zip(self.parts, SEGMENTS, self.caches, strict=True):
            with cache.at(rows):
                state = part(state, segment, position_ids=rows.positions, cache=cache)
        assert isinstance(state, Tensor)
        return state[:, -1].argmax(-1)

    def prefill(self, prompt: Tensor) -> int:
        """A prompt in the next slot, by chunks; its first token."""
        slot = len(self.lengths)
        for begin in range(0, len(prompt), CHUNK):
            part = prompt[begin : begin + CHUNK]
            token = self.step(part[None], Rows(slot, torch.arange(begin, begin + len(part))[None]))
        self.lengths.append(len(prompt))
        return int(token)

    def decode(self, tokens: list[int]) -> list[int]:
        """One more token of all."""
        given = self.step(torch.tensor(tokens)[:, None], Rows(0, torch.tensor(self.lengths)[:, None]))
        self.lengths = [length + 1 for length in self.lengths]
        return given.tolist()

    def move_last_to(self, slot: int) -> None:
        for cache in self.caches:
            cache.move(len(self.lengths) - 1, slot, self.lengths[-1])
        self.lengths[slot] = self.lengths.pop()


def prompts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 99, (length,), generator=generator) for length in lengths]


def alone(whole: PreTrainedModel, prompt: Tensor) -> list[int]:
    """What transformers' `generate` answers."""
    ids = whole.generate(prompt[None], max_new_tokens=ANSWER, do_sample=False, eos_token_id=None, pad_token_id=0)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "gemma2", "gpt_oss", "cohere2", "deepseek_v3", "mixtral", "granite", "gpt_neox"]
)
def test_requests_of_any_length_together_answer_as_each_alone(model_type: str, tmp_path: Path) -> None:
    """One joins while others are at work, and one leaves, whose slot the last one takes."""
    whole, asked = save_decoder(model_type, tmp_path), prompts(5, 13, 1, 20)
    chain, wanted = Chain(tmp_path), [alone(whole, prompt) for prompt in asked]
    answers = [[chain.prefill(prompt)] for prompt in asked[:3]]
    for _ in range(4):
        answers = [[*a, t] for a, t in zip(answers, chain.decode([a[-1] for a in answers]), strict=True)]
    answers.append([chain.prefill(asked[3])])
    assert answers[0] == wanted[0][:5]
    chain.move_last_to(0)
    answers = [answers[3], *answers[1:3]]
    for _ in range(5):
        answers = [[*a, t] for a, t in zip(answers, chain.decode([a[-1] for a in answers]), strict=True)]
    assert answers == [wanted[3][:6], wanted[1], wanted[2]]


def test_a_stage_keeps_only_its_own_layers(tmp_path: Path) -> None:
    config = save_decoder("llama", tmp_path).config
    chain = Chain(tmp_path)
    chain.prefill(prompts(3)[0])
    layer = 2 * 4 * NUM_SLOTS * config.num_key_value_heads * MAX_TOKENS * config.head_dim
    assert [cache.nbytes for cache in chain.caches] == [2 * layer, 4 * layer]


@pytest.mark.parametrize(("first", "place"), [(NUM_SLOTS, 0), (0, MAX_TOKENS)])
def test_no_room(first: int, place: int) -> None:
    cache = SlabCache(tiny_config("llama"), NUM_SLOTS, MAX_TOKENS)
    with pytest.raises(ServingError, match="do not fit 6 of 48"), cache.at(Rows(first, torch.tensor([[place]]))):
        pass


def test_models_that_keep_more_than_keys_and_values_are_refused() -> None:
    with pytest.raises(ServingError, match=r"'qwen3_next' model keeps more than keys and values \(LinearAttention"):
        SlabCache(tiny_config("qwen3_next"), NUM_SLOTS, MAX_TOKENS)
