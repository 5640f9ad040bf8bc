"""A random model that is held to a grammar says nothing but JSON, through the engine and the API."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import AsyncOpenAI, BadRequestError
from transformers import AutoConfig

from ecogen.config import Serving
from ecogen.errors import ServingError
from ecogen.serving.grammar import GrammarConstraint, json_grammar, vocabulary_of
from ecogen.serving.openai.app import build_app
from ecogen.serving.openai.text import load_text
from ecogen.serving.sampling import Sampler, Sampling
from tests.models.decoders import save_decoder
from tests.serving.federations import serving, tiny_recipe
from tests.serving.openai.served import byte_level, client_of, tokens, wrapped

END = 2
NUM_LOGITS = 420  # more than the tokenizer has tokens, as models have
MAX_TOKENS = 200
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["tree", "stone"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["kind", "count", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_decoder("llama", folder, vocab_size=NUM_LOGITS, max_position_embeddings=MAX_TOKENS)
    wrapped(byte_level()).save_pretrained(folder)
    return folder


@asynccontextmanager
async def random_model(folder: Path, tmp_path: Path, model: Path | None = None) -> AsyncIterator[AsyncOpenAI]:
    """A federation of two devices; the second one chooses tokens, and is delivered the tokenizer for that."""
    recipe = tiny_recipe(model or folder, devices=2, serving=Serving(slots=4, max_tokens=MAX_TOKENS))
    async with serving(recipe, tmp_path) as (gateway, _), client_of(build_app(gateway, load_text(folder))) as client:
        yield client


async def ask(client: AsyncOpenAI, **settings: Any) -> Any:
    return await client.chat.completions.create(
        model="llama", messages=[{"role": "user", "content": "hello"}], max_tokens=120, **settings
    )


async def test_a_schema_holds_a_random_model(folder: Path, tmp_path: Path) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    async with random_model(folder, tmp_path) as client:
        free = await ask(client, seed=1, n=4)
        held = await ask(client, seed=1, n=4, response_format=form)
        greedy = await ask(client, temperature=0, response_format=form)
    for choice in (*held.choices, *greedy.choices):
        said = json.loads(choice.message.content)
        assert choice.finish_reason == "stop"
        assert said["kind"] in ("tree", "stone")
        assert 0 <= said["count"] <= 99
        assert len(said["tags"]) <= 2
        assert all(len(tag) <= 4 for tag in said["tags"])
    assert len({choice.message.content for choice in held.choices}) == 4
    assert not any(is_json(choice.message.content) for choice in free.choices)


async def test_any_object(folder: Path, tmp_path: Path) -> None:
    """Nudged to what ends strings and objects, since a random model hardly would."""
    ends = {str(token): 6 for text in ('"', "}", "]") for token in tokens(text)}
    form: Any = {"type": "json_object"}
    async with random_model(folder, tmp_path) as client:
        answer = await ask(client, seed=3, n=4, response_format=form, logit_bias=ends)
    ended = [choice.message.content for choice in answer.choices if choice.finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(said), dict) for said in ended)


async def test_a_model_without_a_tokenizer_knows_no_grammars_and_says_so(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "llama", ignore=shutil.ignore_patterns("tokenizer*"))
    async with random_model(folder, tmp_path, tmp_path / "llama") as client:
        with pytest.raises(BadRequestError, match="cannot be held to a grammar; ask without response_format"):
            await ask(client, response_format={"type": "json_object"})


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def test_what_a_grammar_allows() -> None:
    vocabulary = vocabulary_of(wrapped(byte_level()), {END})
    constraint = GrammarConstraint(vocabulary, json_grammar({"const": {"a": True}}))
    for token in tokens('{"a":true}'):
        allowed = constraint.mask(torch.zeros(NUM_LOGITS)).isfinite()
        assert allowed[token]
        assert not allowed[END]
        assert not allowed[byte_level().get_vocab_size() :].any()
        constraint.take(token)
    assert constraint.mask(torch.zeros(NUM_LOGITS)).isfinite().nonzero().tolist() == [[END]]


def test_blanks_have_an_end() -> None:
    """A weak model would go on with them for ever."""
    constraint = GrammarConstraint(vocabulary_of(wrapped(byte_level()), {END}), json_grammar())
    [brace], [blank] = tokens("{"), tokens("  ")[:1]
    constraint.take(brace)
    count = 0
    while constraint.mask(torch.zeros(NUM_LOGITS)).isfinite()[blank]:
        constraint.take(blank)
        count += 1
        assert count < 20
    assert count > 3


def test_a_token_against_the_grammar_ends_the_answer() -> None:
    constraint = GrammarConstraint(vocabulary_of(wrapped(byte_level()), {END}), json_grammar())
    with pytest.raises(ServingError, match="the answer cannot keep to its grammar"):
        constraint.take(tokens("x")[0])


def test_schemas_that_cannot_be_enforced() -> None:
    for schema in ({"type": "nonsense"}, {"$ref": "#/nothing"}, {"type": "string", "format": "weird"}):
        with pytest.raises(ServingError, match="the JSON schema cannot be enforced: "):
            json_grammar(schema)


def test_a_sampler_needs_to_know_grammars() -> None:
    with pytest.raises(ServingError, match="cannot be held to a grammar"):
        Sampler(Sampling(grammar=json_grammar()))


def test_ending_tokens_come_from_all_of_a_models_files(folder: Path, tmp_path: Path) -> None:
    wrapped(byte_level()).save_pretrained(tmp_path)
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert load_text(tmp_path).ends == {END, 3, 4}
