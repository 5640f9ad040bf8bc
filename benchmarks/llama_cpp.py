"""What splitting costs, here and in llama.cpp with its RPC backend: `python -m benchmarks.llama_cpp [--turns 5]`.

The Llama of `benchmarks.serving` (34 M parameters, float32, random weights) answers prompts of 32 tokens with 96 more,
one request at a time, 8 and 16 at once: whole on one thread, and split over two devices of one thread each. Each
system's own ratio of the two is compared, of runs in turn. Tokens a second are those of the answers, and the time is
that of the whole answers, prompts included.

llama.cpp is asked by its own `llama-batched-bench`: all prompts in one batch, then all sequences in step. It is split
in its two ways: both halves on RPC servers, or one in the process that asks and the other on a server. Both, and the
whole, run with and without flash attention; of each the fastest counts, by size. EcoGen is asked by its gateway without
HTTP, and samples each token, greedily; between its processes are gRPC and mutual TLS. RPC has no encryption, and
`llama-batched-bench` samples nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Spread, circumstances, wait_until_quiet, write_result
from benchmarks.llama_cpp_build import SOURCE, build, convert
from benchmarks.serving import ANSWER, AT_ONCE, PROMPT, SIZES, federation, make_model, of

OURS, THEIRS = "ecogen", "llama.cpp"
ON_SECOND = 4
"""Layers of the second device, which llama.cpp counts with the head: 3 blocks and it, about as much as 5 blocks."""

BEFORE = {1: 0.54, 16: 0.82}
"""By requests at once, the best ratio of split over whole that llama.cpp was seen to have before."""

_START_S = 30.0
_HELD = re.compile(r"\[?([\w.:]+)\]? +model buffer size = +([\d.]+) MiB")

Contender = Callable[[int], Awaitable[float]]
Turn = dict[str, dict[str, dict[int, float]]]
"""By system, contender and requests at once, tokens a second."""


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp with its layers in some places, as a contender.

    Attributes:
        place: the arguments that say where layers are computed.
    """

    programs: Path
    model: Path
    place: Sequence[str] = ()

    async def tokens_per_s(self, at_once: int) -> float:
        """So many requests at once, each to its end, in a process of its own; once before, to warm it up."""
        lines = (await self._run(at_once))[0].split("\n")
        last = [json.loads(line) for line in lines if line.startswith("{")][-1]
        return at_once * ANSWER / float(last["t"])

    async def held_mib(self) -> dict[str, float]:
        """How much of the model each of its devices holds, as it says itself."""
        return {name: float(size) for name, size in _HELD.findall((await self._run(1, "-v"))[1])}

    async def _run(self, at_once: int, *more: str) -> tuple[str, str]:
        """What `llama-batched-bench` prints and logs. A prompt's own pass gives the first token of its answer."""
        size, room = f"{at_once},{at_once}", str(at_once * (PROMPT + ANSWER))
        work = ["-npp", str(PROMPT), "-ntg", str(ANSWER - 1), "-npl", size, "-c", room, "--output-format", "jsonl"]
        alike = ["-t", "1", "-tb", "1", "-ctk", "f32", "-ctv", "f32"]
        command = [str(self.programs / "llama-batched-bench"), "-m", str(self.model), *work, *alike, *self.place, *more]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
        out, log = [part.decode() for part in await process.communicate()]
        if process.returncode:
            raise RuntimeError(f"llama-batched-bench failed:\n{log[-3000:]}")
        return out, log


