"""Pictures over a slow link, with a generator's modules at either end of it: `python -m benchmarks.crossings [RUN]`.

A run of the recipe pairs is served by processes of this machine. A proxy between two of them lets bytes through at the
rate of a slow link, late by its latency, and counts them as they travel. With the modules here, the API server is
beside whoever asks, and the link is between it and the edge: gRPC with mutual TLS, tokens. With the modules there, it
is beside the edge, and the link is between it and whoever asks: HTTP, pictures in base64. Both answer the same.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from benchmarks.common import Spread, circumstances, skip, wait_until_quiet, write_result
from ecogen import config as recipes
from ecogen.engines.launch import ENGINES
from ecogen.engines.served import check_serving, find_served, serving_recipe
from ecogen.engines.serving import first_answer
from ecogen.models.mixed_lora import open_adapter
from ecogen.serving.gateway import Gateway
from ecogen.serving.openai.app import build_app
from ecogen.serving.openai.listening import listening
from ecogen.serving.openai.text import load_text

MBIT_PER_S, LATENCY_MS = 1.0, 50.0
CAPTIONS = [f"a handwritten {digit}" for digit in ("three", "seven", "eight", "zero", "five")]
TURNS, NUM_WARM = 4, 1


class SlowLink:
    """A TCP proxy before one address; each direction of a connection has the rate for itself.

    Attributes:
        up_bytes, down_bytes: to the address and from it.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._tasks: set[asyncio.Task[None]] = set()
        self.up_bytes = self.down_bytes = 0

    async def __aenter__(self) -> SlowLink:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self._target.split(":")
        there = await asyncio.open_connection(host, int(port))
        for work in (self._carry(reader, there[1], is_up=True), self._carry(there[0], writer, is_up=False)):
            task = asyncio.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_up: bool) -> None:
        parcels: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivering = asyncio.create_task(_deliver(parcels, writer))
        free_s = 0.0
        with contextlib.suppress(OSError):
            while data := await reader.read(1400):
                self.up_bytes += len(data) * is_up
                self.down_bytes += len(data) * (not is_up)
                free_s = max(free_s, time.perf_counter()) + len(data) * 8 / (MBIT_PER_S * 1e6)
                parcels.put_nowait((free_s + LATENCY_MS / 1e3, data))
        parcels.put_nowait((free_s + LATENCY_MS / 1e3, b""))
        await delivering


async def _deliver(parcels: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
    """Each when it is due."""
    with contextlib.suppress(OSError):
        while True:
            due_s, data = await parcels.get()
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            if not data:
                break
            writer.write(data)
            await writer.drain()
    writer.close()


@dataclass(frozen=True)
class Asked:
    """What one request took at the client, what crossed the link, and the answer."""

    latency_s: float
    up_bytes: int
    down_bytes: int
    answer: str


async def ask(client: AsyncOpenAI, model: str, task: str, caption: str, picture: str, seed: int) -> str:
    """A picture in base64, or a caption."""
    if task == "draw":
        more = {"seed": seed}
        drawn = await client.images.generate(model=model, prompt=caption, extra_body=more)
        assert drawn.data
        return drawn.data[0].b64_json or ""
    content: Any = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}]
    told = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], max_tokens=12, temperature=0
    )
    return told.choices[0].message.content or ""


async def asked_often(
    client: AsyncOpenAI, model: str, link: SlowLink, seeds: Sequence[int], found: dict[str, list[Asked]]
) -> None:
    """Pictures drawn and described, one after the other, those to warm up apart."""
    for place, seed in enumerate([*[0] * NUM_WARM, *seeds]):
        picture = ""
        for task, told in found.items():
            before, began_s = (link.up_bytes, link.down_bytes), time.perf_counter()
            answer = await ask(client, model, task, CAPTIONS[seed % len(CAPTIONS)], picture, seed)
            took_s = time.perf_counter() - began_s
            picture = answer
            if place >= NUM_WARM:
                told.append(Asked(took_s, link.up_bytes - before[0], link.down_bytes - before[1], answer))
            await asyncio.sleep(0.3)  # what the network says afterwards, such as windows, counts with the next


@contextlib.asynccontextmanager
async def served(run: Path) -> AsyncIterator[tuple[Gateway, str, Callable[[str], None], str]]:
    """A gateway, the model's name, what moves the edge to another address for it, and the edge's own address."""
    found = find_served(run)
    recipe = serving_recipe(found.folder, recipes.load("serve", ["engine=local"]))
    with tempfile.TemporaryDirectory(prefix="ecogen-") as folder:
        async with ENGINES["local"](recipe, Path(folder)) as federation:
            transport, edge_id = federation.transport, federation.topology.edge_ids[0]
            gateway = Gateway(transport, [edge_id], check_serving(recipe, found.name))
            await first_answer(gateway)
            for name, adapter in found.adapters.items():
                await gateway.versions.put_adapter(name, open_adapter(adapter))
            name = next(iter(found.adapters), found.name)
            yield gateway, name, lambda address: transport.learn(edge_id, address), federation._engine.address(edge_id)
            await gateway.close()


async def measure(run: Path, number: int) -> dict[str, dict[str, list[Asked]]]:
    """By place of the modules and by task."""
    found: dict[str, dict[str, list[Asked]]] = {
        place: {task: [] for task in ("draw", "describe")} for place in ("here", "there")
    }
    async with served(run) as (gateway, model, move_edge, edge):
        text = await asyncio.to_thread(load_text, find_served(run).folder)
        app = build_app(gateway, text)
        async with listening(app) as (address, _), SlowLink(edge) as to_edge, SlowLink(str(address)[7:]) as to_server:
            places: dict[str, tuple[str, str, SlowLink]] = {
                "here": (to_edge.address, str(address), to_edge),
                "there": (edge, f"http://{to_server.address}", to_server),
            }
            for turn, (place, (edge_address, server, link)) in product(range(TURNS), places.items()):
                move_edge(edge_address)
                async with AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=2) as client:
                    await asked_often(client, model, link, range(turn, number, TURNS), found[place])
    return found


def figures(found: dict[str, list[Asked]]) -> dict[str, Any]:
    """Of each task."""
    names = ("latency_s", "up_bytes", "down_bytes")
    return {
        task: {name: Spread.of([getattr(one, name) for one in told]).to_dict() for name in names}
        for task, told in found.items()
    }


def same(found: dict[str, dict[str, list[Asked]]]) -> bool:
    """Whether both places gave the same answers."""
    here, there = ([one.answer for told in own.values() for one in told] for own in found.values())
    return here == there


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/pairs"))
    parser.add_argument("--number", type=int, default=20)
    chosen = parser.parse_args()
    if not (chosen.run / "summary.json").exists():
        skip(f"{chosen.run} is no finished run of the recipe pairs; make one with `ecogen run pairs`")
    before = wait_until_quiet()
    found = asyncio.run(measure(chosen.run, chosen.number))
    result = {
        **circumstances(["torch", "grpcio", "openai"]),
        **before,
        "link": {"mbit_per_s": MBIT_PER_S, "latency_ms": LATENCY_MS},
        "png_bytes": Spread.of([len(base64.b64decode(one.answer)) for one in found["here"]["draw"]]).to_dict(),
        "same_answers": same(found),
        "modules": {place: figures(own) for place, own in found.items()},
    }
    print(f"the same answers: {result['same_answers']}; wrote {write_result('crossings', result)}")
    for place, own in found.items():
        for task, told in figures(own).items():
            print(f"modules {place}, {task}: " + ", ".join(f"{name} {told[name]['median']:g}" for name in told))


if __name__ == "__main__":
    main()
