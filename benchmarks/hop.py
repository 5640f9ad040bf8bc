"""How long one hop of 4 KB and of 1 MB takes, and a round of four nodes: `python -m benchmarks.hop`.

A hop is half of an echo on a persistent stream between two processes, codec included; in memory, where it is the
same process, it shows what the rest of the stack costs. A round is one node calling four node processes at once, 1 MB
there and 1 MB back.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Spread, circumstances, interleaved, wait_until_quiet, write_result
from ecogen.transport.authority import create_authority, issue
from ecogen.transport.base import Message, Peer, Stream, Transport
from ecogen.transport.credentials import load_credentials
from ecogen.transport.memory import MemoryNetwork
from ecogen.transport.wire import GrpcTransport

SIZES = {"4 KB": 4 * 1024, "1 MB": 2**20}
WIRES = {"grpc": False, "grpc+mtls": True}
NUM_NODES = 4
EDGE = "edge-1"


class Echo:
    """Answers with what it gets."""

    async def handle(self, peer: Peer, message: Message) -> Message:
        return message

    async def accept(self, peer: Peer, stream: Stream) -> None:
        while (message := await stream.receive()) is not None:
            await stream.send(message)


def wire_transport(certificates: Path, node_id: str, tier: str, secure: bool) -> GrpcTransport:
    """A transport with the node's certificate, or without any."""
    if not secure:
        return GrpcTransport(Peer(node_id, tier), insecure=True)
    return GrpcTransport(Peer(node_id, tier), credentials=load_credentials(certificates / node_id))


async def serve(certificates: Path, node_id: str) -> None:
    """A node process: serve both wires and print their addresses."""
    torch.set_num_threads(1)
    transports = [wire_transport(certificates, node_id, "end", secure) for secure in WIRES.values()]
    print(*[await transport.serve(Echo()) for transport in transports], flush=True)
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def node_process(certificates: Path, node_id: str) -> AsyncIterator[list[str]]:
    """A node's process; yields its addresses, one a wire."""
    arguments = ("-m", "benchmarks.hop", "--serve", node_id, "--certificates", str(certificates))
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield (await process.stdout.readline()).decode().split()
    finally:
        process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def federation(certificates: Path) -> AsyncIterator[dict[str, Transport]]:
    """An edge with `NUM_NODES` end nodes; yields its transport by kind."""
    authority = create_authority(certificates / "authority", "bench")
    issue(authority, EDGE, "edge", certificates / EDGE)
    edges = {wire: wire_transport(certificates, EDGE, "edge", secure) for wire, secure in WIRES.items()}
    async with contextlib.AsyncExitStack() as stack:
        for index in range(NUM_NODES):
            issue(authority, f"end-{index}", "end", certificates / f"end-{index}")
            addresses = await stack.enter_async_context(node_process(certificates, f"end-{index}"))
            for edge, address in zip(edges.values(), addresses, strict=True):
                edge.learn(f"end-{index}", address)
        for edge in edges.values():
            stack.push_async_callback(edge.close)
        network = MemoryNetwork()
        await network.join(Peer("end-0", "end")).serve(Echo())
        yield {"memory": network.join(Peer(EDGE, "edge")), **edges}


def activations(num_bytes: int) -> Message:
    return Message("forward", "activations", b"", {"hidden": torch.randn(num_bytes // 4)})


def hop_ms(stream: Stream, message: Message, repeats: int) -> Callable[[], Awaitable[float]]:
    """Measures half of an echo, the mean of `repeats`."""

    async def measure() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            await stream.send(message)
            await stream.receive()
        return (time.perf_counter() - start) * 1e3 / repeats / 2

    return measure


def round_ms(edge: Transport, message: Message) -> Callable[[], Awaitable[float]]:
    """Measures one call to each node, all at once."""

    async def measure() -> float:
        start = time.perf_counter()
        await asyncio.gather(*(edge.call(f"end-{index}", message) for index in range(NUM_NODES)))
        return (time.perf_counter() - start) * 1e3

    return measure


async def measure_all(certificates: Path, rounds: int) -> dict[str, Spread]:
    """The spread of each hop and round, in milliseconds."""
    async with federation(certificates) as edges:
        contenders: dict[str, Callable[[], Awaitable[float]]] = {}
        for size, num_bytes in SIZES.items():
            for kind, edge in edges.items():
                stream = await edge.open("end-0")
                contenders[f"hop, {size}, {kind}"] = hop_ms(stream, activations(num_bytes), repeats=10)
        for kind in WIRES:
            contenders[f"round of {NUM_NODES}, 1 MB each way, {kind}"] = round_ms(edges[kind], activations(2**20))
        return await interleaved(contenders, rounds=rounds, warm_up=5)


def main(rounds: int) -> dict[str, Any]:
    """Measure, write benchmarks/results/hop.json, and return it."""
    torch.set_num_threads(1)
    others = wait_until_quiet(timeout_s=30)
    with tempfile.TemporaryDirectory() as directory:
        spreads = asyncio.run(measure_all(Path(directory), rounds))
    result = circumstances(("torch", "grpcio", "cryptography", "msgspec")) | {
        "others_before": others,
        "figures_ms": {name: spread.to_dict() for name, spread in spreads.items()},
    }
    write_result("hop", result)
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    return [f"{name:45s} {figures['median']:8.3f} ms" for name, figures in result["figures_ms"].items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--serve", metavar="NODE", help=argparse.SUPPRESS)
    parser.add_argument("--certificates", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.certificates, options.serve))
    else:
        print("\n".join(lines(main(options.rounds))))
