"""A device's tuning role: one attempt at a time, nothing lost that comes early, nothing taken that comes late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from ecogen.config import Tuning
from ecogen.errors import NodeLostError, ProtocolError
from ecogen.metering.meter import null_meter
from ecogen.models.tunables import tunables_of
from ecogen.runtime.neighbours import Neighbours
from ecogen.runtime.worker import Worker
from ecogen.transport.base import Message, Peer, Stream
from ecogen.transport.memory import MemoryNetwork
from ecogen.tuning.device import DeviceTuning, LocalData
from ecogen.tuning.messages import TUNE, AttemptKey, TuneOrder, TuneResult
from tests.tuning.clusters import Case, random_batches, random_tunables, stages_of

TUNING = Tuning(local_epochs=1, batch_size=4, microbatches=2, learning_rate=1e-2)
CASE = Case(3, (1, 2), "end")


class SlowWorker(Worker):
    """Takes its time over everything."""

    pause_s = 0.0

    async def compute(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(self.pause_s)
        return await super().compute(function, *args, **kwargs)


class Device:
    """A node with nothing but a tuning role."""

    def __init__(
        self, network: MemoryNetwork, node_id: str, executor: ThreadPoolExecutor, update_factor: float = 1.0
    ) -> None:
        transport = network.join(Peer(node_id, "end"))
        self.transport, self.node_id = transport, node_id
        self.neighbours = Neighbours(transport, lambda _, m: self.role.deliver(m), lambda e: self.role.lose(e))
        self.worker = SlowWorker(null_meter(node_id), transport.counter, executor)
        data = LocalData(random_batches(1, 12)[0], 0, 0) if node_id == "device-0" else None
        stage = stages_of(CASE)[node_id]
        self.role = DeviceTuning(
            CASE.routes, TUNING, stage, self.worker, self.neighbours, data, update_factor=update_factor
        )

    async def handle(self, _: Peer, message: Message) -> Message:
        return await self.role.tune(message)

    async def accept(self, peer: Peer, stream: Stream) -> None:
        await self.neighbours.adopt(peer, stream)


@asynccontextmanager
async def cluster(network: MemoryNetwork | None = None, update_factor: float = 1.0) -> AsyncIterator[dict[str, Device]]:
    network = network or MemoryNetwork()
    with ThreadPoolExecutor(1) as executor:
        devices = {node_id: Device(network, node_id, executor, update_factor) for node_id in CASE.placement.node_ids}
        for device in devices.values():
            await device.transport.serve(device)
        try:
            yield devices
        finally:
            for device in devices.values():
                await device.neighbours.close()
                await device.transport.close()


def order(device: Device, key: AttemptKey) -> Message:
    addresses = {other: other for other in CASE.neighbours_of(device.node_id)}
    tunables = tunables_of(random_tunables(CASE), CASE.placement.segments_of(device.node_id))
    return Message.of(TUNE, TuneOrder(key, addresses), kind="tunables", tensors=tunables)


async def attempt(devices: dict[str, Device], key: AttemptKey, timeout_s: float = 10) -> dict[str, torch.Tensor]:
    async with asyncio.timeout(timeout_s):
        replies = await asyncio.gather(*(device.role.tune(order(device, key)) for device in devices.values()))
    assert [reply.read(TuneResult).num_examples for reply in replies] == [12, 0, 0]
    return {name: tensor for reply in replies for name, tensor in reply.tensors.items()}


@pytest.mark.parametrize("slow", ["device-0", "device-1", "device-2"])
async def test_what_arrives_while_a_device_takes_its_orders_waits_for_it(slow: str) -> None:
    """It was dropped between the fence and the first step, and the cluster waited for ever."""
    async with cluster() as devices:
        truth = await attempt(devices, AttemptKey(0, 1))
        devices[slow].worker.pause_s = 0.05
        tunables = await attempt(devices, AttemptKey(0, 2))
    assert all(torch.equal(tunables[name], truth[name]) for name in truth)


async def test_a_fault_on_purpose_answers_with_so_many_times_what_was_learned() -> None:
    async with cluster() as devices:
        truth = await attempt(devices, AttemptKey(0, 1))
    async with cluster(update_factor=-10) as devices:
        wrong = await attempt(devices, AttemptKey(0, 1))
    begun = random_tunables(CASE)
    for name, tensor in wrong.items():
        torch.testing.assert_close(tensor - begun[name], -10 * (truth[name] - begun[name]), rtol=1e-4, atol=1e-4)


async def test_what_arrives_before_the_order_waits_for_it() -> None:
    async with cluster() as devices:
        truth = await attempt(devices, AttemptKey(0, 1))
        first, key = devices.pop("device-0"), AttemptKey(0, 2)
        early = asyncio.create_task(first.role.tune(order(first, key)))
        await asyncio.sleep(0.05)
        replies = await asyncio.gather(*(d.role.tune(order(d, key)) for d in devices.values()), early)
    tunables = {name: tensor for reply in replies for name, tensor in reply.tensors.items()}
    assert all(torch.equal(tunables[name], truth[name]) for name in truth)


@pytest.mark.parametrize("late", [AttemptKey(1, 5), AttemptKey(1, 4), AttemptKey(0, 9)])
async def test_a_late_or_repeated_attempt_is_fenced_off(late: AttemptKey) -> None:
    async with cluster() as devices:
        await attempt(devices, AttemptKey(1, 5))
        for device in devices.values():
            fenced = rf"attempt {late.attempt} of round {late.round_index + 1} is fenced off: attempt 5 of round 2 came"
            with pytest.raises(ProtocolError, match=fenced):
                await device.role.tune(order(device, late))


async def test_an_attempt_given_up_leaves_no_trace_in_the_next() -> None:
    async with cluster(MemoryNetwork(delay=lambda *_: 0.003)) as devices:
        truth = await attempt(devices, AttemptKey(0, 1))
        given_up = [asyncio.create_task(d.role.tune(order(d, AttemptKey(0, 2)))) for d in devices.values()]
        await asyncio.sleep(0.03)
        for task in given_up:
            task.cancel()
        await asyncio.gather(*given_up, return_exceptions=True)
        tunables = await attempt(devices, AttemptKey(0, 3))
    assert all(torch.equal(tunables[name], truth[name]) for name in truth)


@pytest.mark.parametrize("pause_s", [0.0, 0.004, 0.01, 0.05])
async def test_a_lost_neighbour_fails_the_attempt_by_name(pause_s: float) -> None:
    network = MemoryNetwork(delay=lambda *_: 0.003)
    async with cluster(network) as devices:
        work = [asyncio.create_task(d.role.tune(order(d, AttemptKey(0, 1)))) for d in devices.values()]
        await asyncio.sleep(pause_s)
        network.kill("device-2")
        work.pop().cancel()
        first, second = await asyncio.gather(*work, return_exceptions=True)
    for problem in (first, second):
        assert isinstance(problem, NodeLostError)
        assert problem.node_id == "device-2"


def test_batches_are_a_pure_function_of_seed_round_cluster_and_epoch() -> None:
    (examples,) = random_batches(1, 10)
    tuning = Tuning(local_epochs=2, batch_size=4, augmentation=0.5)

    def images(
        seed: int, cluster_index: int, round_index: int, owner_index: int = 0, epoch: int = 0
    ) -> list[torch.Tensor]:
        data = LocalData(examples, seed, cluster_index, owner_index)
        return [batch.images for batch in data.batches(tuning, round_index, epoch)]

    first = images(0, 0, 0)
    assert [len(part) for part in first] == [4, 4, 2]
    assert all(map(torch.equal, first, images(0, 0, 0)))
    for other in (images(1, 0, 0), images(0, 1, 0), images(0, 0, 1), images(0, 0, 0, 1), images(0, 0, 0, 0, 1)):
        assert not any(map(torch.equal, first, other))


def test_each_epoch_sees_every_example_once() -> None:
    (examples,) = random_batches(1, 10)
    data = LocalData(type(examples)(examples.images, torch.arange(10)), 0, 0)
    for epoch in (0, 1):
        batches = list(data.batches(Tuning(local_epochs=2, batch_size=3), 0, epoch))
        assert sorted(torch.cat([batch.labels for batch in batches]).tolist()) == list(range(10))
