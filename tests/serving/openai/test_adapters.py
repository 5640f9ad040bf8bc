"""A tenant brings an adapter over HTTP, asks it, replaces it and takes it away; nobody else sees it."""

from __future__ import annotations

import asyncio
import io
import shutil
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2 as httpx
import pytest
from safetensors.torch import save as save_tensors

from ecogen.errors import CheckpointError
from ecogen.models.folder import open_folder
from ecogen.models.mixed_lora import Adapter
from ecogen.serving.generation import ServedModel
from ecogen.serving.openai.adapters import unpacked
from ecogen.serving.openai.app import build_app
from ecogen.serving.openai.keys import Keys
from ecogen.serving.openai.limits import Limits
from ecogen.serving.openai.listening import listening
from ecogen.serving.openai.text import load_text
from tests.models.decoders import save_decoder
from tests.models.test_mixed_lora import save_adapter
from tests.serving.adapters import wanted
from tests.serving.federations import serving, tiny_recipe, until
from tests.serving.openai.served import ScriptedServing, byte_level, text_model, wrapped

KEYS = {"key-of-anna": "anna", "key-of-ben": "ben"}
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_decoder("llama", folder, vocab_size=byte_level().get_vocab_size())
    wrapped(byte_level()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(model, folder / str(seed), seed) for seed in (1, 2)]


def zipped(folder: Path, *, under: str = "") -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in folder.iterdir():
            archive.write(path, f"{under}{path.name}")
    return packed.getvalue()


@asynccontextmanager
async def api(model: Path, folder: Path, *, keys: bool = True, **limits: int) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(tiny_recipe(model, devices=2), folder) as (gateway, _):
        known = Keys(KEYS if keys else {})
        app = build_app(gateway, load_text(model), keys=known, limits=Limits(**limits), store=gateway.versions)
        async with listening(app) as (address, _), httpx.AsyncClient(base_url=f"{address}/v1", timeout=30) as client:
            yield client


def key_of(tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer key-of-{tenant}"}


async def said(client: httpx.AsyncClient, name: str, tenant: str) -> httpx.Response:
    asked = {"model": name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 0}
    return await client.post("/completions", json=asked, headers=key_of(tenant))


async def test_an_adapter_comes_is_replaced_and_goes(model: Path, adapters: list[Path], tmp_path: Path) -> None:
    async with api(model, tmp_path) as client:
        answers = []
        for adapter, under in zip(adapters, ("", "adapter/"), strict=True):
            put = await client.put("/adapters/mine", content=zipped(adapter, under=under), headers=key_of("anna"))
            assert put.status_code == 200, put.text
            assert 0 < put.json()["bytes"] < put.json()["backbone_bytes"] / 5
            assert put.json()["backbone_bytes"] == open_folder(model).nbytes
            answers.append((await said(client, "mine", "anna")).json()["choices"][0]["text"])
        decoded = [byte_level().decode(wanted(model, adapter, PROMPT, 8)) for adapter in adapters]
        assert answers == decoded
        names = [one["id"] for one in (await client.get("/models", headers=key_of("ben"))).json()["data"]]
        assert names == ["tiny"]
        assert (await said(client, "mine", "ben")).status_code == 404
        assert (await client.delete("/adapters/mine", headers=key_of("ben"))).status_code == 404
        gone = await client.delete("/adapters/mine", headers=key_of("anna"))
        assert gone.json() == {"id": "mine", "object": "adapter", "deleted": True}
        assert (await said(client, "mine", "anna")).status_code == 404


async def test_who_may_not(model: Path, adapters: list[Path], tmp_path: Path) -> None:
    content = zipped(adapters[0])
    async with api(model, tmp_path / "a", adapters=1) as client:
        assert (await client.put("/adapters/mine", content=content)).status_code == 401
        assert (await client.put("/adapters/mine", content=content, headers=key_of("eve"))).status_code == 401
        for name, status in (("one", 200), ("one", 200), ("two", 409)):
            assert (
                await client.put(f"/adapters/{name}", content=content, headers=key_of("anna"))
            ).status_code == status
        assert (await client.put("/adapters/two", content=content, headers=key_of("ben"))).status_code == 200
    async with api(model, tmp_path / "b", keys=False) as client:
        refused = await client.put("/adapters/mine", content=content)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "no_keys")


