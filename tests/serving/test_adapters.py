"""Many adapters on one backbone while it serves: each answer is its adapter's, and of one version from end to end."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ecogen.config import Serving
from ecogen.engines.inproc import InprocEngine
from ecogen.errors import (
    CheckpointError,
    NodeLostError,
    ProtocolError,
    ServingError,
    TransportError,
    UnavailableError,
    UnknownModelError,
)
from ecogen.models.mixed_lora import Adapter, MixedLora, open_adapter
from ecogen.node.serving_edge import ServingEdge
from ecogen.serving.cluster import ServedCluster
from ecogen.serving.gateway import Gateway
from ecogen.serving.generation import GenerationRequest
from ecogen.serving.sampling import Chosen
from tests.models.decoders import save_decoder
from tests.models.test_mixed_lora import save_adapter
from tests.serving.federations import GREEDY, alone, prompts, serving, tiny_recipe, until

NAMES = ["one", "two", "three"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_decoder("llama", folder)
    return folder


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(model, folder / name, seed) for seed, name in enumerate(NAMES)}


def wanted(model: Path, adapter: Path | None, prompt: list[int], max_new: int) -> list[int]:
    whole = AutoModelForCausalLM.from_pretrained(model)
    tuned = whole if adapter is None else PeftModel.from_pretrained(whole, adapter)
    return alone(tuned.eval(), prompt, max_new)


async def asked(gateway: Gateway, name: str, prompt: list[int], max_new: int, tenant: str | None = None) -> list[int]:
    request = GenerationRequest(name, tuple(prompt), GREEDY, max_new, tenant=tenant)
    return [one.token async for one in gateway.generate(request) if isinstance(one, Chosen)]


async def test_a_batch_may_mix_adapters(model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    names = ["tiny", *NAMES]
    asked_for = [(names[index % 4], prompt) for index, prompt in enumerate(prompts(12))]
    async with serving(tiny_recipe(model), tmp_path) as (gateway, _):
        for name, folder in adapters.items():
            await gateway.put_adapter(name, open_adapter(folder))
        assert [served.name for served in gateway.models()] == names
        answers = await asyncio.gather(*(asked(gateway, name, prompt, 10) for name, prompt in asked_for))
    for (name, prompt), answer in zip(asked_for, answers, strict=True):
        assert answer == wanted(model, adapters.get(name), prompt, 10), name
    assert len({tuple(answer) for answer in answers}) > 6


async def test_an_edge_that_is_away_gets_an_adapter_when_it_is_back(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    prompt = prompts(1)[0]
    async with serving(tiny_recipe(model, devices=1, edges=2), tmp_path) as (gateway, engine):
        await engine.kill("edge-1")
        await gateway.put_adapter("one", open_adapter(adapters["one"]))
        await engine.start_node("edge-1")
        await gateway.drain("edge-0")
        assert await asked(gateway, "one", prompt, 10) == wanted(model, adapters["one"], prompt, 10)
        await gateway.drain("edge-0", is_out=False)
        for edge in ("edge-0", "edge-1"):
            await engine.kill(edge)
        with pytest.raises(NodeLostError):
            await gateway.put_adapter("two", open_adapter(adapters["two"]))
        assert [served.name for served in gateway.models()] == ["tiny", "one"]


@pytest.mark.parametrize("is_early", [True, False])
async def test_an_edge_without_devices_keeps_an_adapter_for_those_that_come(
    is_early: bool, model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Whether or not they were there before; nobody else waits for them."""
    [prompt] = prompts(1)
    async with serving(tiny_recipe(model, devices=1, edges=2), tmp_path) as (gateway, engine):
        if not is_early:
            await until(lambda: all(cluster.chain for cluster in clusters_of(engine)))
        await engine.kill("edge-1.cluster-0.device-0")
        async with asyncio.timeout(10):
            await gateway.put_adapter("one", open_adapter(adapters["one"]))
            await gateway.drain("edge-1")
            assert await asked(gateway, "one", prompt, 10) == wanted(model, adapters["one"], prompt, 10)
        await engine.start_node("edge-1.cluster-0.device-0")
        await gateway.drain("edge-1", is_out=False)
        await gateway.drain("edge-0")
        assert await asked(gateway, "one", prompt, 10) == wanted(model, adapters["one"], prompt, 10)


def clusters_of(engine: InprocEngine) -> list[ServedCluster]:
    return [cluster for role in engine.roles.values() if isinstance(role, ServingEdge) for cluster in role._clusters]


