"""A generator asked over a link, with its modules at either end."""

from __future__ import annotations

import asyncio
import io
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from ecogen.errors import CheckpointError, DataError, EcoGenError, ProtocolError
from ecogen.metering.meter import CpuMeter
from ecogen.models.image_tokenizer import ImageTokenizer, save_image_tokenizer
from ecogen.models.pair_model import PairModel
from ecogen.models.picture_modules import PictureModules, digest_of_modules, load_modules
from ecogen.records import Crossing, CrossingRecord, PictureTask
from ecogen.runtime.worker import Worker
from ecogen.serving.crossing import CROSS, AskedGenerator, Front, Order, Reply, Told
from ecogen.topology import Link
from ecogen.transport.base import Message, Peer, Stream
from ecogen.transport.memory import MemoryNetwork
from tests.pictures import LENGTH, SIZES, save_pair_foundation

CAPTION = Told(text="a handwritten three")
FAST = Link("cloud_edge", 0.0, 1e9)
WAYS: tuple[Crossing, ...] = ("tokens", "pictures")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair_foundation(tmp_path_factory.mktemp("model"))


class Cloud:
    """Has the generator and nothing else."""

    def __init__(self, asked: AskedGenerator) -> None:
        self._asked = asked

    async def handle(self, _: Peer, message: Message) -> Message:
        return await self._asked.answer(message)

    async def accept(self, _: Peer, stream: Stream) -> None:
        await stream.close()


@asynccontextmanager
async def front(
    folder: Path, modules: PictureModules, link: Link = FAST, cloud: type[Cloud] = Cloud
) -> AsyncIterator[Front]:
    """An edge with these modules, and a cloud with a folder's generator at the other end of a link."""
    network = MemoryNetwork(delay=lambda _, __, num_bytes: link.seconds(num_bytes))
    here, there = (network.join(Peer(node_id, tier)) for node_id, tier in (("edge-0", "edge"), ("cloud", "cloud")))
    workers = [Worker(CpuMeter(one.peer.node_id), one.counter) for one in (here, there)]
    own = load_modules(folder)
    model = PairModel(AutoModelForCausalLM.from_pretrained(folder).eval(), own.tokenizer, own.images)
    nothing = lambda *_: None  # noqa: E731
    await there.serve(cloud(AskedGenerator(own, model, workers[1], length=LENGTH, begin=nothing, count=nothing)))
    try:
        yield Front("edge-0", "cloud", modules, workers[0], here, link)
    finally:
        for transport, worker in zip((here, there), workers, strict=True):
            await transport.close()
            worker.close()


async def test_the_same_answers_wherever_the_modules_are(folder: Path) -> None:
    async with front(folder, load_modules(folder)) as asking:
        pictures = set[bytes]()
        for seed in range(4):
            (here, _), (there, _) = [await asking.ask("r", "draw", CAPTION, seed, way) for way in WAYS]
            assert here == there
            assert here.picture is not None
            pictures.add(here.picture)
            (said, _), (also, _) = [await asking.ask("r", "describe", here, seed, way) for way in WAYS]
            assert said == also
            assert said.text is not None
        assert len(pictures) > 1, "another seed draws another picture"
        assert Image.open(io.BytesIO(pictures.pop())).size == (SIZES.image_size, SIZES.image_size)