class SlowStore(ScriptedServing):
    """Adapters come when `resume` is set."""

    def __init__(self) -> None:
        super().__init__([1])
        self.brought: dict[tuple[str | None, str], ServedModel] = {}
        self.num_waiting = 0

    def models(self, tenant: str | None = None) -> list[ServedModel]:
        own = [served for (owner, _), served in self.brought.items() if owner == tenant]
        return [ServedModel("model", 0.0, 64), *own]

    async def put_adapter(self, name: str, adapter: Adapter, tenant: str | None = None) -> None:
        self.num_waiting += 1
        self.stalled.set()
        await self.resume.wait()
        self.brought[tenant, name] = ServedModel(name, 0.0, 64, "model", tenant)

    async def remove_adapter(self, name: str, tenant: str | None = None) -> None:
        del self.brought[tenant, name]


@asynccontextmanager
async def slow_api(store: SlowStore, **limits: int) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(store, text_model(), keys=Keys(KEYS), limits=Limits(**limits), store=store)
    async with listening(app) as (address, _), httpx.AsyncClient(base_url=f"{address}/v1", timeout=30) as client:
        yield client


async def test_many_at_once_are_no_more_than_a_tenant_may_have(adapters: list[Path]) -> None:
    store, content = SlowStore(), zipped(adapters[0])
    async with slow_api(store, adapters=3, adapters_at_once=24) as client:
        puts = [
            asyncio.create_task(client.put(f"/adapters/{number % 8}", content=content, headers=key_of("anna")))
            for number in range(24)
        ]
        await until(lambda: sum(put.done() for put in puts) == 15)
        store.resume.set()
        answers = await asyncio.gather(*puts)
        assert sorted(answer.status_code for answer in answers) == [200] * 9 + [409] * 15
        assert "3 adapters at most" in next(one for one in answers if one.status_code == 409).text
        assert len(store.brought) == 3
        [first, *_] = [name for _, name in store.brought]
        assert (await client.delete(f"/adapters/{first}", headers=key_of("anna"))).status_code == 200
        for name, status in (("another", 200), ("one-more", 409)):
            put = await client.put(f"/adapters/{name}", content=content, headers=key_of("anna"))
            assert put.status_code == status


async def test_few_are_in_memory_at_once(adapters: list[Path]) -> None:
    store, content = SlowStore(), zipped(adapters[0])
    async with slow_api(store, adapters_at_once=2) as client:
        puts = [asyncio.create_task(client.put("/adapters/a", content=content, headers=key_of("anna"))) for _ in "ab"]
        await until(lambda: store.num_waiting == 2)
        refused = await client.put("/adapters/b", content=content, headers=key_of("anna"))
        assert (refused.status_code, "brings 2 adapters at once" in refused.text) == (429, True)
        other = asyncio.create_task(client.put("/adapters/b", content=content, headers=key_of("ben")))
        await until(lambda: store.num_waiting == 3)
        store.resume.set()
        assert {answer.status_code for answer in await asyncio.gather(*puts, other)} == {200}


