"""`/v1/completions`, asked by the official client."""

from __future__ import annotations

from typing import Any

import pytest
from openai import AsyncOpenAI

from ecogen.accounting.bill import Bill
from ecogen.serving.generation import Finish
from tests.serving.openai.served import (
    ScriptedServing,
    a_finish,
    byte_level,
    client_of,
    echo_app,
    scripted_app,
    tokens,
)

END = 2


async def ask(client: AsyncOpenAI, prompt: Any = "hello", model: str = "model", **settings: Any) -> Any:
    return await client.completions.create(model=model, prompt=prompt, **settings)


async def streamed(client: AsyncOpenAI, **settings: Any) -> list[Any]:
    return [chunk async for chunk in await ask(client, stream=True, **settings)]


def joined(chunks: list[Any], index: int = 0) -> str:
    return "".join(choice.text for chunk in chunks for choice in chunk.choices if choice.index == index)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("hello world", ["hello world"]),
        (["hello", "naïve 中文"], ["hello", "naïve 中文"]),
        (tokens("hello 😀"), ["hello 😀"]),
        ([tokens("a test"), tokens("{}")], ["a test", "{}"]),
    ],
)
async def test_prompts_of_all_four_kinds(prompt: Any, texts: list[str]) -> None:
    async with client_of(echo_app()) as client:
        answer = await ask(client, prompt, "echo", max_tokens=40)
        chunks = await streamed(client, prompt=prompt, model="echo", max_tokens=40)
    assert [(choice.index, choice.text) for choice in answer.choices] == [*enumerate(texts)]
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert [joined(chunks, index) for index in range(len(texts))] == texts
    assert {chunk.id for chunk in chunks} == {chunks[0].id} != {answer.id}
    assert answer.object == chunks[0].object == "text_completion"


async def test_what_an_answer_took() -> None:
    serving = ScriptedServing(tokens("one two"), finish=a_finish("edge-1"))
    async with client_of(scripted_app(serving)) as client:
        answer = await ask(client, tokens("hello world"), n=2)
    num_prompt, num_answer = len(tokens("hello world")), len(tokens("one two"))
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (num_prompt, 2 * num_answer)
    assert usage.total_tokens == num_prompt + 2 * num_answer
    assert usage.ecogen.pop("where") == ["edge-1", "cloud"]
    assert usage.ecogen.pop("semantic") == []
    energy = {"energy_j": 6.0, "energy_low_j": 3.0, "energy_high_j": 12.0, "emissions_g": 0.6}
    assert usage.ecogen == pytest.approx(energy | {"t_ul_s": 0.25, "t_inference_s": 1.5, "t_dl_s": 0.125})


async def test_a_stop_string_ends_an_answer_across_tokens_and_it_is_billed() -> None:
    """Who has enough is told what it took, and what was made is counted, the stop included."""
    said = tokens("hello world, this is a test")
    async with client_of(scripted_app(serving := ScriptedServing(said))) as client:
        answer = await ask(client, stop=["lo wor", "nowhere"], max_tokens=40)
        chunks = await streamed(client, stop="world, th", max_tokens=40, stream_options={"include_usage": True})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("hel", "stop")
    assert answer.usage.ecogen["energy_j"] == 3.0
    assert 0 < answer.usage.completion_tokens < len(said)
    assert (joined(chunks), chunks[-2].choices[0].finish_reason) == ("hello ", "stop")
    assert chunks[-1].usage.ecogen["energy_j"] == 3.0
    assert serving.running == 0


async def test_what_may_begin_a_stop_comes_in_the_end() -> None:
    async with client_of(scripted_app(ScriptedServing([*tokens("hello wor"), END]))) as client:
        chunks = await streamed(client, stop="world", max_tokens=40)
    assert joined(chunks) == "hello wor"


async def test_what_is_not_known_to_be_billed_is_not_told() -> None:
    """An engine that says nothing of what it took."""
    serving = ScriptedServing(tokens("hello world"))
    serving.generate = lambda request: without_finish(ScriptedServing.generate(serving, request))  # type: ignore
    async with client_of(scripted_app(serving)) as client:
        for settings in ({}, {"stop": "lo"}):
            answer = await ask(client, **settings)
            assert answer.usage.ecogen is None
            assert answer.usage.completion_tokens > 0


async def without_finish(answering: Any) -> Any:
    async for event in answering:
        if not isinstance(event, Finish):
            yield event


