"""Many requests in one forward give what each gives alone, through a chain, at lengths of their own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ecogen.errors import ServingError
from ecogen.models.decoder import SegmentedDecoder, State, load_decoder
from ecogen.models.rows import Rows
from ecogen.models.slabs import SlabCache
from ecogen.placement import Segment
from tests.greedy import Agree, Greedy, alone
from tests.models.decoders import NUM_BLOCKS, save_decoder, tiny_config

SEGMENTS = [Segment(0, 1, has_embedding=True), Segment(1, 4), Segment(4, NUM_BLOCKS, has_head=True)]
NUM_SLOTS, MAX_TOKENS, CHUNK = 6, 48, 4
ANSWER = 10
TOLERANCE = 2e-5
"""Of logits of 0.05 to 3. In transformers alone, those of a left-padded batch are up to 5e-6 from each request's."""

NO_TIES = {"index_n_heads": 16}
"""Two index heads often give several keys a score of zero; which of these are taken differs between lengths, in
transformers as here, and with it the answer."""

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "gemma2": {},
    "gpt_oss": {},
    "cohere2": {},
    "deepseek_v3": {},
    "mixtral": {},
    "granite": {},
    "gpt_neox": {},
    # keys by which tokens are found
    "axk2": NO_TIES,
    "deepseek_v32": NO_TIES,
    "glm_moe_dsa": NO_TIES,
    "hy_v4": NO_TIES,
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention"] + ["minimax_m3_sparse"] * 5,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    # recurrent and convolution states
    "bailing_hybrid": {},
    "kimi_linear": {},
    "olmo_hybrid": {},
    "qwen3_5_moe_text": {},
    "qwen3_5_text": {},
    "qwen3_next": {},
    # convolutions beside keys and values, and a bias and a scale by how far tokens are
    "inkling_text": {
        "sliding_window_size": 7,
        "rel_extent": 9,
        "log_scaling_n_floor": 4,
        "log_scaling_alpha": 0.5,
    },
}


class Chain:
    """Three stages, each with slabs; remembers how long each slot's request is."""

    def __init__(self, folder: Path) -> None:
        self.parts = [load_decoder(folder, [segment]) for segment in SEGMENTS]
        self.caches = [SlabCache(part.whole.config, NUM_SLOTS, MAX_TOKENS) for part in self.parts]
        self.lengths: list[int] = []

    @torch.no_grad()
    def step(self, ids: Tensor, rows: Rows) -> Tensor:
        """Logits [B, V]."""
        state: State = ids
        for part, segment, cache in zip(self.parts, SEGMENTS, self.caches, strict=True):
            state = cache.run(partial(forward, part, segment, cache), state, rows)
        assert isinstance(state, Tensor)
        return state[:, -1]

    def prefill(self, prompt: Tensor) -> list[Tensor]:
        """A prompt in the next slot, by chunks; the answer's first logits."""
        slot = len(self.lengths)
        for begin in range(0, len(prompt), CHUNK):
            part = prompt[begin : begin + CHUNK]
            logits = self.step(part[None], Rows(slot, torch.arange(begin, begin + len(part))[None]))
        self.lengths.append(len(prompt))
        return [logits[0]]

    def decode(self, answers: list[list[Tensor]]) -> None:
        """One more token of all."""
        tokens = torch.stack([answer[-1].argmax() for answer in answers])
        given = self.step(tokens[:, None], Rows(0, torch.tensor(self.lengths)[:, None]))
        self.lengths = [length + 1 for length in self.lengths]
        for answer, logits in zip(answers, given, strict=True):
            answer.append(logits)

    def move_last_to(self, slot: int) -> None:
        for cache in self.caches:
            cache.move(len(self.lengths) - 1, slot, self.lengths[-1])
        self.lengths[slot] = self.lengths.pop()


def forward(part: SegmentedDecoder, segment: Segment, cache: SlabCache, inputs: State, positions: Tensor) -> State:
    given: State = part(inputs, segment, position_ids=positions, cache=cache)
    return given


def prompts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 99, (length,), generator=generator) for length in lengths]


