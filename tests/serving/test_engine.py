"""Answers through a chain of stages equal transformers' own, whoever else is served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ecogen.errors import ServingError
from ecogen.models.decoder import load_decoder
from ecogen.placement import Segment
from ecogen.serving.decoder_stage import DecoderStage
from ecogen.serving.engine import Engine, RunStep
from ecogen.serving.sampling import Sampling
from ecogen.serving.scheduler import Step
from tests.models.decoders import NUM_BLOCKS, save_decoder

SEGMENTS = [Segment(0, 1, has_embedding=True), Segment(1, 4), Segment(4, NUM_BLOCKS, has_head=True)]
MAX_TOKENS, GREEDY = 64, Sampling(temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_decoder("llama", folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@asynccontextmanager
async def engine_of(folder: Path, slots: int = 2) -> AsyncIterator[Engine]:
    num = len(SEGMENTS)
    stages = [DecoderStage(load_decoder(folder, [s]), s, num, slots, MAX_TOKENS) for s in SEGMENTS]
    turns = [asyncio.Lock() for _ in stages]

    async def run_step(step: Step) -> Tensor:
        state = None
        for stage, turn in zip(stages, turns, strict=True):
            async with turn:
                state = await asyncio.to_thread(stage.run, step, state)
        assert isinstance(state, Tensor)
        return state

    async with Engine(run_step, num_groups=num, slots_per_group=slots, max_tokens=MAX_TOKENS, chunk=5) as engine:
        yield engine


async def answer(engine: Engine, prompt: Sequence[int], max_new: int, **kwargs: object) -> list[int]:
    return [chosen.token async for chosen in engine.generate(prompt, GREEDY, max_new=max_new, **kwargs)]


def alone(whole: PreTrainedModel, prompt: list[int], max_new: int) -> list[int]:
    ids = whole.generate(
        torch.tensor([prompt]), max_new_tokens=max_new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return ids[0, len(prompt) :].tolist()


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 25, (count,), generator=generator).tolist()
    return [torch.randint(3, 99, (length,), generator=generator).tolist() for length in lengths]


async def test_many_requests_at_once_answer_as_each_alone(folder: Path, whole: PreTrainedModel) -> None:
    """More than there are slots, of all lengths; they come and go."""
    asked = [(prompt, 3 + 5 * (index % 4)) for index, prompt in enumerate(prompts(14))]
    async with engine_of(folder) as engine:
        answers = await asyncio.gather(*(answer(engine, *request) for request in asked))
    assert answers == [alone(whole, *request) for request in asked]


@pytest.mark.parametrize("model_type", ["qwen3_next", "deepseek_v32", "inkling_text"])
async def test_models_that_keep_more_than_keys_and_values(model_type: str, tmp_path: Path) -> None:
    """Slots go from one request to the next, and requests from slot to slot, with states and indexed keys."""
    changes = {"index_n_heads": 16} if model_type == "deepseek_v32" else {}  # two give ties, which lengths decide
    whole = save_decoder(model_type, tmp_path, **changes)
    asked = [(prompt, 3 + 5 * (index % 4)) for index, prompt in enumerate(prompts(14))]
    async with engine_of(tmp_path) as engine:
        answers = await asyncio.gather(*(answer(engine, *request) for request in asked))
    assert answers == [alone(whole, *request) for request in asked]


async def test_an_answer_ends_at_an_ending_token(folder: Path, whole: PreTrainedModel) -> None:
    [prompt] = prompts(1)
    wanted = alone(whole, prompt, 12)
    end = wanted[5]
    async with engine_of(folder) as engine:
        assert await answer(engine, prompt, 12, ends={end}) == wanted[: wanted.index(end) + 1]


async def test_who_leaves_early_frees_the_slot(folder: Path, whole: PreTrainedModel) -> None:
    """Readers that vanish do not keep others out: here there are more of them than slots."""
    asked = prompts(8)
    async with engine_of(folder, slots=1) as engine:
        for prompt in asked[:6]:
            stream = engine.generate(prompt, GREEDY, max_new=30)
            await anext(stream)
            await stream.aclose()
        assert await answer(engine, asked[7], 6) == alone(whole, asked[7], 6)


async def test_a_step_that_fails_is_told_to_its_requests_only(folder: Path, whole: PreTrainedModel) -> None:
    [prompt] = prompts(1)
    async with engine_of(folder) as engine:
        engine._run_step = fail_once(engine._run_step)
        with pytest.raises(RuntimeError, match="a stage burned down"):
            await answer(engine, prompt, 4)
        assert await answer(engine, prompt, 4) == alone(whole, prompt, 4)


def fail_once(run: RunStep) -> RunStep:
    fails = iter([True])

    async def run_or_fail(step: Step) -> Tensor:
        if next(fails, False):
            raise RuntimeError("a stage burned down")
        return await run(step)

    return run_or_fail


async def test_a_token_that_cannot_be_chosen_ends_its_request_only(folder: Path, whole: PreTrainedModel) -> None:
    """Weights that overflow give logits of which nothing can be drawn."""
    first, second = prompts(2)
    async with engine_of(folder) as engine:
        engine._run_step = spoil(engine._run_step, of="0")
        drawn = engine.generate(first, Sampling(temperature=1), max_new=4)
        spoiled, sound = await asyncio.gather(anext(drawn), answer(engine, second, 6), return_exceptions=True)
        assert isinstance(spoiled, ServingError)
        assert "no token can be chosen" in str(spoiled)
        assert sound == alone(whole, second, 6)
        assert await answer(engine, first, 4) == alone(whole, first, 4)


def spoil(run: RunStep, of: str) -> RunStep:
    async def run_and_spoil(step: Step) -> Tensor:
        logits = await run(step)
        rows = zip(logits, step.requests, strict=True)
        return torch.stack([row * torch.nan if name == of else row for row, name in rows])

    return run_and_spoil


async def test_requests_that_do_not_fit(folder: Path) -> None:
    async with engine_of(folder) as engine:
        for prompt, max_new in (([], 4), ([5], 0), ([5] * 60, 5)):
            with pytest.raises(ServingError, match=f"{len(prompt)} tokens and an answer of {max_new} do not fit"):
                await answer(engine, prompt, max_new)
