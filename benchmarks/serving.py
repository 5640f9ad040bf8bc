"""A model split over devices against the same model whole: `python -m benchmarks.serving [--turns 3]`.

A Llama of 34 M parameters (hidden size 512, 8 blocks, random weights: speed does not depend on them) answers prompts of
32 tokens with 96 more, one request at a time, 8 and 16 at once. Whole is the faster of transformers' `generate` and our
own engine on one node; split is our engine over two devices, each a process with one thread, gRPC and mutual TLS
between them and to the edge. All are started before anything is measured and take turns; tokens a second count the
whole answers, prompts included. The gateway asks, without HTTP; `benchmarks.api_server` has the cost of that.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.common import circumstances, wait_until_quiet, write_result
from ecogen.config import Compute, Recipe, Serving, TopologyRecipe
from ecogen.engines.launch import ENGINES
from ecogen.engines.local import LocalEngine
from ecogen.engines.served import check_serving, serving_recipe
from ecogen.models.decoder import align, load_decoder
from ecogen.models.packed import pack_weights
from ecogen.placement import Segment
from ecogen.serving.decoder_stage import DecoderStage
from ecogen.serving.gateway import Gateway
from ecogen.serving.generation import GenerationRequest
from ecogen.serving.sampling import Chosen, Sampling
from ecogen.serving.scheduler import Step

SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 8, "vocab_size": 8192, "max_position_embeddings": 1024}
PROMPT, ANSWER = 32, 96
AT_ONCE = (1, 8, 16)
STREAMS = (1, 8, 32)


@dataclass(frozen=True)
class Streamed:
    """What readers saw of several answers at once."""

    tokens_per_s: float
    first_s: Sequence[float]
    between_s: Sequence[float]


@dataclass(frozen=True)
class Federation:
    """One that serves, as a contender."""

    gateway: Gateway
    engine: LocalEngine

    async def ask(self, at_once: int) -> Streamed:
        """So many requests at once, each to its end."""
        began_s = time.perf_counter()
        streams = await asyncio.gather(*(self._one(index) for index in range(at_once)))
        took_s = time.perf_counter() - began_s
        firsts = [times[0] for times in streams]
        between = [later - sooner for times in streams for sooner, later in pairwise(times)]
        return Streamed(sum(map(len, streams)) / took_s, firsts, between)

    async def _one(self, index: int) -> list[float]:
        """When each token came."""
        began_s = time.perf_counter()
        name = self.gateway.models()[0].name
        request = GenerationRequest(name, tuple(prompt(index)), Sampling(temperature=0), ANSWER)
        return [
            time.perf_counter() - began_s async for one in self.gateway.generate(request) if isinstance(one, Chosen)
        ]

    def cpu_s(self) -> float:
        """Of all its nodes so far."""
        pids = [child.process.pid for child in self.engine._children.values()]
        times = [psutil.Process(pid).cpu_times() for pid in pids if pid]
        return sum(one.user + one.system for one in times)


def prompt(index: int) -> list[int]:
    generator = torch.Generator().manual_seed(index + int(time.time() * 1e6) % 2**31)  # none begins as another did
    return torch.randint(3, SIZES["vocab_size"], (PROMPT,), generator=generator).tolist()


def make_model(folder: Path) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False, eos_token_id=None))
    model.save_pretrained(folder)
    return folder


@contextlib.asynccontextmanager
async def federation(model: Path, devices: int, **compute: Any) -> AsyncIterator[Federation]:
    """One edge and one cluster, processes all of them."""
    topology = TopologyRecipe(edges=1, clusters_per_edge=1, devices_per_cluster=devices)
    spec = Serving(slots=32 // devices, max_tokens=PROMPT + ANSWER, shelf=0)
    recipe: Recipe = serving_recipe(model, serving=spec, topology=topology, compute=Compute(**compute), engine="local")
    served = check_serving(recipe)
    with tempfile.TemporaryDirectory(prefix="ecogen-benchmark-") as folder:
        async with ENGINES["local"](recipe, Path(folder)) as launched:
            engine = launched._engine
            assert isinstance(engine, LocalEngine)
            gateway = Gateway(launched.transport, launched.topology.edge_ids, served, is_given_up=launched.is_given_up)
            contender = Federation(gateway, engine)
            await contender.ask(2)
            yield contender
            await gateway.close()


def transformers_contender(model: Path, threads: int) -> Callable[[int], Awaitable[float]]:
    """Tokens a second of `generate` on a batch."""
    whole = AutoModelForCausalLM.from_pretrained(model).eval()
    align(whole)

    def run(at_once: int) -> float:
        ids = torch.tensor([prompt(index) for index in range(at_once)])
        torch.set_num_threads(threads)
        began_s = time.perf_counter()
        with torch.inference_mode():
            whole.generate(ids, max_new_tokens=ANSWER, do_sample=False, pad_token_id=0)
        took_s = time.perf_counter() - began_s
        torch.set_num_threads(1)
        return at_once * ANSWER / took_s

    return lambda at_once: asyncio.to_thread(run, at_once)


def half_ms(model: Path, pause_s: float) -> float:
    """Milliseconds in which half of the blocks decode a token, with a pause after each step; the median of some.

    Between two steps of one request a stage waits for the others: what its caches held of it is then less.
    """
    half = Segment(0, SIZES["num_hidden_layers"] // 2, has_embedding=True)
    loaded = load_decoder(model, [half])
    pack_weights(loaded)
    stage, taken = DecoderStage(loaded, half, 1, 1, PROMPT + ANSWER), []
    for position in range(PROMPT + ANSWER):
        began_s = time.perf_counter()
        stage.run(Step(0, (), 0, ((1,),), (position,), ("",), 1))
        taken.append(time.perf_counter() - began_s)
        time.sleep(pause_s)
    return round(statistics.median(taken) * 1e3, 2)


def of(contender: Federation) -> Callable[[int], Awaitable[float]]:
    async def run(at_once: int) -> float:
        return (await contender.ask(at_once)).tokens_per_s

    return run


async def measure(model: Path, turns: int) -> dict[str, Any]:
    """All contenders in turn."""
    async with contextlib.AsyncExitStack() as stack:

        async def started(devices: int, **compute: Any) -> Federation:
            return await stack.enter_async_context(federation(model, devices, **compute))

        one, two, four = [await started(devices) for devices in (1, 2, 4)]
        threaded, small = await started(1, threads=2), await started(1, dtype="int8")
        contenders = {
            "transformers, 1 thread": transformers_contender(model, 1),
            "transformers, 2 threads": transformers_contender(model, 2),
            "one node, 1 thread": of(one),
            "one node, 2 threads": of(threaded),
            "one node, int8": of(small),
            "two stages": of(two),
        }
        rates: dict[str, dict[int, list[float]]] = {name: {n: [] for n in AT_ONCE} for name in contenders}
        for turn in range(turns + 1):
            for at_once in AT_ONCE:
                for name, run in contenders.items():
                    rate = await run(at_once)
                    if turn:  # the first one warms up
                        rates[name][at_once].append(rate)
                print(turn, at_once, {name: round(of_name[at_once][-1], 1) for name, of_name in rates.items() if turn})
        stages = {1: one, 2: two, 4: four}
        halves_ms = [await asyncio.to_thread(half_ms, model, pause_s) for _ in range(turns) for pause_s in (0.0, 0.01)]
        return {
            "half_of_the_blocks_ms": {
                "one step after the other": statistics.median(halves_ms[::2]),
                "10 ms between": statistics.median(halves_ms[1::2]),
            },
            "tokens_per_s": {n: {k: _spread(v) for k, v in by.items()} for n, by in rates.items()},
            "streams": {n: await _streams(two, n, turns) for n in STREAMS},
            "cpu_ms_per_token": {number: await _cpu_per_token(own, turns) for number, own in stages.items()},
        }


async def _streams(contender: Federation, at_once: int, turns: int) -> dict[str, float]:
    """What readers wait for, in ms."""
    seen = [await contender.ask(at_once) for _ in range(turns)]
    firsts = [value for one in seen for value in one.first_s]
    between = [value for one in seen for value in one.between_s]
    figures = {"tokens_per_s": round(statistics.median(one.tokens_per_s for one in seen), 1)}
    for name, values in (("first", firsts), ("between", between)):
        ordered = sorted(values)
        for percent in (50, 99):
            place = min(len(ordered) - 1, percent * len(ordered) // 100)
            figures[f"{name}_p{percent}_ms"] = round(ordered[place] * 1e3, 2)
    return figures


async def _cpu_per_token(contender: Federation, turns: int) -> dict[str, float]:
    """CPU time of all nodes, in ms, for each token of the answers."""
    figures = {}
    for at_once in (1, 16):
        before_s, tokens = contender.cpu_s(), 0
        for _ in range(turns):
            await contender.ask(at_once)
            tokens += at_once * ANSWER
        figures[f"{at_once} at once"] = round((contender.cpu_s() - before_s) / tokens * 1e3, 3)
    return figures


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 1),
        "least": round(min(values), 1),
        "most": round(max(values), 1),
    }


def ratios(measured: dict[str, Any]) -> dict[str, float]:
    """Of medians."""
    rate = {name: {n: spread["median"] for n, spread in by.items()} for name, by in measured["tokens_per_s"].items()}

    def whole(threads: int, at_once: int) -> float:
        suffix = "1 thread" if threads == 1 else "2 threads"
        return max(rate[f"transformers, {suffix}"][at_once], rate[f"one node, {suffix}"][at_once])

    two, peer = rate["two stages"], rate["transformers, 1 thread"]
    return {
        **{f"{n} at once, one node / transformers": round(rate["one node, 1 thread"][n] / peer[n], 3) for n in AT_ONCE},
        **{f"{n} at once, two stages / transformers": round(two[n] / peer[n], 3) for n in AT_ONCE},
        "1 request, two stages / whole on one thread": round(two[1] / whole(1, 1), 3),
        "8 requests, two stages / whole on one thread": round(two[8] / whole(1, 8), 3),
        "16 requests, two stages / whole on one thread": round(two[16] / whole(1, 16), 3),
        "16 requests, two stages / whole on two threads": round(two[16] / whole(2, 16), 3),
        "1 request, int8 / float32": round(rate["one node, int8"][1] / rate["one node, 1 thread"][1], 3),
        "1 request, int8 / float32 of transformers": round(rate["one node, int8"][1] / peer[1], 3),
    }


GOALS = {
    "1 request, two stages / whole on one thread": 0.95,
    "16 requests, two stages / whole on one thread": 1.2,
    "16 requests, two stages / whole on two threads": 0.95,
    "1 request, int8 / float32": 1.8,
}


async def main(turns: int) -> dict[str, Any]:
    """Measure, write benchmarks/results/serving.json, and return it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ecogen-benchmark-") as folder:
        model = make_model(Path(folder) / "llama")
        quiet = wait_until_quiet()
        measured = await measure(model, turns)
    found = ratios(measured)
    result = circumstances(("torch", "transformers", "grpcio", "torchao")) | {
        "others_before": quiet,
        "model": SIZES,
        "prompt": PROMPT,
        "answer": ANSWER,
        "turns": turns,
        **measured,
        "ratios": found,
        "goals": {f"{name} at least {least:g}": found[name] >= least for name, least in GOALS.items()},
    }
    write_result("serving", result)
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """What it shows, in words."""
    text = [f"{name}: {ratio}" for name, ratio in result["ratios"].items()]
    return [*text, *(f"{'reached' if met else 'MISSED'}: {goal}" for goal, met in result["goals"].items())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    print("\n".join(lines(asyncio.run(main(parser.parse_args().turns)))))
