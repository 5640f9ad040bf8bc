"""What Prometheus reads."""

from __future__ import annotations

import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.openai.served import ScriptedServing, a_finish, client_of, echo_app, scripted_app, tokens

Samples = dict[tuple[str, ...], float]


async def scraped(client: AsyncOpenAI) -> Samples:
    """Each sample by its name and labels."""
    async with httpx2.AsyncClient() as http:
        answer = await http.get(f"{client.base_url}../metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    samples = [sample for family in families for sample in family.samples]
    return {(each.name.removeprefix("ecogen_"), *each.labels.values()): each.value for each in samples}


async def test_requests_tokens_times_joules_and_grams() -> None:
    serving = ScriptedServing([70] * 4, finish=a_finish(energy_j=3.0))
    async with client_of(scripted_app(serving)) as client:
        await client.completions.create(model="model", prompt=tokens("hello world"), n=2)
        stream = await client.completions.create(model="model", prompt=[5, 6, 7], stream=True)
        assert len([chunk async for chunk in stream])
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(model="model", prompt="x", n=0)
        with pytest.raises(openai.NotFoundError):
            await client.get("/whatever/somebody/thinks/of", cast_to=object)
        samples = await scraped(client)
    assert samples["requests_total", "/v1/completions", "200"] == 2
    assert samples["requests_total", "/v1/completions", "400"] == 1
    assert samples["requests_total", "other", "404"] == 1
    assert samples["prompt_tokens_total",] == len(tokens("hello world")) + 3
    assert samples["completion_tokens_total",] == 12
    assert samples["time_to_first_token_seconds_count",] == 3
    assert samples["time_between_tokens_seconds_count",] == 9
    assert samples["energy_joules_total",] == pytest.approx(9.0)
    assert samples["emissions_grams_total",] == pytest.approx(0.9)
    assert samples["requests_in_progress",] == 1, "the one that asks"


async def test_requests_that_run_and_that_were_left() -> None:
    serving = ScriptedServing([70] * 4, stalls=2)
    async with client_of(scripted_app(serving)) as client:
        stream = await client.completions.create(model="model", prompt="x", stream=True)
        await serving.stalled.wait()
        assert (await scraped(client))["requests_in_progress",] == 2
        await stream.close()
        await serving.left.wait()
        while (samples := await scraped(client))["requests_in_progress",] > 1:
            pass
    assert samples["requests_total", "/v1/completions", "200"] == 1
    assert samples["completion_tokens_total",] == 2


async def test_two_servers_count_for_themselves() -> None:
    async with client_of(echo_app()) as one, client_of(echo_app()) as other:
        await one.completions.create(model="echo", prompt="x")
        assert ("requests_total", "/v1/completions", "200") in await scraped(one)
        assert ("requests_total", "/v1/completions", "200") not in await scraped(other)


async def test_who_leaves_before_there_is_an_answer() -> None:
    """No status was sent: 499, as nginx counts it."""
    serving = ScriptedServing([70] * 4, stalls=0)
    async with client_of(scripted_app(serving)) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=0.05).completions.create(model="model", prompt="x")
        await serving.left.wait()
        while (samples := await scraped(client))["requests_in_progress",] > 1:
            pass
    assert samples["requests_total", "/v1/completions", "499"] == 1