@contextlib.contextmanager
def rpc_server(programs: Path) -> Iterator[str]:
    """A device of llama.cpp, one thread; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(programs / "ggml-rpc-server"), "--threads", "1", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_until_open(port)
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()


def _wait_until_open(port: int) -> None:
    deadline_s = time.monotonic() + _START_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)


async def llama_cpp_contenders(programs: Path, model: Path, servers: Sequence[str]) -> dict[str, LlamaCpp]:
    """By name. Checks that what is split is split.

    Raises:
        RuntimeError: if a device holds no part of the model.
    """
    first, second = servers
    places = {
        "whole": [],
        "split, two servers": ["--rpc", f"{first},{second}", "-ngl", "99"],
        "split, half on a server": ["--rpc", second, "-ngl", str(ON_SECOND)],
    }
    devices = {"split, two servers": [first, second], "split, half on a server": ["CPU_Mapped", second]}
    contenders = {}
    for name, place in places.items():
        for flash in ("on", "off"):
            own = LlamaCpp(programs, model, [*place, "-fa", flash])
            contenders[f"{name}, flash attention {flash}"] = own
        held = await own.held_mib()
        print(f"{THEIRS}, {name}: MiB held {held}", flush=True)
        if any(not held.get(device) for device in devices.get(name, [])):
            raise RuntimeError(f"llama.cpp, {name}, was to use {devices[name]}, but holds {held}")
    return contenders


async def measure(model: Path, programs: Path, file: Path, turns: int, sizes: Sequence[int]) -> list[Turn]:
    """All contenders in turn, tokens a second."""
    async with contextlib.AsyncExitStack() as stack:
        servers = [stack.enter_context(rpc_server(programs)) for _ in range(2)]
        peers = await llama_cpp_contenders(programs, file, servers)
        one, two = [await stack.enter_async_context(federation(model, devices)) for devices in (1, 2)]
        contenders: dict[str, dict[str, Contender]] = {
            OURS: {"whole": of(one), "split, two stages": of(two)},
            THEIRS: {name: peer.tokens_per_s for name, peer in peers.items()},
        }
        measured = []
        for turn in range(turns + 1):
            rates = await _turn(contenders, sizes)
            if turn:  # the first one warms up
                measured.append(rates)
            print(turn, rates, flush=True)
        return measured


async def _turn(contenders: dict[str, dict[str, Contender]], sizes: Sequence[int]) -> Turn:
    rates: Turn = {system: {name: {} for name in own} for system, own in contenders.items()}
    for at_once in sizes:
        for system, own in contenders.items():
            for name, tokens_per_s in own.items():
                rates[system][name][at_once] = round(await tokens_per_s(at_once), 1)
    return rates


def compare(turns: list[Turn], system: str, at_once: int) -> dict[str, Any]:
    """Of a system at one size: its fastest whole and split, and their ratio within a turn."""
    rates = {name: [turn[system][name][at_once] for turn in turns] for name in turns[0][system]}

    def fastest(kind: str) -> str:
        return max((name for name in rates if name.startswith(kind)), key=lambda name: statistics.median(rates[name]))

    whole, split = fastest("whole"), fastest("split")
    ratios = [divided / undivided for divided, undivided in zip(rates[split], rates[whole], strict=True)]
    return {
        "whole": whole,
        "split": split,
        "whole_tokens_per_s": Spread.of(rates[whole]).to_dict(1),
        "split_tokens_per_s": Spread.of(rates[split]).to_dict(1),
        "split_over_whole": Spread.of(ratios).to_dict(3),
    }


def goals(figures: dict[int, dict[str, Any]]) -> dict[str, bool]:
    """Ours above theirs, as measured now and as it was known before."""
    ratio = {n: {system: row["split_over_whole"]["median"] for system, row in by.items()} for n, by in figures.items()}
    met = {f"{n} at once: ours above theirs": by[OURS] > by[THEIRS] for n, by in ratio.items()}
    known = {n: least for n, least in BEFORE.items() if n in ratio}
    return met | {f"{n} at once: ours above {least}": ratio[n][OURS] > least for n, least in known.items()}


async def main(turns: int = 5, sizes: Sequence[int] = AT_ONCE) -> dict[str, Any]:
    """Measure, write benchmarks/results/llama_cpp.json, and return it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was started is ended
    torch.set_num_threads(1)
    programs, python = build()
    with tempfile.TemporaryDirectory(prefix="ecogen-benchmark-") as folder:
        model = make_model(Path(folder) / "llama")
        file = convert(python, model, Path(folder) / "model.gguf")
        others = wait_until_quiet()
        measured = await measure(model, programs, file, turns, sizes)
    figures = {n: {system: compare(measured, system, n) for system in (OURS, THEIRS)} for n in sizes}
    result = circumstances(("torch", "transformers", "grpcio")) | {
        "peer": f"the llama.cpp in {SOURCE}",
        "others_before": others,
        "model": SIZES,
        "prompt": PROMPT,
        "answer": ANSWER,
        "turns": measured,
        "figures": figures,
        "goals": goals(figures),
    }
    write_result("llama_cpp", result)
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    text = [
        f"{at_once} at once: {system}: {row['split_over_whole']['median']:.2f} "
        f"({row['split_tokens_per_s']['median']:.0f} tokens/s {row['split']}, "
        f"{row['whole_tokens_per_s']['median']:.0f} {row['whole']})"
        for at_once, by in result["figures"].items()
        for system, row in by.items()
    ]
    return [*text, *(f"{'reached' if met else 'MISSED'}: {goal}" for goal, met in result["goals"].items())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=AT_ONCE, metavar="N", help="requests at once")
    options = parser.parse_args()
    if options.turns < 2:
        parser.error("--turns must be at least 2, for a spread")
    print("\n".join(lines(asyncio.run(main(options.turns, options.sizes)))))