async def test_length_and_ending_token() -> None:
    async with client_of(scripted_app(ScriptedServing([*tokens("hello"), END]))) as client:
        ended, full = await ask(client, max_tokens=10), await ask(client, max_tokens=1)
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("hello", "stop")
    assert ended.usage.completion_tokens == len(tokens("hello")) + 1
    assert (full.choices[0].finish_reason, full.usage.completion_tokens) == ("length", 1)


async def test_echo_and_best_of() -> None:
    async with client_of(echo_app()) as client:
        answer = await ask(client, ["hello ", "a "], "echo", echo=True, n=2, best_of=2)
        chunks = await streamed(client, prompt="hello ", model="echo", echo=True)
    assert [choice.text for choice in answer.choices] == ["hello hello "] * 2 + ["a a "] * 2
    assert joined(chunks) == "hello hello "


async def test_settings_reach_the_engine() -> None:
    serving = ScriptedServing(tokens("x"))
    async with client_of(scripted_app(serving)) as client:
        await ask(
            client,
            tokens("hello"),
            max_tokens=7,
            temperature=0.5,
            top_p=0.25,
            seed=11,
            n=2,
            presence_penalty=0.75,
            frequency_penalty=-1.5,
            logit_bias={"7": -100, "8": 2},
            logprobs=3,
            user="somebody",
            extra_body={"top_k": 5, "response_format": {"type": "json_object"}, "suffix": None},
        )
    first, second = serving.asked
    sampling = first.sampling
    assert (first.prompt, first.max_new, first.ends) == (tuple(tokens("hello")), 7, {END})
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.num_top) == (0.5, 0.25, 5, 3)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.75, -1.5)
    assert sampling.logit_bias == ((7, -100.0), (8, 2.0))
    assert '"object"' in (sampling.grammar or "")
    assert (first.sampling.seed, second.sampling.seed) == (11, 12), "each choice draws on its own"


async def test_defaults_are_openais() -> None:
    serving = ScriptedServing(tokens("x"))
    async with client_of(scripted_app(serving)) as client:
        await ask(client, temperature=None, seed=None, stop=None, logit_bias=None)
    [asked] = serving.asked
    assert (asked.max_new, asked.tenant) == (16, None)
    assert asked.sampling == type(asked.sampling)()
    assert asked.prompt[0] == 1, "text begins as the tokenizer says"


async def test_the_seed_at_its_end_is_one() -> None:
    serving = ScriptedServing(tokens("x"))
    async with client_of(scripted_app(serving)) as client:
        await ask(client, seed=2**63 - 1, n=2)
    assert [asked.sampling.seed for asked in serving.asked] == [2**63 - 1, -(2**63)]


async def test_log_probabilities() -> None:
    said = [*tokens("hello 中"), END]
    async with client_of(scripted_app(ScriptedServing(said))) as client:
        whole = (await ask(client, logprobs=2)).choices[0]
        chunks = await streamed(client, logprobs=2)
        none = (await ask(client, logprobs=0)).choices[0].logprobs
        assert (await ask(client)).choices[0].logprobs is None
    told = whole.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == len(said) - 1
    assert told.tokens[0] == whole.text[: told.text_offset[1]]
    assert told.token_logprobs == [-0.5] * (len(said) - 1)
    assert all(len(top) == 2 and top[token] == -0.5 for token, top in zip(told.tokens, told.top_logprobs, strict=True))
    assert none.top_logprobs is None
    parts = [choice.logprobs for chunk in chunks for choice in chunk.choices]
    assert [token for part in parts for token in part.tokens] == told.tokens
    assert [at for part in parts for at in part.text_offset] == told.text_offset


async def test_log_probabilities_end_with_the_text() -> None:
    """A token is told when its text is, and not where a stop string takes it."""
    async with client_of(scripted_app(ScriptedServing(tokens("a test of what")))) as client:
        choice = (await ask(client, logprobs=0, stop=" of")).choices[0]
    assert choice.text == "a test"
    assert choice.logprobs.tokens == [byte_level().decode([token]) for token in tokens("a test")]


async def test_usage_in_the_last_chunk_where_asked() -> None:
    async with client_of(echo_app()) as client:
        chunks = await streamed(client, model="echo", stream_options={"include_usage": True})
        without = await streamed(client, model="echo")
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.ecogen["energy_j"] == Bill.zero().energy_j.mid
    assert chunks[-1].usage.ecogen["where"] == ["echo"]
    assert len(without) == len(chunks) - 1