def hold_up(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> asyncio.Event:
    """Let a method of edge-1 end only when the event is set."""
    own, gate = getattr(owner, name), asyncio.Event()

    async def late(self: Any, *args: Any) -> Any:
        given = await own(self, *args)
        node_id = self.cluster_id if isinstance(self, ServedCluster) else self._context.node_id
        if node_id.startswith("edge-1"):
            await gate.wait()
        return given

    monkeypatch.setattr(owner, name, late)
    return gate


@pytest.mark.parametrize(
    ("owner", "name"), [(ServingEdge, "_obtain"), (ServedCluster, "_measured")], ids=["edge", "devices"]
)
async def test_an_edge_that_is_not_ready_yet_keeps_an_adapter(
    owner: type, name: str, model: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the model from its cloud, or its devices do from it; those who ask wait, and are answered by it."""
    [prompt], gate = prompts(1), hold_up(monkeypatch, owner, name)
    async with serving(tiny_recipe(model, devices=2, edges=2), tmp_path) as (gateway, engine):
        await gateway.drain("edge-1")
        assert await asked(gateway, "tiny", prompt, 2)
        async with asyncio.timeout(10):
            await gateway.put_adapter("one", open_adapter(adapters["one"]))
            await gateway.put_adapter("two", open_adapter(adapters["two"]))
            await gateway.remove_adapter("two")
            await asyncio.gather(*gateway._drops)
        await gateway.drain("edge-1", is_out=False)
        await gateway.drain("edge-0")
        asking = asyncio.create_task(asked(gateway, "one", prompt, 10))
        await asyncio.sleep(0.2)
        gate.set()
        assert await asking == wanted(model, adapters["one"], prompt, 10)
        assert len(held_by(engine, "edge-1")) == 1


async def test_who_refuses_an_adapter_that_others_hold_answers_nobody_without_it(
    model: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, refuses, hold = hold_up(monkeypatch, ServedCluster, "_measured"), False, MixedLora.hold

    def hold_or_refuse(self: MixedLora, adapter_id: str, adapter: Adapter) -> None:
        if refuses:
            raise CheckpointError("int8 cannot have it")
        hold(self, adapter_id, adapter)

    monkeypatch.setattr(MixedLora, "hold", hold_or_refuse)
    async with serving(tiny_recipe(model, devices=1, edges=2), tmp_path) as (gateway, _):
        await gateway.put_adapter("one", open_adapter(adapters["one"]))
        await gateway.drain("edge-0")
        asking = [asyncio.create_task(asked(gateway, name, [5, 6], 4)) for name in ("one", "tiny")]
        await asyncio.sleep(0.2)
        refuses = True
        gate.set()
        with pytest.raises(UnavailableError, match=r"edge-1\.cluster-0 cannot hold the adapter: int8 cannot have it"):
            await asking[0]
        assert await asking[1] == wanted(model, None, [5, 6], 4)
        with pytest.raises(UnavailableError, match=r"edge-1\.cluster-0 cannot hold the adapter: int8 cannot have it"):
            await asked(gateway, "one", [5, 6], 4)
        refuses = False
        await gateway.drain("edge-0", is_out=False)
        for _ in range(4):
            assert await asked(gateway, "one", [5, 6], 4) == wanted(model, adapters["one"], [5, 6], 4)


async def test_a_cluster_that_takes_an_adapter_answers_for_one_that_does_not(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    async with serving(tiny_recipe(model, devices=1, clusters=2), tmp_path) as (gateway, engine):
        await gateway.put_adapter("one", open_adapter(adapters["one"]))
        await until(lambda: all(cluster.chain for cluster in clusters_of(engine)))
        [refusing, other] = clusters_of(engine)
        [adapter_id] = refusing.adapters
        refusing.adapters._refused[adapter_id] = CheckpointError("int8 cannot have it")
        answers = await asyncio.gather(*(asked(gateway, "one", [5, 6], 4) for _ in range(4)))
        assert answers == [wanted(model, adapters["one"], [5, 6], 4)] * 4
        assert other.takes(adapter_id)


async def test_where_nobody_sees_whether_an_adapter_fits(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Whoever brings it waits for devices as requests do."""
    recipe = tiny_recipe(model, devices=1, serving=Serving(slots=2, max_tokens=64, patience_s=2))
    async with serving(recipe, tmp_path) as (gateway, engine):
        await engine.kill("edge-0.cluster-0.device-0")
        with pytest.raises(UnavailableError, match="no devices hold the model now"):
            await gateway.put_adapter("mine", open_adapter(adapters["one"]))
        assert not held_by(engine)
        bringing = asyncio.create_task(gateway.put_adapter("mine", open_adapter(adapters["one"])))
        await asyncio.sleep(0.5)
        await engine.start_node("edge-0.cluster-0.device-0")
        await bringing
        assert await asked(gateway, "mine", [5, 6], 4) == wanted(model, adapters["one"], [5, 6], 4)


async def test_adapters_go_with_the_last_gateway(model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    async with serving(tiny_recipe(model), tmp_path) as (gateway, engine):
        other = Gateway(engine.transport, ["edge-0"], gateway.models()[0])
        for each in (gateway, other):
            await each.put_adapter("one", open_adapter(adapters["one"]))
            await asked(each, "one", [5, 6, 7], 3)
        await other.close()
        assert await asked(gateway, "one", [5, 6, 7], 3)
        assert len(held_by(engine)) == 2
        await gateway.close()
        await until(lambda: not held_by(engine))


def held_by(engine: InprocEngine, edge_id: str = "edge-0") -> list[str]:
    edge = engine.roles[edge_id]
    assert isinstance(edge, ServingEdge)
    return [adapter_id for cluster in edge._clusters for adapter_id in cluster.adapters]


async def test_a_replaced_adapter_ends_its_answers_and_gives_no_others(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    prompt = [*range(3, 23), *prompts(1)[0]]
    request = GenerationRequest("mine", tuple(prompt), GREEDY, 30)
    async with serving(tiny_recipe(model), tmp_path) as (gateway, engine):
        await gateway.put_adapter("mine", open_adapter(adapters["one"]))
        async with aclosing(gateway.generate(request)) as running:
            begun = [await anext(running) for _ in range(3)]
            await gateway.put_adapter("mine", open_adapter(adapters["two"]))
            for _ in range(2):  # the second time begins where the first one was, and not where its predecessor
                assert await asked(gateway, "mine", prompt, 30) == wanted(model, adapters["two"], prompt, 30)
            await gateway.remove_adapter("mine")
            with pytest.raises(UnknownModelError, match="there is no model 'mine'"):
                await asked(gateway, "mine", prompt, 30)
            rest = [one async for one in running]
        tokens = [one.token for one in [*begun, *rest] if isinstance(one, Chosen)]
        assert tokens == wanted(model, adapters["one"], prompt, 30)
        await asyncio.gather(*gateway._drops)
        edge = engine.roles["edge-0"]
        assert isinstance(edge, ServingEdge)
        assert not list(edge._clusters[0].adapters), "what nobody uses is dropped"


@pytest.mark.parametrize("victim", ["edge-0", "edge-0.cluster-0.device-1"])
async def test_who_comes_back_is_given_the_adapters(
    victim: str, model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    [prompt] = prompts(1)
    async with serving(tiny_recipe(model), tmp_path) as (gateway, engine):
        await gateway.put_adapter("one", open_adapter(adapters["one"]))
        before = await asked(gateway, "one", prompt, 12)
        stream = gateway.generate(GenerationRequest("one", tuple(prompt), GREEDY, 12))
        begun = [await anext(stream) for _ in range(3)]
        await engine.kill(victim)
        await engine.start_node(victim)
        rest = [one async for one in stream]
        assert [one.token for one in [*begun, *rest] if isinstance(one, Chosen)] == before
        assert before == wanted(model, adapters["one"], prompt, 12)


async def test_an_edge_that_cannot_be_given_the_adapters_is_left(
    model: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream for that is closed, or the edge would take its gateway as there for ever, and keep all adapters."""
    fails, give = False, Gateway._give

    async def give_or_fail(self: Gateway, edge: Any, version: Any) -> bool:
        if fails:
            raise UnavailableError("not now")
        return await give(self, edge, version)

    monkeypatch.setattr(Gateway, "_give", give_or_fail)
    async with serving(tiny_recipe(model, devices=1), tmp_path) as (gateway, engine):
        await gateway.put_adapter("one", open_adapter(adapters["one"]))
        fails, edge = True, engine.roles["edge-0"]
        assert isinstance(edge, ServingEdge)
        for _ in range(3):
            with pytest.raises(UnavailableError, match="not now"):
                await asked(gateway, "one", [5, 6], 4)
        await until(lambda: not edge._num_gateways)
        fails = False
        assert await asked(gateway, "one", [5, 6], 4) == wanted(model, adapters["one"], [5, 6], 4)
        assert edge._num_gateways == 1


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
        bringing = asyncio.create_task(gateway.put_adapter("mine", other))
        await asyncio.sleep(0.2)
        await gateway.drain("edge-0")
        assert await asked(gateway, "tiny", [5, 6], 4) == wanted(model, None, [5, 6], 4)
        gate.set()
        with pytest.raises(CheckpointError, match="does not fit the model"):
            await bringing


@pytest.mark.parametrize(("problem", "is_lost"), [(ProtocolError("no model"), True), (RuntimeError("no room"), False)])
async def test_a_device_that_fails_to_hold_an_adapter_answers_nobody_without_it(
    problem: Exception,
    is_lost: bool,
    model: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where it has lost its model it is given it and the adapter anew; or else the adapter cannot be had."""
    hold, problems = MixedLora.hold, [problem]

    def hold_or_fail(self: MixedLora, adapter_id: str, adapter: Adapter) -> None:
        if problems and self._model.segments[0].has_head:
            raise problems.pop()
        hold(self, adapter_id, adapter)

    monkeypatch.setattr(MixedLora, "hold", hold_or_fail)
    async with serving(tiny_recipe(model), tmp_path) as (gateway, engine):
        await asked(gateway, "tiny", [5, 6], 2)
        [before] = [cluster.chain for cluster in clusters_of(engine)]
        if not is_lost:
            with pytest.raises(TransportError, match="prepare failed for an unexpected reason"):
                await gateway.put_adapter("one", open_adapter(adapters["one"]))
            assert not held_by(engine)
        await gateway.put_adapter("one", open_adapter(adapters["one"]))
        assert await asked(gateway, "one", [5, 6], 10) == wanted(model, adapters["one"], [5, 6], 10)
        [after] = [cluster.chain for cluster in clusters_of(engine)]
        assert (after is not before) == is_lost


async def test_a_tenants_adapter_is_not_there_for_others(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    async with serving(tiny_recipe(model, devices=1), tmp_path) as (gateway, _):
        await gateway.put_adapter("hers", open_adapter(adapters["one"]), tenant="her")
        assert [served.name for served in gateway.models("her")] == ["tiny", "hers"]
        assert [served.name for served in gateway.models("him")] == ["tiny"]
        assert await asked(gateway, "hers", [5, 6], 3, "her") == wanted(model, adapters["one"], [5, 6], 3)
        for tenant in ("him", None):
            with pytest.raises(UnknownModelError, match="there is no model 'hers'"):
                await asked(gateway, "hers", [5, 6], 3, tenant)
            with pytest.raises(UnknownModelError):
                await gateway.remove_adapter("hers", tenant)
        await gateway.put_adapter("hers", open_adapter(adapters["two"]), tenant="him")  # a name tells nothing
        assert await asked(gateway, "hers", [5, 6], 3, "him") == wanted(model, adapters["two"], [5, 6], 3)
        assert await asked(gateway, "hers", [5, 6], 3, "her") == wanted(model, adapters["one"], [5, 6], 3)
        with pytest.raises(ServingError, match="the name 'tiny' is the backbone's"):
            await gateway.put_adapter("tiny", open_adapter(adapters["two"]))


async def test_an_adapter_that_computes_no_numbers_harms_nobody_else(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Neither who is answered beside it nor who gets its slot after it."""
    good, prompt = open_adapter(adapters["one"]), [5, 6]
    bad = Adapter(good.scalings, {name: torch.full_like(tensor, torch.nan) for name, tensor in good.tensors.items()})
    async with serving(tiny_recipe(model, devices=1), tmp_path) as (gateway, _):
        await gateway.put_adapter("bad", bad)
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
        await gateway.put_adapter("hers", open_adapter(adapters["one"]), tenant="her")
        await engine.kill("edge-0.cluster-0.device-0")
        bringing = asyncio.create_task(gateway.put_adapter("his", open_adapter(adapters["two"]), tenant="him"))
        await asyncio.sleep(0.5)
        async with asyncio.timeout(5):
            await gateway.remove_adapter("hers", "her")
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
                await gateway.put_adapter("mine", other)
            assert [served.name for served in gateway.models()] == ["tiny", "mine"][: 1 + is_there]
            await gateway.put_adapter("mine", open_adapter(adapters["one"]))
            assert await asked(gateway, "mine", [5, 6], 4) == wanted(model, adapters["one"], [5, 6], 4)
            assert await asked(gateway, "tiny", [5, 6], 4) == wanted(model, None, [5, 6], 4)