def check(answer: list[Tensor], wanted: Greedy, agree: Agree) -> None:
    """The same tokens from the same logits, as far as it goes."""
    own, wanted = torch.stack(answer), wanted[: len(answer)]
    place = agree(own.argmax(-1).tolist(), wanted)
    torch.testing.assert_close(own[: place + 1], wanted.logits[: place + 1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("model_type", MODELS)
def test_requests_of_any_length_together_answer_as_each_alone(model_type: str, tmp_path: Path, agree: Agree) -> None:
    """One joins while others are at work, one leaves, whose slot the last one takes, and one comes to that one's."""
    whole, asked = save_decoder(model_type, tmp_path, **MODELS[model_type]), prompts(5, 13, 1, 20, 9)
    chain, wanted = Chain(tmp_path), [alone(whole, prompt.tolist(), ANSWER) for prompt in asked]
    answers = [chain.prefill(prompt) for prompt in asked[:3]]
    for _ in range(4):
        chain.decode(answers)
    answers.append(chain.prefill(asked[3]))
    chain.move_last_to(0)
    check(answers[0], wanted[0], agree)
    answers = [answers[3], *answers[1:3], chain.prefill(asked[4])]
    for _ in range(5):
        chain.decode(answers)
    for answer, index in zip(answers, (3, 1, 2, 4), strict=True):
        check(answer, wanted[index], agree)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_next", "inkling_text"])
def test_a_request_begins_beside_one_that_goes_on(model_type: str, tmp_path: Path, agree: Agree) -> None:
    """In a slot that held another; its first token comes as the other's next."""
    whole, [other, left, new] = save_decoder(model_type, tmp_path, **MODELS[model_type]), prompts(5, 13, 1)
    chain, wanted = Chain(tmp_path), [alone(whole, prompt.tolist(), ANSWER) for prompt in (other, new)]
    going_on = chain.prefill(other)
    chain.prefill(left)
    tokens = torch.stack([going_on[0].argmax(), new[0]])
    logits = chain.step(tokens[:, None], Rows(0, torch.tensor([[5], [0]])))
    check([*going_on, logits[0]], wanted[0], agree)
    check([logits[1]], wanted[1], agree)


def test_a_stage_keeps_only_its_own_layers(tmp_path: Path) -> None:
    config = save_decoder("llama", tmp_path).config
    chain = Chain(tmp_path)
    chain.prefill(prompts(3)[0])
    layer = 2 * 4 * NUM_SLOTS * config.num_key_value_heads * MAX_TOKENS * config.head_dim
    assert [cache.nbytes for cache in chain.caches] == [layer, 3 * layer, 2 * layer]


def test_a_stage_keeps_only_its_own_states(tmp_path: Path) -> None:
    """One layer of attention, in the middle; the others keep as much for a long request as for a short one."""
    config = save_decoder("qwen3_next", tmp_path).config
    chain = Chain(tmp_path)
    chain.prefill(prompts(3)[0])
    heads, width = config.linear_num_value_heads, config.linear_value_head_dim
    channels = heads * width + 2 * config.linear_num_key_heads * config.linear_key_head_dim
    states = channels * config.linear_conv_kernel_dim + heads * config.linear_key_head_dim * width
    layer = 2 * config.num_key_value_heads * MAX_TOKENS * config.head_dim
    sizes = [cache.nbytes // (4 * NUM_SLOTS) for cache in chain.caches]
    assert sizes == [states, 2 * states + layer, 2 * states]


@pytest.mark.parametrize(("first", "place"), [(NUM_SLOTS, 0), (0, MAX_TOKENS)])
def test_no_room(first: int, place: int) -> None:
    cache = SlabCache(tiny_config("llama"), NUM_SLOTS, MAX_TOKENS)
    rows = Rows(first, torch.tensor([[place]]))
    with pytest.raises(ServingError, match="do not fit 6 of 48"):
        cache.run(lambda inputs, _: inputs, torch.tensor([[3]]), rows)


def test_models_that_keep_what_slabs_cannot_are_refused() -> None:
    config = tiny_config("llama")
    config.kv_sharing_modes = ["store"] * 5 + ["reuse"]
    with pytest.raises(ServingError, match=r"'llama' model keeps what slabs cannot hold \(DummyLayer\)"):
        SlabCache(config, NUM_SLOTS, MAX_TOKENS)