def photo() -> bytes:
    """A picture as people have them: of another size, in colour."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 160, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def asked() -> list[tuple[Told, PictureTask]]:
    return [(CAPTION, "draw"), (Told(picture=photo()), "describe")]


async def test_tokens_are_fewer_bytes_than_pictures(folder: Path) -> None:
    async with front(folder, load_modules(folder)) as asking:
        for told, task in asked():
            (made, tokens), (same, pictures) = [await asking.ask("r", task, told, 1, way) for way in WAYS]
            assert made == same
            assert whole(tokens) < whole(pictures)
            assert pictures.sent_bytes > len(told.picture or b"")
        sent = {line.kind: line for line in asking.transport.counter.take()}
        assert sent["samples"].header_bytes == tokens.sent_bytes + pictures.sent_bytes
        assert sent["samples"].messages == 2, "the books have the same bytes"


def whole(record: CrossingRecord) -> int:
    return record.sent_bytes + record.received_bytes


async def test_on_a_slow_link_the_transfer_takes_what_the_link_takes(folder: Path) -> None:
    slow = Link("cloud_edge", 0.1, 20_000.0)
    photographed = Told(picture=photo())
    async with front(folder, load_modules(folder), slow) as asking:
        _, tokens = await asking.ask("r", "describe", photographed, 1, "tokens")
        _, pictures = await asking.ask("r", "describe", photographed, 1, "pictures")
    for record in (tokens, pictures):
        unframed = slow.rtt_s + whole(record) / slow.bytes_per_s
        assert record.link_s == pytest.approx(unframed + record.framing_bytes / slow.bytes_per_s)
        assert unframed <= record.transfer_s < unframed + 0.5
    assert pictures.transfer_s - tokens.transfer_s > 1, "100 kB at 20 kB/s"


async def test_tokens_of_other_modules_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, other := tmp_path / "other")
    torch.manual_seed(9)
    save_image_tokenizer(ImageTokenizer(SIZES), other)
    modules = load_modules(other)
    async with front(folder, modules) as asking:
        for told, task in asked():
            with pytest.raises(
                CheckpointError, match=f"{modules.digest} mean nothing .* {load_modules(folder).digest}"
            ):
                await asking.ask("r", task, told, 1, "tokens")
            await asking.ask("r", task, told, 1, "pictures")


def orders(digest: str) -> Iterator[tuple[Order, type[EcoGenError], str]]:
    long, codes = Told(tokens=tuple([300] * LENGTH)), SIZES.num_codes
    yield Order("draw", Told(), 0), ProtocolError, "has nothing; send text"
    yield Order("draw", Told(text="a", picture=b"b")), ProtocolError, "has text and picture; send text"
    yield Order("draw", Told(tokens=(1,))), ProtocolError, "has tokens; send text"
    yield Order("describe", Told(text="a"), 0, digest), ProtocolError, "has text; send tokens"
    yield Order("draw", Told(text="")), ProtocolError, "0 tokens are no caption"
    yield Order("draw", Told(text="a handwritten three " * 9)), ProtocolError, "are no caption; 1 to 18 have room"
    yield Order("draw", long, 0, digest), ProtocolError, "24 tokens are no caption"
    yield Order("draw", Told(tokens=(10**6,)), 0, digest), ProtocolError, "not all of text"
    yield Order("describe", Told(tokens=(0,) * (codes + 1)), 0, digest), ProtocolError, "5 codes; a picture is 4"
    yield Order("describe", Told(tokens=(SIZES.codebook_size,) * codes), 0, digest), ProtocolError, "below 11"
    yield Order("describe", Told(picture=b"no picture")), DataError, "is no picture"
    yield Order("describe", Told(picture=bomb())), DataError, "pixels; 16777216 at most"
    yield Order("describe", Told(tokens=(-1,) * codes), 0, digest), ProtocolError, "is not a Order"
    yield Order("describe", Told(tokens=(0,) * 5000), 0, digest), ProtocolError, "is not a Order"
    yield Order("describe", Told(picture=bytes(5 * 2**20))), ProtocolError, "is not a Order"
    yield Order("draw", Told(text="a" * 2000)), ProtocolError, "is not a Order"
    yield Order("draw", CAPTION, -1), ProtocolError, "is not a Order"


def bomb() -> bytes:
    """A small file of very many pixels."""
    file = io.BytesIO()
    Image.new("1", (5000, 5000)).save(file, "PNG")
    return file.getvalue()


async def test_what_is_no_order(folder: Path) -> None:
    modules = load_modules(folder)
    async with front(folder, modules) as asking:
        for order, error, said in orders(modules.digest):
            with pytest.raises(error, match=said):
                await asking.transport.call("cloud", Message.of(CROSS, order))
        made, _ = await asking.ask("r", "draw", CAPTION, 1, "tokens")
        assert made.picture, "and the generator goes on"


class Liar(Cloud):
    """Answers with codes that no picture has."""

    async def handle(self, peer: Peer, message: Message) -> Message:
        await super().handle(peer, message)
        return Message.of(CROSS, Reply(Told(tokens=(99,) * SIZES.num_codes), 0.1, 0.1))


async def test_an_answer_that_is_none_is_refused(folder: Path) -> None:
    async with front(folder, load_modules(folder), cloud=Liar) as asking:
        with pytest.raises(ProtocolError, match="cloud answered draw with what is no 4 codes"):
            await asking.ask("r", "draw", CAPTION, 1, "tokens")


def test_the_digest_is_of_what_decides(folder: Path) -> None:
    files = {name.name: name.read_bytes() for name in folder.iterdir() if name.is_file()}
    digest = digest_of_modules(files)
    assert digest == load_modules(folder).digest == digest_of_modules(files | {"generation_config.json": b"{}"})
    for name in ("tokenizer.json", "image_tokenizer.json", "image_tokenizer.safetensors"):
        assert digest_of_modules(files | {name: files[name] + b" "}) != digest


async def test_several_at_once(folder: Path) -> None:
    async with front(folder, load_modules(folder)) as asking:
        alone = [(await asking.ask("r", "draw", CAPTION, seed, "tokens"))[0] for seed in range(3)]
        together = await asyncio.gather(*(asking.ask("r", "draw", CAPTION, seed, "tokens") for seed in range(3)))
        assert [made for made, _ in together] == alone
