"""Adapters come while edges and devices are away, not ready, lost or unwilling: whoever answers, answers with them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from ecogen.config import Serving
from ecogen.errors import (
    CheckpointError,
    NodeLostError,
    ProtocolError,
    TransportError,
    UnavailableError,
)
from ecogen.models.mixed_lora import Adapter, MixedLora, open_adapter
from ecogen.node.serving_device import ServingDevice
from ecogen.node.serving_edge import ServingEdge
from ecogen.serving import gateway as gateway_module
from ecogen.serving.cluster import ServedCluster
from ecogen.serving.generation import GenerationRequest
from ecogen.serving.loading import UNLOAD, Prepare, parts_of
from ecogen.serving.sampling import Chosen
from ecogen.serving.versions import Version, Versions
from ecogen.transport.base import Message, Peer, Stream
from tests.serving.adapters import asked, clusters_of, held_by, wanted
from tests.serving.federations import GREEDY, prompts, serving, tiny_recipe, until


async def test_an_edge_that_is_away_gets_an_adapter_when_it_is_back(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    prompt = prompts(1)[0]
    async with serving(tiny_recipe(model, devices=1, edges=2), tmp_path) as (gateway, engine):
        await engine.kill("edge-1")
        await gateway.versions.put_adapter("one", open_adapter(adapters["one"]))
        await engine.start_node("edge-1")
        await gateway.drain("edge-0")
        assert await asked(gateway, "one", prompt, 10) == wanted(model, adapters["one"], prompt, 10)
        await gateway.drain("edge-0", is_out=False)
        for edge in ("edge-0", "edge-1"):
            await engine.kill(edge)
        with pytest.raises(NodeLostError):
            await gateway.versions.put_adapter("two", open_adapter(adapters["two"]))
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
            await gateway.versions.put_adapter("one", open_adapter(adapters["one"]))
            await gateway.drain("edge-1")
            assert await asked(gateway, "one", prompt, 10) == wanted(model, adapters["one"], prompt, 10)
        await engine.start_node("edge-1.cluster-0.device-0")
        await gateway.drain("edge-1", is_out=False)
        await gateway.drain("edge-0")
        assert await asked(gateway, "one", prompt, 10) == wanted(model, adapters["one"], prompt, 10)


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
            await gateway.versions.put_adapter("one", open_adapter(adapters["one"]))
            await gateway.versions.put_adapter("two", open_adapter(adapters["two"]))
            await gateway.versions.remove_adapter("two")
            await asyncio.gather(*gateway.versions._drops)
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
        await gateway.versions.put_adapter("one", open_adapter(adapters["one"]))
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
        await gateway.versions.put_adapter("one", open_adapter(adapters["one"]))
        await until(lambda: all(cluster.chain for cluster in clusters_of(engine)))
        [refusing, other] = clusters_of(engine)
        [adapter_id] = refusing.adapters
        refusing.adapters._refused[adapter_id] = CheckpointError("int8 cannot have it")
        answers = await asyncio.gather(*(asked(gateway, "one", [5, 6], 4) for _ in range(4)))
        assert answers == [wanted(model, adapters["one"], [5, 6], 4)] * 4
        assert other.takes(adapter_id)


async def test_that_an_edge_could_not_answer_is_kept_while_it_tells_anything(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Each version has an id of its own, and a server lives long."""
    async with serving(tiny_recipe(model, devices=1), tmp_path) as (gateway, engine):
        [edge], refused = gateway._edges, []
        await asked(gateway, "tiny", [5, 6], 2)
        [cluster] = clusters_of(engine)
        for patience_s in (20, 20, 0):
            gateway._patience_s = patience_s
            await gateway.versions.put_adapter("one", open_adapter(adapters["one"]))
            adapter_id = gateway.versions.find("one", None).adapter_id
            cluster.adapters._refused[adapter_id] = CheckpointError("int8 cannot have it")
            with pytest.raises(UnavailableError, match="int8 cannot have it"):
                await asked(gateway, "one", [5, 6], 4)
            refused.append(adapter_id)
            assert [*edge.unable_s] == (refused if patience_s else [adapter_id])


