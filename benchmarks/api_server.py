"""What the API server costs by itself: `python -m benchmarks.api_server`.

A process serves the echo engine, which answers a prompt of 64 tokens with the same tokens at once; this one asks, over
kept connections of plain sockets, since the official client would cost more than the server. Each client asks again as
soon as it has its answer. CPU time is the server process's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pydoc_data.topics
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.common import Spread, circumstances, wait_until_quiet, write_result
from ecogen.serving.openai.app import build_app
from ecogen.serving.openai.echo import EchoServing
from ecogen.serving.openai.limits import Limits
from ecogen.serving.openai.listening import serve_http
from ecogen.serving.openai.text import TextModel

NUM_CLIENTS = (1, 8, 32)
NUM_TOKENS = 64
END_OF_CHUNKS = b"0\r\n\r\n"


@dataclass(frozen=True)
class Measured:
    """One stretch of asking."""

    latencies_s: Sequence[float]
    wall_s: float
    cpu_s: float

    def figures(self) -> dict[str, float]:
        """What is reported of it."""
        count = len(self.latencies_s)
        cuts = statistics.quantiles(self.latencies_s, n=100, method="inclusive")
        return {
            "requests_per_s": count / self.wall_s,
            "latency_p50_ms": cuts[49] * 1e3,
            "latency_p99_ms": cuts[98] * 1e3,
            "cpu_ms_per_request": self.cpu_s / count * 1e3,
            "cpu_us_per_token": self.cpu_s / count / NUM_TOKENS * 1e6,
        }


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, of the standard library's documentation."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["</s>"],
        show_progress=False,
    )
    own.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>")


async def serve() -> None:
    """The server's process: prints its port."""
    app = build_app(EchoServing(), TextModel(tokenizer()), limits=Limits(requests_at_once=None))
    await serve_http(app, on_ready=lambda address: print(address.port, flush=True))


@asynccontextmanager
async def server_process() -> AsyncIterator[tuple[int, psutil.Process]]:
    """A server; yields its port and its process."""
    arguments = ("-m", "benchmarks.api_server", "--serve")
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield int(await process.stdout.readline()), psutil.Process(process.pid)
    finally:
        process.kill()
        await process.wait()


def request(streams: bool) -> bytes:
    """A question, as it goes over the wire."""
    prompt = [300 + index for index in range(NUM_TOKENS)]
    body = json.dumps({"model": "echo", "prompt": prompt, "max_tokens": NUM_TOKENS, "stream": streams}).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: bytes, streams: bool) -> None:
    """One question, until its answer is here."""
    writer.write(question)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    if streams:
        await reader.readuntil(END_OF_CHUNKS)
    else:
        length = head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]
        await reader.readexactly(int(length))


async def one_client(port: int, streams: bool, stop_s: float, latencies_s: list[float]) -> None:
    """Asks until it is time to stop."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    question = request(streams)
    while (begin_s := time.perf_counter()) < stop_s:
        await ask(reader, writer, question, streams)
        latencies_s.append(time.perf_counter() - begin_s)
    writer.close()
    await writer.wait_closed()


async def measure(port: int, process: psutil.Process, num_clients: int, streams: bool, seconds: float) -> Measured:
    """So many clients, for so long."""
    latencies_s: list[float] = []
    before, begin_s = process.cpu_times(), time.perf_counter()
    clients = (one_client(port, streams, begin_s + seconds, latencies_s) for _ in range(num_clients))
    await asyncio.gather(*clients)
    after, wall_s = process.cpu_times(), time.perf_counter() - begin_s
    return Measured(latencies_s, wall_s, after.user + after.system - before.user - before.system)


async def measure_all(rounds: int, seconds: float) -> dict[str, dict[str, Spread]]:
    """The spread of each figure, of each number of clients with and without streaming."""
    measured: dict[str, list[dict[str, float]]] = {}
    async with server_process() as (port, process):
        for index in range(rounds + 1):  # the first warms up
            for num_clients, streams in product(NUM_CLIENTS, (False, True)):
                figures = (await measure(port, process, num_clients, streams, seconds)).figures()
                if index:
                    name = f"{num_clients} clients, {'streaming' if streams else 'whole'}"
                    measured.setdefault(name, []).append(figures)
    return {
        name: {figure: Spread.of([each[figure] for each in several]) for figure in several[0]}
        for name, several in measured.items()
    }


def main(rounds: int, seconds: float) -> dict[str, Any]:
    """Measure, write benchmarks/results/api_server.json, and return it."""
    others = wait_until_quiet()
    spreads = asyncio.run(measure_all(rounds, seconds))
    result = circumstances(("starlette", "uvicorn", "h11", "msgspec", "tokenizers")) | {
        "others_before": others,
        "tokens_per_answer": NUM_TOKENS,
        "figures": {
            name: {figure: spread.to_dict() for figure, spread in figures.items()} for name, figures in spreads.items()
        },
    }
    write_result("api_server", result)
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    return [
        f"{name:22s} {figures['requests_per_s']['median']:7.0f} requests/s, "
        f"p50 {figures['latency_p50_ms']['median']:6.2f} ms, p99 {figures['latency_p99_ms']['median']:6.2f} ms, "
        f"CPU {figures['cpu_ms_per_request']['median']:5.2f} ms a request, "
        f"{figures['cpu_us_per_token']['median']:5.1f} us a token"
        for name, figures in result["figures"].items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve())
    else:
        print("\n".join(lines(main(options.rounds, options.seconds))))
