"""Many adapters on one backbone while it serves: each answer is its adapter's, and of one version from end to end."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest
import torch

from ecogen.errors import (
    CheckpointError,
    ServingError,
    UnknownModelError,
)
from ecogen.models.mixed_lora import Adapter, open_adapter
from ecogen.node.serving_edge import ServingEdge
from ecogen.serving.cluster import ServedCluster
from ecogen.serving.gateway import Gateway
from ecogen.serving.generation import GenerationRequest
from ecogen.serving.sampling import Chosen
from tests.models.decoders import save_decoder
from tests.models.test_mixed_lora import save_adapter
from tests.serving.adapters import NAMES, asked, clusters_of, held_by, wanted
from tests.serving.federations import GREEDY, prompts, serving, tiny_recipe, until


async def test_a_batch_may_mix_adapters(model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    names = ["tiny", *NAMES]
    asked_for = [(names[index % 4], prompt) for index, prompt in enumerate(prompts(12))]
    async with serving(tiny_recipe(model), tmp_path) as (gateway, _):
        for name, folder in adapters.items():
            await gateway.versions.put_adapter(name, open_adapter(folder))
        assert [served.name for served in gateway.models()] == names
        answers = await asyncio.gather(*(asked(gateway, name, prompt, 10) for name, prompt in asked_for))
    for (name, prompt), answer in zip(asked_for, answers, strict=True):
        assert answer == wanted(model, adapters.get(name), prompt, 10), name
    assert len({tuple(answer) for answer in answers}) > 6


async def test_adapters_go_with_the_last_gateway(model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    async with serving(tiny_recipe(model), tmp_path) as (gateway, engine):
        other = Gateway(engine.transport, ["edge-0"], gateway.models()[0])
        for each in (gateway, other):
            await each.versions.put_adapter("one", open_adapter(adapters["one"]))
            await asked(each, "one", [5, 6, 7], 3)
        await other.close()
        assert await asked(gateway, "one", [5, 6, 7], 3)
        assert len(held_by(engine)) == 2
        await gateway.close()
        await until(lambda: not held_by(engine))


async def test_a_replaced_adapter_ends_its_answers_and_gives_no_others(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    prompt = [*range(3, 23), *prompts(1)[0]]
    request = GenerationRequest("mine", tuple(prompt), GREEDY, 30)
    async with serving(tiny_recipe(model), tmp_path) as (gateway, engine):
        await gateway.versions.put_adapter("mine", open_adapter(adapters["one"]))
        async with aclosing(gateway.generate(request)) as running:
            begun = [await anext(running) for _ in range(3)]
            await gateway.versions.put_adapter("mine", open_adapter(adapters["two"]))
            for _ in range(2):  # the second time begins where the first one was, and not where its predecessor
                assert await asked(gateway, "mine", prompt, 30) == wanted(model, adapters["two"], prompt, 30)
            await gateway.versions.remove_adapter("mine")
            with pytest.raises(UnknownModelError, match="there is no model 'mine'"):
                await asked(gateway, "mine", prompt, 30)
            rest = [one async for one in running]
        tokens = [one.token for one in [*begun, *rest] if isinstance(one, Chosen)]
        assert tokens == wanted(model, adapters["one"], prompt, 30)
        await asyncio.gather(*gateway.versions._drops)
        edge = engine.roles["edge-0"]
        assert isinstance(edge, ServingEdge)
        assert not list(edge._clusters[0].adapters), "what nobody uses is dropped"


async def test_an_adapter_that_does_not_fit_is_no_error_of_others(
    model: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks an edge while it comes."""
    hold, gate = ServedCluster.prepare, asyncio.Event()

    async def prepare(self: ServedCluster, adapter_id: str, adapter: Adapter) -> bool:
        if self.cluster_id.startswith("edge-0"):
            await gate.wait()
        return await hold(self, adapter_id, adapter)

    monkeypatch.setattr(ServedCluster, "prepare", prepare)
    save_decoder("llama", tmp_path / "wider", hidden_size=128)
    other = open_adapter(save_adapter(tmp_path / "wider", tmp_path / "adapter", 1))
    async with serving(tiny_recipe(model, devices=1, edges=2), tmp_path) as (gateway, engine):
        await until(lambda: all(cluster.chain for cluster in clusters_of(engine)))
        bringing = asyncio.create_task(gateway.versions.put_adapter("mine", other))
        await asyncio.sleep(0.2)
        await gateway.drain("edge-0")
        assert await asked(gateway, "tiny", [5, 6], 4) == wanted(model, None, [5, 6], 4)
        gate.set()
        with pytest.raises(CheckpointError, match="does not fit the model"):
            await bringing