async def test_where_nobody_sees_whether_an_adapter_fits(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Whoever brings it waits for devices as requests do."""
    recipe = tiny_recipe(model, devices=1, serving=Serving(slots=2, max_tokens=64, patience_s=2))
    async with serving(recipe, tmp_path) as (gateway, engine):
        await engine.kill("edge-0.cluster-0.device-0")
        with pytest.raises(UnavailableError, match="no devices hold the model now"):
            await gateway.versions.put_adapter("mine", open_adapter(adapters["one"]))
        assert not held_by(engine)
        bringing = asyncio.create_task(gateway.versions.put_adapter("mine", open_adapter(adapters["one"])))
        await asyncio.sleep(0.5)
        await engine.start_node("edge-0.cluster-0.device-0")
        await bringing
        assert await asked(gateway, "mine", [5, 6], 4) == wanted(model, adapters["one"], [5, 6], 4)


@pytest.mark.parametrize("victim", ["edge-0", "edge-0.cluster-0.device-1"])
async def test_who_comes_back_is_given_the_adapters(
    victim: str, model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    [prompt] = prompts(1)
    async with serving(tiny_recipe(model), tmp_path) as (gateway, engine):
        await gateway.versions.put_adapter("one", open_adapter(adapters["one"]))
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
    fails, give = False, Versions._give

    async def give_or_fail(self: Versions, edge: Any, version: Any) -> bool:
        if fails:
            raise UnavailableError("not now")
        return await give(self, edge, version)

    monkeypatch.setattr(Versions, "_give", give_or_fail)
    async with serving(tiny_recipe(model, devices=1), tmp_path) as (gateway, engine):
        await gateway.versions.put_adapter("one", open_adapter(adapters["one"]))
        fails, edge = True, engine.roles["edge-0"]
        assert isinstance(edge, ServingEdge)
        for _ in range(3):
            with pytest.raises(UnavailableError, match="not now"):
                await asked(gateway, "one", [5, 6], 4)
        await until(lambda: not edge._num_gateways)
        fails = False
        assert await asked(gateway, "one", [5, 6], 4) == wanted(model, adapters["one"], [5, 6], 4)
        assert edge._num_gateways == 1


@pytest.mark.parametrize("num_turns", range(4))
async def test_who_asks_may_leave_even_as_the_stream_to_such_an_edge_closes(num_turns: int) -> None:
    """Or the answer would go on at another edge for nobody."""
    is_closed = asyncio.Event()

    class Closing:
        async def close(self) -> None:
            await is_closed.wait()

    closing = asyncio.create_task(gateway_module._close(cast(Stream, Closing())))
    await asyncio.sleep(0.01)
    is_closed.set()
    for _ in range(num_turns):
        await asyncio.sleep(0)
    if closing.cancel():
        with pytest.raises(asyncio.CancelledError):
            await closing
    else:
        await closing


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
                await gateway.versions.put_adapter("one", open_adapter(adapters["one"]))
            assert not held_by(engine)
        await gateway.versions.put_adapter("one", open_adapter(adapters["one"]))
        assert await asked(gateway, "one", [5, 6], 10) == wanted(model, adapters["one"], [5, 6], 10)
        [after] = [cluster.chain for cluster in clusters_of(engine)]
        assert (after is not before) == is_lost


@pytest.mark.parametrize("owner", [ServingEdge, ServingDevice], ids=["at the edge", "at the device"])
@pytest.mark.parametrize("is_late", [False, True], ids=["after a part of it", "after all of it"])
async def test_who_leaves_while_an_adapter_comes_leaves_nothing(
    is_late: bool,
    owner: type[ServingEdge | ServingDevice],
    model: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ecogen.serving.loading._PART_BYTES", 1)
    hold, has_come = owner._hold, asyncio.Event()

    async def hold_and_wait(self: Any, peer: Peer, message: Message) -> Message:
        reply = await hold(self, peer, message)
        if message.read(Prepare).is_last or not is_late:
            has_come.set()
            await asyncio.Event().wait()
        return reply

    monkeypatch.setattr(owner, "_hold", hold_and_wait)
    async with serving(tiny_recipe(model, devices=1), tmp_path) as (gateway, engine):
        await asked(gateway, "tiny", [5, 6], 2)
        edge, device = engine.roles["edge-0"], engine.roles["edge-0.cluster-0.device-0"]
        assert isinstance(edge, ServingEdge)
        assert isinstance(device, ServingDevice)
        assembly = edge._assembly if owner is ServingEdge else device._assembly
        bringing = asyncio.create_task(gateway.versions.put_adapter("one", open_adapter(adapters["one"])))
        await has_come.wait()
        assert bool(held_by(engine)) == (is_late or owner is ServingDevice)
        assert bool(device._loaded._ids) == is_late
        assert bool(assembly._parts) != is_late
        bringing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await bringing
        assert not held_by(engine)
        assert not device._loaded._ids
        assert not assembly._parts
        assert [served.name for served in gateway.models()] == ["tiny"]


async def test_parts_go_with_the_model(
    model: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that lets go of its model has no use for what came of an adapter, and is never given the rest."""
    monkeypatch.setattr("ecogen.serving.loading._PART_BYTES", 1)
    async with serving(tiny_recipe(model, devices=1), tmp_path) as (gateway, engine):
        await asked(gateway, "tiny", [5, 6], 2)
        device, edge = engine.roles["edge-0.cluster-0.device-0"], Peer("edge-0", "edge")
        assert isinstance(device, ServingDevice)
        first, second, *_ = parts_of("one", open_adapter(adapters["one"]))
        await device._hold(edge, first)
        assert device._assembly._parts
        await device._unload(edge, Message.of(UNLOAD))
        assert not device._assembly._parts
        with pytest.raises(ProtocolError, match="part 1 of adapter 'one' came without those before it"):
            await device._hold(edge, second)


async def test_parts_go_with_the_last_gateway(
    model: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes after them begins anew, or is refused."""
    monkeypatch.setattr("ecogen.serving.loading._PART_BYTES", 1)
    async with serving(tiny_recipe(model, devices=1), tmp_path) as (gateway, engine):
        await asked(gateway, "tiny", [5, 6], 2)
        edge = engine.roles["edge-0"]
        assert isinstance(edge, ServingEdge)
        first, second, *_ = parts_of("x-0", open_adapter(adapters["one"]))
        await engine.transport.call("edge-0", first)
        await gateway.close()
        await until(lambda: not edge._assembly._parts)
        with pytest.raises(ProtocolError, match="part 1 of adapter 'x-0' came without those before it"):
            await engine.transport.call("edge-0", second)


@pytest.mark.parametrize("is_known", [True, False], ids=["known", "coming"])
async def test_what_goes_while_an_edge_is_given_what_it_missed(
    is_known: bool, model: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not given to it after it was dropped."""
    give, reached, gate, is_slow = Versions._give, asyncio.Event(), asyncio.Event(), False

    async def give_slowly(self: Versions, edge_id: str, version: Version) -> bool:
        if is_slow and version.served.name == "one":
            reached.set()
            await gate.wait()
        return await give(self, edge_id, version)

    async def never(*_: object) -> bool:
        return await asyncio.Event().wait()

    monkeypatch.setattr(Versions, "_give", give_slowly)
    async with serving(tiny_recipe(model, devices=1), tmp_path) as (gateway, engine):
        await gateway.versions.put_adapter("one", open_adapter(adapters["one"]))
        bring_two = gateway.versions.put_adapter("two", open_adapter(adapters["two"]))
        if is_known:
            await bring_two
        await engine.kill("edge-0")
        await engine.start_node("edge-0")
        await until(lambda: gateway._edges[0].stream is None)
        is_slow = True
        if not is_known:  # nobody holds the model yet, to see whether it fits
            monkeypatch.setattr(Versions, "_has", never)
            bringing = asyncio.create_task(bring_two)
            await until(lambda: gateway.versions._coming)
        asking = asyncio.create_task(asked(gateway, "tiny", [5, 6], 4))
        await reached.wait()
        if is_known:
            await gateway.versions.remove_adapter("two")
        else:
            bringing.cancel()
            await asyncio.gather(bringing, return_exceptions=True)
        await asyncio.gather(*gateway.versions._drops)
        gate.set()
        await asking
        assert len(held_by(engine)) == 1
