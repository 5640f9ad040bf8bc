"""A worker computes one thing at a time, and a long computation ends when nobody waits for it."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ecogen.metering.meter import null_meter
from ecogen.runtime.worker import Worker
from ecogen.transport.base import TrafficCounter


@pytest.fixture
async def worker():
    worker = Worker(null_meter("node"), TrafficCounter())
    yield worker
    worker.close()


async def test_computations_take_turns(worker: Worker) -> None:
    order: list[str] = []

    def work(name: str) -> None:
        order.append(f"{name} begins")
        time.sleep(0.01)
        order.append(f"{name} ends")

    await asyncio.gather(worker.compute(work, "a"), worker.compute(work, "b"))
    assert order == ["a begins", "a ends", "b begins", "b ends"]


@pytest.mark.parametrize("times", [1, 3])
async def test_a_long_computation_ends_soon_after_it_is_given_up(times: int, worker: Worker) -> None:
    def endless() -> None:
        while True:
            time.sleep(0.02)
            worker.check_given_up()

    task = asyncio.create_task(worker.compute(endless))
    await asyncio.sleep(0.05)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.001)
    async with asyncio.timeout(2):
        with pytest.raises(asyncio.CancelledError):
            await task
    await worker.compute(worker.check_given_up)  # the next one is not


async def test_a_slow_worker_takes_so_many_times_as_long_and_keeps_no_thread_from_others() -> None:
    """As nodes that share a process share their threads."""

    async def duration_s(worker: Worker, *, times: int) -> float:
        began_s = time.perf_counter()
        for _ in range(times):
            await worker.compute(time.sleep, 0.01)
        return time.perf_counter() - began_s

    with ThreadPoolExecutor(1) as executor:
        slow, other = (Worker(null_meter(name), TrafficCounter(), executor) for name in ("slow", "other"))
        slow.slowness = 10.0
        slow_s, other_s = await asyncio.gather(duration_s(slow, times=2), duration_s(other, times=2))
    assert slow_s >= 0.2
    assert other_s < slow_s / 2


async def test_what_a_computation_raises_reaches_its_caller(worker: Worker) -> None:
    def fail() -> None:
        raise ValueError("reason")

    with pytest.raises(ValueError, match="reason"):
        await worker.compute(fail)