async def test_a_tenants_adapter_is_not_there_for_others(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    async with serving(tiny_recipe(model, devices=1), tmp_path) as (gateway, _):
        await gateway.versions.put_adapter("hers", open_adapter(adapters["one"]), tenant="her")
        assert [served.name for served in gateway.models("her")] == ["tiny", "hers"]
        assert [served.name for served in gateway.models("him")] == ["tiny"]
        assert await asked(gateway, "hers", [5, 6], 3, "her") == wanted(model, adapters["one"], [5, 6], 3)
        for tenant in ("him", None):
            with pytest.raises(UnknownModelError, match="there is no model 'hers'"):
                await asked(gateway, "hers", [5, 6], 3, tenant)
            with pytest.raises(UnknownModelError):
                await gateway.versions.remove_adapter("hers", tenant)
        await gateway.versions.put_adapter("hers", open_adapter(adapters["two"]), tenant="him")  # a name tells nothing
        assert await asked(gateway, "hers", [5, 6], 3, "him") == wanted(model, adapters["two"], [5, 6], 3)
        assert await asked(gateway, "hers", [5, 6], 3, "her") == wanted(model, adapters["one"], [5, 6], 3)
        with pytest.raises(ServingError, match="the name 'tiny' is the backbone's"):
            await gateway.versions.put_adapter("tiny", open_adapter(adapters["two"]))


async def test_an_adapter_that_computes_no_numbers_harms_nobody_else(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Neither who is answered beside it nor who gets its slot after it."""
    good, prompt = open_adapter(adapters["one"]), [5, 6]
    bad = Adapter(good.scalings, {name: torch.full_like(tensor, torch.nan) for name, tensor in good.tensors.items()})
    async with serving(tiny_recipe(model, devices=1), tmp_path) as (gateway, _):
        await gateway.versions.put_adapter("bad", bad)
        for names in (["tiny", "bad", "bad", "tiny"], ["tiny"] * 4):
            answers = await asyncio.gather(*(asked(gateway, name, prompt * 3, 8) for name in names))
            answers += await asyncio.gather(
                *(asked(gateway, name, prompt[: 1 + i % 2], 8) for i, name in enumerate(names))
            )
            asked_for = [prompt * 3] * 4 + [prompt[: 1 + i % 2] for i in range(4)]
            for name, own, answer in zip(names * 2, asked_for, answers, strict=True):
                assert name == "bad" or answer == wanted(model, None, own, 8)


async def test_a_tenant_whose_adapter_waits_for_devices_holds_up_no_other(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    async with serving(tiny_recipe(model, devices=1), tmp_path) as (gateway, engine):
        await gateway.versions.put_adapter("hers", open_adapter(adapters["one"]), tenant="her")
        await engine.kill("edge-0.cluster-0.device-0")
        bringing = asyncio.create_task(gateway.versions.put_adapter("his", open_adapter(adapters["two"]), tenant="him"))
        await asyncio.sleep(0.5)
        async with asyncio.timeout(5):
            await gateway.versions.remove_adapter("hers", "her")
        assert not bringing.done()
        await engine.start_node("edge-0.cluster-0.device-0")
        await bringing
        assert await asked(gateway, "his", [5, 6], 3, "him") == wanted(model, adapters["two"], [5, 6], 3)


async def test_an_adapter_of_another_model_changes_nothing(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Whether devices hold the model when it comes, or later."""
    save_decoder("llama", tmp_path / "wider", hidden_size=128)
    other = open_adapter(save_adapter(tmp_path / "wider", tmp_path / "adapter", 1))
    async with serving(tiny_recipe(model), tmp_path) as (gateway, engine):
        for is_there in (False, True):
            assert any(cluster.chain for cluster in clusters_of(engine)) == is_there
            with pytest.raises(CheckpointError, match="does not fit the model"):
                await gateway.versions.put_adapter("mine", other)
            assert [served.name for served in gateway.models()] == ["tiny", "mine"][: 1 + is_there]
            await gateway.versions.put_adapter("mine", open_adapter(adapters["one"]))
            assert await asked(gateway, "mine", [5, 6], 4) == wanted(model, adapters["one"], [5, 6], 4)
            assert await asked(gateway, "tiny", [5, 6], 4) == wanted(model, None, [5, 6], 4)
