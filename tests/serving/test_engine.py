"""Answers through a chain of stages equal transformers' own, whoever else is served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ecogen.errors import NodeLostError, OverloadedError, ServingError, StepError
from ecogen.models.decoder import load_decoder
from ecogen.placement import Segment
from ecogen.serving.decoder_stage import DecoderStage
from ecogen.serving.engine import Engine, RunStep
from ecogen.serving.sampling import Chosen, Sampling
from ecogen.serving.stages import Choosers
from ecogen.serving.steps import Order
from tests.greedy import Agree, alone
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


def chain_of(folder: Path, slots: int = 2, spoil: str | None = None) -> RunStep:
    """Three stages and a chooser, as on three devices; `spoil` is a request that gets no numbers."""
    num = len(SEGMENTS)
    stages = [DecoderStage(load_decoder(folder, [s]), s, num, slots, MAX_TOKENS) for s in SEGMENTS]
    turns, choosers = [asyncio.Lock() for _ in stages], Choosers()

    async def run_step(order: Order) -> list[Chosen | str]:
        state = None
        for stage, turn in zip(stages, turns, strict=True):
            async with turn:
                state = await asyncio.to_thread(stage.run, order.step, state)
        assert isinstance(state, Tensor)
        logits = state.clone()
        for row, name in enumerate(order.step.requests):
            if name == spoil:
                logits[row] = torch.nan
        return choosers.choose(order, logits)

    return run_step


@asynccontextmanager
async def engine_of(run_step: RunStep, slots: int = 2, max_waiting: int = 99) -> AsyncIterator[Engine]:
    engine = Engine(slots_per_group=slots, max_tokens=MAX_TOKENS, chunk=5, max_waiting=max_waiting)
    engine.attach(run_step, len(SEGMENTS))
    yield engine
    await engine.detach()


NUMBERS = count()


def ask(engine: Engine, prompt: Sequence[int], max_new: int, sampling: Sampling = GREEDY, **more: Any) -> Any:
    return engine.generate(str(next(NUMBERS)), prompt, sampling, max_new=max_new, **more)


async def answer(engine: Engine, prompt: Sequence[int], max_new: int, **more: Any) -> list[int]:
    return [chosen.token async for chosen in ask(engine, prompt, max_new, **more)]


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 25, (count,), generator=generator).tolist()
    return [torch.randint(3, 99, (length,), generator=generator).tolist() for length in lengths]


async def test_many_requests_at_once_answer_as_each_alone(folder: Path, whole: PreTrainedModel, agree: Agree) -> None:
    """More than there are slots, of all lengths; they come and go."""
    asked = [(prompt, 3 + 5 * (index % 4)) for index, prompt in enumerate(prompts(14))]
    async with engine_of(chain_of(folder)) as engine:
        answers = await asyncio.gather(*(answer(engine, *request) for request in asked))
    for given, request in zip(answers, asked, strict=True):
        agree(given, alone(whole, *request))


@pytest.mark.parametrize(
    "model_type",
    ["deepseek_v32", *(pytest.param(one, marks=pytest.mark.slow) for one in ("qwen3_next", "inkling_text"))],
)
async def test_models_that_keep_more_than_keys_and_values(model_type: str, tmp_path: Path, agree: Agree) -> None:
    """Slots go from one request to the next, and requests from slot to slot, with states and indexed keys."""
    changes = {"index_n_heads": 16} if model_type == "deepseek_v32" else {}  # two give ties, which lengths decide
    whole = save_decoder(model_type, tmp_path, **changes)
    asked = [(prompt, 3 + 5 * (index % 4)) for index, prompt in enumerate(prompts(14))]
    async with engine_of(chain_of(tmp_path)) as engine:
        answers = await asyncio.gather(*(answer(engine, *request) for request in asked))
    for given, request in zip(answers, asked, strict=True):
        agree(given, alone(whole, *request))


async def test_an_answer_ends_at_an_ending_token(folder: Path, whole: PreTrainedModel, agree: Agree) -> None:
    [prompt] = prompts(1)
    wanted = alone(whole, prompt, 12)
    end = wanted.tokens[5]
    async with engine_of(chain_of(folder)) as engine:
        agree(await answer(engine, prompt, 12, ends={end}), wanted[: wanted.tokens.index(end) + 1])


async def test_who_leaves_early_frees_the_slot(folder: Path, whole: PreTrainedModel, agree: Agree) -> None:
    """Readers that vanish do not keep others out: here there are more of them than slots."""
    asked = prompts(8)
    async with engine_of(chain_of(folder, slots=1), slots=1) as engine:
        for prompt in asked[:6]:
            stream = ask(engine, prompt, 30)
            await anext(stream)
            await stream.aclose()
        agree(await answer(engine, asked[7], 6), alone(whole, asked[7], 6))
        assert engine.num_requests == 0


async def test_a_step_that_fails_is_told_to_its_requests_only(
    folder: Path, whole: PreTrainedModel, agree: Agree, caplog: pytest.LogCaptureFixture
) -> None:
    [prompt] = prompts(1)
    async with engine_of(fail_once(chain_of(folder), RuntimeError("a stage burned down"))) as engine:
        with pytest.raises(StepError, match=r"^a step through the model failed; the log says why$"):
            await answer(engine, prompt, 4)
        assert "a stage burned down" in caplog.text
        agree(await answer(engine, prompt, 4), alone(whole, prompt, 4))


def fail_once(run_step: RunStep, problem: Exception, after: int = 0) -> RunStep:
    fails = chain([False] * after, [True], repeat(False))

    async def run_or_fail(order: Order) -> Sequence[Chosen | str]:
        if next(fails):
            raise problem
        return await run_step(order)

    return run_or_fail


async def test_a_token_that_cannot_be_chosen_ends_its_request_only(
    folder: Path, whole: PreTrainedModel, agree: Agree
) -> None:
    """Weights that overflow give logits of which nothing can be drawn."""
    first, second = prompts(2)
    async with engine_of(chain_of(folder, spoil="spoiled")) as engine:
        drawn = engine.generate("spoiled", first, Sampling(temperature=1), max_new=4)
        spoiled, sound = await asyncio.gather(anext(drawn), answer(engine, second, 6), return_exceptions=True)
        assert isinstance(spoiled, ServingError)
        assert "no token can be chosen" in str(spoiled)
        agree(sound, alone(whole, second, 6))
        agree(await answer(engine, first, 4), alone(whole, first, 4))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=3), Sampling(frequency_penalty=0.9, seed=5)])
async def test_what_a_lost_chain_had_begun_the_next_one_goes_on_with(folder: Path, sampling: Sampling) -> None:
    """No token is lost or doubled, and what is drawn is what would have been drawn."""
    asked = [(prompt, 6 + index % 9) for index, prompt in enumerate(prompts(9))]

    async def answers(engine: Engine) -> list[list[int]]:
        return await asyncio.gather(*(answer(engine, *request, sampling=sampling) for request in asked))

    async with engine_of(chain_of(folder)) as engine:
        wanted = await answers(engine)
    for lost_after in (0, 7, 30):
        async with engine_of(fail_once(chain_of(folder), NodeLostError("b", "gone"), lost_after)) as engine:
            answering = asyncio.create_task(answers(engine))
            await asyncio.sleep(0.1)
            await engine.detach()
            engine.attach(chain_of(folder), len(SEGMENTS))
            assert await answering == wanted


async def test_one_engine_goes_on_with_what_another_began(folder: Path) -> None:
    [prompt] = prompts(1)
    sampling = Sampling(seed=11, presence_penalty=0.5)
    async with engine_of(chain_of(folder)) as engine:
        wanted = await answer(engine, prompt, 9, sampling=sampling)
        assert await answer(engine, prompt, 9, sampling=sampling, given=wanted[:4]) == wanted[4:]


async def test_without_a_chain_requests_wait_or_are_told(folder: Path, whole: PreTrainedModel, agree: Agree) -> None:
    [prompt] = prompts(1)
    engine = Engine(slots_per_group=1, max_tokens=MAX_TOKENS, max_waiting=2)
    waiting = [asyncio.create_task(answer(engine, prompt, 4)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="2 requests wait already"):
        await answer(engine, prompt, 4)
    engine.attach(chain_of(folder), len(SEGMENTS))
    for given in await asyncio.gather(*waiting):
        agree(given, alone(whole, prompt, 4))
    await engine.detach()
    waiting = [asyncio.create_task(answer(engine, prompt, 4))]
    await asyncio.sleep(0)
    engine.fail(ServingError("too few devices"))
    with pytest.raises(ServingError, match="too few devices"):
        await waiting[0]


async def test_requests_that_do_not_fit(folder: Path) -> None:
    async with engine_of(chain_of(folder)) as engine:
        for prompt, max_new in (([], 4), ([5], 0), ([5] * 60, 5)):
            with pytest.raises(ServingError, match=f"{len(prompt)} tokens and an answer of {max_new} do not fit"):
                await answer(engine, prompt, max_new)
