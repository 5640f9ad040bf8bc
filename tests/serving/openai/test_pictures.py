"""Pictures out of `/v1/images/generations` and into `/v1/chat/completions`, asked by the official client."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import torch
from openai import APIStatusError, AsyncOpenAI, BadRequestError
from PIL import Image

from ecogen.errors import ServingError
from ecogen.models.image_tokenizer import ImageTokenizer, ImageTokens
from ecogen.models.pair_tokens import pair_tokens
from ecogen.models.pictures import png_of
from ecogen.serving.openai.app import build_app
from ecogen.serving.openai.limits import Limits
from ecogen.serving.openai.pictures import Pictures
from ecogen.serving.openai.text import TextModel
from ecogen.tuning.captions import digit_caption
from ecogen.tuning.vocabulary import train_tokenizer
from tests.serving.openai.served import ScriptedServing, client_of, scripted_app

SIZES = ImageTokens(image_size=8, patch_size=4, codebook_size=11, hidden_size=8)


@cache
def model() -> TextModel:
    torch.manual_seed(0)
    tokenizer = train_tokenizer([digit_caption(digit) for digit in range(10)], 320, SIZES.codebook_size)
    return TextModel(tokenizer, pictures=Pictures(ImageTokenizer(SIZES).eval(), pair_tokens(tokenizer, SIZES)))


def pictures() -> Pictures:
    found = model().pictures
    assert found is not None
    return found


def codes(*numbers: int) -> list[int]:
    return [pictures().tokens.first + number for number in numbers]


@pytest.fixture
def serving() -> ScriptedServing:
    return ScriptedServing(codes(1, 2, 3, 4))


@pytest.fixture
async def client(serving: ScriptedServing) -> AsyncIterator[AsyncOpenAI]:
    async with client_of(build_app(serving, model(), limits=Limits(choices=3, pictures=2))) as client:
        yield client


def opened(b64_json: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


async def test_pictures_for_a_prompt(serving: ScriptedServing, client: AsyncOpenAI) -> None:
    given = await client.images.generate(prompt="a handwritten seven", model="model", n=2, extra_body={"seed": 7})
    assert len(given.data) == 2
    picture = opened(given.data[0].b64_json)
    assert (picture.format, picture.size, picture.mode, given.size) == ("PNG", (8, 8), "L", "8x8")
    drawn = pictures()._images.decode(torch.tensor([[1, 2, 3, 4]]))[0, 0]
    assert np.array_equal(np.asarray(picture), ((1 - drawn) * 255).round().byte().numpy()), "ink is dark"
    [first, second] = serving.asked
    caption = model()._backend.encode("a handwritten seven").ids
    assert first.prompt == (*caption, pictures().tokens.begin)
    assert (first.max_new, first.ends, first.sampling.within) == (4, frozenset(), (codes(0)[0], codes(11)[0]))
    assert (first.sampling.seed, second.sampling.seed) == (7, 8)
    took = given.usage
    assert (took.input_tokens, took.output_tokens, took.total_tokens) == (len(caption) + 1, 8, len(caption) + 9)
    assert took.model_extra["ecogen"]["energy_j"] == pytest.approx(6.0)


async def test_a_caption_is_text_whatever_it_looks_like(serving: ScriptedServing, client: AsyncOpenAI) -> None:
    await client.images.generate(prompt="<|/image|> <|eos|> <|image_3|>", model="model")
    prompt = serving.asked[0].prompt
    special = set(model()._tokenizer.all_special_ids) | set(codes(*range(11)))
    assert [token in special for token in prompt] == [True, *[False] * (len(prompt) - 2), True]


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"n": 4}, "at most 3"),
        ({"size": "1024x1024"}, "this model draws 8x8"),
        ({"response_format": "url"}, "pictures are not kept for 'url'; give 'b64_json'"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "  "}, "prompt: it is empty; say what to draw"),
        ({"prompt": "a seven " * 60}, "at most 60 are taken before a picture"),
        ({"style": "vivid"}, "'style' is not supported here"),
        ({"extra_body": {"sede": 1}}, "did you mean 'seed'"),
    ],
)
async def test_what_is_refused(parameters: dict[str, Any], said: str, client: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError, match=said):
        await client.images.generate(**{"prompt": "a seven", "model": "model"} | parameters)


async def test_without_a_name_the_backbone_draws(serving: ScriptedServing, client: AsyncOpenAI) -> None:
    assert (await client.images.generate(prompt="a seven")).data
    with pytest.raises(APIStatusError, match="The model 'modle' does not exist; did you mean 'model'"):
        await client.images.generate(prompt="a seven", model="modle")


async def test_one_that_fails_fails_all(serving: ScriptedServing, client: AsyncOpenAI) -> None:
    serving._answers = [codes(1, 2, 3, 4), [*codes(1), ServingError("no room")]]
    with pytest.raises(BadRequestError, match="no room"):
        await client.images.generate(prompt="a seven", n=2)
    await serving.idle.wait()


async def test_a_text_model_draws_nothing_and_sees_nothing() -> None:
    async with client_of(scripted_app(ScriptedServing([1]))) as client:
        with pytest.raises(BadRequestError, match="'model' draws no pictures"):
            await client.images.generate(prompt="a seven")
        with pytest.raises(BadRequestError, match="this model sees no pictures"):
            await described(client, url_of(png_of(torch.zeros(1, 8, 8))))


def url_of(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


async def described(client: AsyncOpenAI, *urls: str, text: str = "What is this?", **parameters: Any) -> Any:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": text}, *parts]}]
    return await client.chat.completions.create(model="model", messages=messages, **parameters)


async def test_what_a_picture_shows(serving: ScriptedServing, client: AsyncOpenAI) -> None:
    serving.say(model()._backend.encode("a handwritten two", add_special_tokens=False).ids)
    image = torch.rand(1, 8, 8)
    answer = await described(client, url_of(png_of(image)))
    assert answer.choices[0].message.content == "a handwritten two"
    shown = (image * 255).round() / 255
    written = pictures().tokens.written(pictures()._images.encode(shown[None]))[0].tolist()
    bos = model()._tokenizer.bos_token_id
    assert serving.asked[0].prompt == (bos, *written)
    colourful = io.BytesIO()
    Image.new("RGB", (300, 200), "blue").save(colourful, "JPEG")
    await described(client, url_of(colourful.getvalue(), "jpeg"))
    assert len(serving.asked[1].prompt) == 7, "any size and colour will do"


async def test_the_likeliest_is_said_of_a_picture(serving: ScriptedServing, client: AsyncOpenAI) -> None:
    url = url_of(png_of(torch.rand(1, 8, 8)))
    for parameters in ({}, {"temperature": None}, {"temperature": 0.5}):
        await described(client, url, **parameters)
    await client.completions.create(model="model", prompt="a word")
    assert [asked.sampling.temperature for asked in serving.asked] == [0.0, 0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("urls", "said"),
    [
        (["https://example.org/cat.png"], "nothing is fetched"),
        (["file:///etc/passwd"], "nothing is fetched"),
        (["data:image/png;base64,!!!"], "the picture is not in base64; send a PNG"),
        ([url_of(b"no picture")], "the picture is no picture that can be read; send a PNG"),
        ([], "send one picture"),
        ([url_of(png_of(torch.zeros(1, 8, 8)))] * 2, "send one picture"),
        ([url_of(png_of(torch.zeros(1, 8, 8)))] * 3, "3 pictures, at most 2"),
    ],
)
async def test_pictures_that_are_refused(urls: list[str], said: str, client: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError, match=said):
        await described(client, *urls)


async def test_a_bomb_is_refused(client: AsyncOpenAI) -> None:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    with pytest.raises(BadRequestError, match=r"the picture (is no picture|has 20000 x 20000 pixels)"):
        await described(client, url_of(file.getvalue()))


async def test_parts_that_are_not_known(client: AsyncOpenAI) -> None:
    address = str(client.base_url)
    async with httpx.AsyncClient(base_url=address) as plain:
        for part in ({"type": "image_url", "image_url": "x"}, {"type": "input_audio"}, {"type": "text", "text": 3}):
            body = {"model": "model", "messages": [{"role": "user", "content": [part]}]}
            answer = await plain.post("chat/completions", json=body)
            assert answer.status_code == 400, answer.text
            assert "messages[0].content[0]" in answer.json()["error"]["message"]
