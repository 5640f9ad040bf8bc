"""What a client says and learns of answers to questions that mean the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ecogen.serving.generation import GenerationRequest, Taken
from ecogen.serving.openai.questions import _wording
from tests.serving.openai.served import ScriptedServing, a_finish, client_of, scripted_app
from tests.serving.openai.test_metrics import scraped


async def chat(*messages: tuple[str, str], **settings: Any) -> GenerationRequest:
    """The request that a chat becomes."""
    serving = ScriptedServing([70])
    async with client_of(scripted_app(serving)) as client:
        said: Any = [{"role": role, "content": content} for role, content in messages]
        await client.chat.completions.create(model="model", messages=said, max_tokens=1, **settings)
    return serving.asked[0]


async def completion(prompt: Any, **settings: Any) -> list[GenerationRequest]:
    serving = ScriptedServing([70])
    async with client_of(scripted_app(serving)) as client:
        await client.completions.create(model="model", prompt=prompt, max_tokens=1, **settings)
    return serving.asked


async def test_the_last_message_may_be_worded_otherwise_and_no_other() -> None:
    one, other, more, system = [
        (await chat(*messages)).wording
        for messages in (
            [("user", "a")],
            [("user", "b")],
            [("user", "a"), ("assistant", "c"), ("user", "b")],
            [("system", "c"), ("user", "b")],
        )
    ]
    assert one is not None
    assert other is not None
    assert more is not None
    assert system is not None
    assert [wording.text for wording in (one, other, more, system)] == ["a", "b", "b", "b"]
    assert one.context == other.context
    assert len({other.context, more.context, system.context}) == 3


async def test_texts_have_a_wording_and_tokens_none() -> None:
    assert [one.wording and one.wording.text for one in await completion(["a", "b"])] == ["a", "b"]
    assert [one.wording for one in await completion([5, 6])] == [None]
    assert _wording("a" * 400) is not None
    assert _wording("a" * 401) is None


@pytest.mark.parametrize("settings", [{"extra_body": {"semantic_cache": False}}, {"logprobs": 1}], ids=str)
async def test_whoever_wants_the_model_itself_is_given_it(settings: dict[str, Any]) -> None:
    assert [one.wording for one in await completion("a", **settings)] == [None]
    if settings.get("logprobs"):
        settings = {"logprobs": True}
    assert (await chat(("user", "a"), **settings)).wording is None


async def test_a_hit_is_told_and_counted() -> None:
    serving = ScriptedServing([70], finish=replace(a_finish(), taken=Taken(0.95, "How is it?")))
    async with client_of(scripted_app(serving)) as client:
        answer = await client.completions.create(model="model", prompt="x", n=2)
        samples = await scraped(client)
    assert answer.usage is not None
    took: Any = answer.usage.model_extra
    assert took["ecogen"]["semantic"] == [{"similarity": 0.95, "question": "How is it?"}] * 2
    assert samples["answers_taken_total",] == 2


async def test_without_a_hit_none_is_told() -> None:
    async with client_of(scripted_app(ScriptedServing([70]))) as client:
        answer = await client.completions.create(model="model", prompt="x")
    assert answer.usage is not None
    took: Any = answer.usage.model_extra
    assert took["ecogen"]["semantic"] == []
