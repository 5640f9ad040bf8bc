"""API servers on loopback for tests: tokenizers made here, engines that do as they are told, the official client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache

from openai import AsyncOpenAI
from starlette.applications import Starlette
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ecogen.accounting.bill import Bill, Bounds
from ecogen.serving.generation import Finish, GenerationRequest, ServedModel
from ecogen.serving.openai.app import build_app
from ecogen.serving.openai.echo import EchoServing
from ecogen.serving.openai.keys import Keys
from ecogen.serving.openai.limits import Limits
from ecogen.serving.openai.listening import listening
from ecogen.serving.openai.text import TextModel
from ecogen.serving.sampling import Chosen

SENTENCES = ["hello world, this is a test of what is said", "a naïve café, 中文 and 😀", '{"name": [1, 2, true]}'] * 9
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
ALL = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def byte_level() -> Tokenizer:
    """As of GPT-2 and Llama 3: every token is a string of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


@cache
def byte_fallback() -> Tokenizer:
    """As of SentencePiece: words with a mark before them, and bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator([text for text in SENTENCES if text.isascii()], trainer)
    written = json.loads(tokenizer.to_str())
    written["model"]["byte_fallback"] = True
    written["model"]["vocab"] |= {name: len(written["model"]["vocab"]) + at for at, name in enumerate(ALL)}
    tokenizer = Tokenizer.from_str(json.dumps(written))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def wrapped(tokenizer: Tokenizer, **settings: object) -> PreTrainedTokenizerFast:
    """As transformers has it; every text begins with <s>."""
    own = Tokenizer.from_str(tokenizer.to_str())
    first = own.token_to_id("<s>")
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first)])
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", **settings)


@cache
def text_model(chat_template: str | None = None) -> TextModel:
    """Text of the byte-level tokenizer."""
    return TextModel(wrapped(byte_level()), chat_template=chat_template)


def tokens(text: str) -> list[int]:
    """Without the first that begins every text."""
    return byte_level().encode(text).ids


def a_finish(node_id: str = "edge-1", energy_j: float = 3.0) -> Finish:
    """One with a figure on two lines of its bill, and all times unlike."""
    cpu = Bounds(energy_j / 2, energy_j, energy_j * 2)
    bill = Bill(cpu, *[Bounds.zero()] * 4, operational_g=Bounds(0.1, 0.2, 0.4), embodied_g=Bounds(0.0, 0.1, 0.1))
    return Finish(bill, 0.25, 1.5, 0.125, (node_id, "cloud"))


class ScriptedServing:
    """Says what it is told; keeps what it was asked, and counts who left before the end.

    Args:
        answers: the tokens of each request in turn, the last again and again; an exception is raised.
        stalls: waits before the token of this number, until `resume` is set.
    """

    def __init__(
        self,
        *answers: Sequence[int | Exception],
        stalls: int | None = None,
        names: Sequence[str] = ("model",),
        finish: Finish | None = None,
    ) -> None:
        self._answers, self._stalls, self._names = list(answers), stalls, names
        self._finish = finish or a_finish()
        self.asked: list[GenerationRequest] = []
        self.running = 0
        self.stalled, self.resume, self.left, self.idle = (asyncio.Event() for _ in range(4))
        self.tenants: dict[str, str] = {}

    def say(self, answer: Sequence[int | Exception]) -> None:
        """From now on, always."""
        self._answers = [answer]

    def models(self, tenant: str | None = None) -> list[ServedModel]:
        mine = [name for name in self._names if self.tenants.get(name, tenant) == tenant]
        return [ServedModel(name, 1.7e9, 64, None if name == mine[0] else mine[0]) for name in mine]

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chosen | Finish, bool | None]:
        self.asked.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        self.running += 1
        try:
            for number, token in enumerate(answer[: request.max_new]):
                if number == self._stalls:
                    self.stalled.set()
                    await self.resume.wait()
                if isinstance(token, Exception):
                    raise token
                top = tuple((token + rank, -0.5 - rank) for rank in range(request.sampling.num_top))
                if (yield Chosen(token, -0.5, top)):
                    break
            yield self._finish
        finally:
            self.running -= 1
            self.left.set()
            if not self.running:
                self.idle.set()


@asynccontextmanager
async def client_of(app: Starlette, key: str = "none") -> AsyncIterator[AsyncOpenAI]:
    """The official client of a server on loopback."""
    async with (
        listening(app, grace_s=1) as (address, _),
        AsyncOpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=20) as client,
    ):
        yield client


def echo_app(*, limits: Limits | None = None, keys: Keys | None = None, template: str | None = None) -> Starlette:
    return build_app(EchoServing(), text_model(template), limits=limits, keys=keys)


def scripted_app(serving: ScriptedServing, **settings: object) -> Starlette:
    return build_app(serving, text_model(), **settings)
