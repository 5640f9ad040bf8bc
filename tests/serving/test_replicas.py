"""Clusters begin and end to serve as the load asks for it, and nodes are taken away, without an error to anybody."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from ecogen.config import DeviceProfile, Serving, TopologyRecipe
from ecogen.engines.inproc import InprocEngine
from ecogen.errors import PlacementError, ServingError
from ecogen.node.serving_device import ServingDevice
from ecogen.node.serving_edge import ServingEdge
from tests.models.decoders import save_decoder
from tests.serving.federations import alone, answer, prompts, request, serving, tiny_recipe, until, whole_answer

DEVICES = [f"edge-0.cluster-0.device-{index}" for index in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models") / "tiny"


@pytest.fixture(scope="module")
def whole(model: Path) -> PreTrainedModel:
    return save_decoder("llama", model)


def holding(engine: InprocEngine) -> list[str]:
    """Devices that hold blocks."""
    roles = engine.roles.items()
    return [node_id for node_id, role in roles if isinstance(role, ServingDevice) and role._held_bytes]


async def test_another_cluster_serves_while_one_has_no_room(
    model: Path, whole: PreTrainedModel, tmp_path: Path
) -> None:
    spec = Serving(slots=1, max_tokens=64, replicas=1, busy_s=0.1, idle_s=0.5)
    asked = [(prompt, 30) for prompt in prompts(12)]
    async with serving(tiny_recipe(model, devices=1, clusters=3, serving=spec), tmp_path) as (gateway, engine):
        assert await answer(gateway, [5, 6], 2) == alone(whole, [5, 6], 2)
        assert holding(engine) == ["edge-0.cluster-0.device-0"]
        answering = asyncio.gather(*(answer(gateway, *one) for one in asked))
        edge = engine.roles["edge-0"]
        assert isinstance(edge, ServingEdge)
        await until(lambda: edge._replicas.num_serving > 1)
        assert await answering == [alone(whole, *one) for one in asked]
        await until(lambda: holding(engine) == ["edge-0.cluster-0.device-0"])
        assert await answer(gateway, [5, 6], 2) == alone(whole, [5, 6], 2)


async def test_a_device_is_taken_away_and_given_back(model: Path, whole: PreTrainedModel, tmp_path: Path) -> None:
    asked = [(prompt, 30) for prompt in prompts(5)]
    async with serving(tiny_recipe(model), tmp_path) as (gateway, _):
        answering = [asyncio.create_task(answer(gateway, *one)) for one in asked]
        stream = gateway.generate(request(gateway, [7, 8], 20))
        await anext(stream)
        await gateway.drain(DEVICES[1])
        assert await asyncio.gather(*answering) == [alone(whole, *one) for one in asked]
        await stream.aclose()
        _, finish = await whole_answer(gateway, [5, 6], 4)
        assert finish.node_ids == (DEVICES[0], DEVICES[2])
        await gateway.drain(DEVICES[1], is_out=False)
        for _ in range(200):
            _, finish = await whole_answer(gateway, [5, 6], 4)
            if finish.node_ids == tuple(DEVICES):
                break
            await asyncio.sleep(0.05)
        assert finish.node_ids == tuple(DEVICES)


async def test_an_edge_is_drained(model: Path, whole: PreTrainedModel, tmp_path: Path) -> None:
    asked = [(prompt, 30) for prompt in prompts(6)]
    async with serving(tiny_recipe(model, devices=1, edges=2), tmp_path) as (gateway, engine):
        answering = [asyncio.create_task(answer(gateway, *one)) for one in asked]
        await asyncio.sleep(0)
        await gateway.drain("edge-0")
        await engine.kill("edge-0")
        assert await asyncio.gather(*answering) == [alone(whole, *one) for one in asked]
        _, finish = await whole_answer(gateway, [5, 6], 4)
        assert finish.node_ids == ("edge-1.cluster-0.device-0",)
        with pytest.raises(ServingError, match="edge-1 is the only edge that serves; it cannot be drained"):
            await gateway.drain("edge-1")
        await engine.start_node("edge-0")
        await gateway.drain("edge-0", is_out=False)


async def test_nodes_that_cannot_be_spared(model: Path, whole: PreTrainedModel, tmp_path: Path) -> None:
    spec = Serving(slots=1, shelf=0, max_tokens=64)
    small = TopologyRecipe(edges=1, clusters_per_edge=1, devices_per_cluster=2, end=DeviceProfile(memory_gib=0.0006))
    async with serving(tiny_recipe(model, serving=spec, topology=small), tmp_path) as (gateway, _):
        assert await answer(gateway, [5, 6], 4) == alone(whole, [5, 6], 4)
        with pytest.raises(PlacementError, match="no cuts of its 6 blocks fit 1 devices"):
            await gateway.drain(DEVICES[0])
        for stranger in ("edge-0.cluster-7.device-0", "edge-9"):
            with pytest.raises(ServingError, match="no"):
                await gateway.drain(stranger)
        assert await answer(gateway, [5, 6], 4) == alone(whole, [5, 6], 4)