@pytest.mark.parametrize("name", ["%20", "a%00b", "a" * 65, "-", ".a", "a%20b", "%C3%A9"])
async def test_what_is_no_name(name: str, adapters: list[Path]) -> None:
    store = SlowStore()
    async with slow_api(store) as client:
        refused = await client.put(f"/adapters/{name}", content=zipped(adapters[0]), headers=key_of("anna"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_name")
        assert "the first a letter, a digit or '_'" in refused.json()["error"]["message"]
        assert not store.num_waiting


async def test_an_upload_that_is_broken_off_is_nobodys_mistake(caplog: pytest.LogCaptureFixture) -> None:
    async with slow_api(SlowStore()) as client:
        address = client.base_url
        reader, writer = await asyncio.open_connection(address.host, address.port)
        head = "PUT /v1/adapters/a HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key-of-anna\r\nContent-Length: 1000"
        writer.write(f"{head}\r\n\r\nsome".encode())
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.close()
        wanted_line = 'ecogen_requests_total{path="/v1/adapters/{name}",status="499"} 1.0'
        async with asyncio.timeout(5):
            while wanted_line not in (await client.get(str(address.join("/metrics")), headers=key_of("anna"))).text:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert not reader.at_eof() or not await reader.read()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_adapters_pass_the_gate_too(adapters: list[Path]) -> None:
    store, content = SlowStore(), zipped(adapters[0])
    async with slow_api(store, requests_at_once=1, requests_per_minute=4) as client:
        first = asyncio.create_task(client.put("/adapters/a", content=content, headers=key_of("anna")))
        await store.stalled.wait()
        for call in (client.put("/adapters/b", content=content, headers=key_of("anna")), said(client, "model", "anna")):
            refused = await call
            assert (refused.status_code, "1 requests running" in refused.text) == (429, True)
        refused = await client.delete("/adapters/a", headers=key_of("anna"))
        assert (refused.status_code, "1 requests running" in refused.text) == (429, True)
        store.resume.set()
        assert (await first).status_code == 200
        for status in (200, 200, 200, 429):
            put = await client.put("/adapters/a", content=content, headers=key_of("anna"))
            assert put.status_code == status
        assert "4 times a minute" in (await client.delete("/adapters/a", headers=key_of("anna"))).text


def spoilt(folder: Path, *, compression: int = zipfile.ZIP_DEFLATED, **files: bytes) -> bytes:
    """A zip file with other files instead."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        for path in folder.iterdir():
            archive.writestr(path.name, files.get(path.stem, path.read_bytes()))
    return packed.getvalue()


def corrupt(folder: Path, compression: int) -> bytes:
    """With compressed bytes that are none."""
    content = bytearray(spoilt(folder, compression=compression))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            start = entry.header_offset + 30 + len(entry.filename)
            content[start : start + entry.compress_size] = b"\xff" * entry.compress_size
    return bytes(content)


def encrypted(folder: Path) -> bytes:
    """As far as the flags say."""
    content = bytearray(spoilt(folder))
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.find(signature)
        while start >= 0:
            content[start + place] |= 1
            start = content.find(signature, start + 1)
    return bytes(content)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_file_that_is_corrupt(adapters: list[Path], compression: int) -> None:
    with pytest.raises(CheckpointError, match="the body is no zip file of an adapter"):
        unpacked(corrupt(adapters[0], compression), 10**6)


def test_a_zip_file_that_cannot_be_read(adapters: list[Path]) -> None:
    for content, told in {
        encrypted(adapters[0]): "the body is no zip file of an adapter: .* is encrypted",
        spoilt(adapters[0], adapter_config=b"[" * 10**5): "adapter_config.json cannot be read",
        spoilt(adapters[0], adapter_config=b'{"peft_type": "LORA", "rank_pattern": [1]}'): "rank_pattern",
    }.items():
        with pytest.raises(CheckpointError, match=told):
            unpacked(content, 10**6)


async def test_what_is_no_adapter(model: Path, adapters: list[Path], tmp_path: Path) -> None:
    shutil.copytree(adapters[0], tmp_path / "half", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(adapters[0], tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"nothing")
    save_decoder("llama", tmp_path / "wider", hidden_size=128)
    other = save_adapter(tmp_path / "wider", tmp_path / "other", 1)
    save_decoder("llama", tmp_path / "deeper", num_hidden_layers=8, vocab_size=byte_level().get_vocab_size())
    deeper = save_adapter(tmp_path / "deeper", tmp_path / "deep", 1)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter_config.json", " " * 10**7)
        archive.writestr("adapter_model.safetensors", b"")
    async with api(model, tmp_path / "nodes", adapter_bytes=10**6) as client:
        for content, told in {
            b"no zip": "no zip file of an adapter",
            zipped(tmp_path / "half"): "has no adapter_model.safetensors; zip the directory that PEFT saved",
            zipped(tmp_path / "broken"): "the adapter is corrupt",
            zipped(other): "does not fit the model",
            zipped(deeper): "it is for block 6 too, and the model has 6 blocks",
            spoilt(adapters[0], adapter_model=save_tensors({})): "it has no tensors",
            corrupt(adapters[0], zipfile.ZIP_DEFLATED): "no zip file of an adapter",
            spoilt(adapters[0], adapter_config=b'{"peft_type": "LORA", "rank_pattern": [1]}'): "`$.rank_pattern`",
            bomb.getvalue(): "larger than 1000000 bytes unpacked",
        }.items():
            refused = await client.put("/adapters/mine", content=content, headers=key_of("anna"))
            assert refused.status_code == 400, told
            assert told in refused.json()["error"]["message"]
        assert (await client.put("/adapters/x", content=b"." * (10**6 + 1), headers=key_of("anna"))).status_code == 413
        assert (await said(client, "tiny", "anna")).status_code == 200
