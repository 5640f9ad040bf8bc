"""A federation that serves answers as transformers does, whoever else asks and whoever is lost meanwhile."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from ecogen.config import Compute, DeviceProfile, PlacementRecipe, Recipe, Serving, TopologyRecipe, from_table
from ecogen.engines.inproc import InprocEngine
from ecogen.engines.served import check_serving
from ecogen.engines.serving import launch_serving
from ecogen.errors import (
    CheckpointError,
    ConfigError,
    PlacementError,
    ServingError,
    StepError,
    UnavailableError,
    UnknownModelError,
)
from ecogen.models.folder import open_folder
from ecogen.models.mixed_lora import open_adapter
from ecogen.node.serving_device import ServingDevice
from ecogen.node.serving_edge import ServingEdge
from ecogen.serving import cluster as cluster_module
from ecogen.serving.chain import ServedChain
from ecogen.serving.decoder_stage import DecoderStage
from ecogen.serving.desk import NEWS
from ecogen.serving.gateway import Gateway
from ecogen.serving.generation import Finish, GenerationRequest
from ecogen.serving.sampling import Chosen, Sampling
from ecogen.serving.stage_times import stage_times
from ecogen.transport.base import Message
from ecogen.transport.memory import MemoryTransport
from tests.greedy import Agree, alone
from tests.models.decoders import save_decoder
from tests.models.test_mixed_lora import save_adapter
from tests.runs import until
from tests.serving.federations import (
    GREEDY,
    SPEC,
    answer,
    prompts,
    request,
    serving,
    tiny_recipe,
    whole_answer,
)

EDGE, DEVICES = "edge-0", [f"edge-0.cluster-0.device-{index}" for index in range(3)]


@pytest.fixture(scope="module")
def whole(model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model).eval()


@pytest.mark.parametrize("labels", ["end", "start"])
async def test_many_at_once_are_answered_as_each_alone(
    labels: str, model: Path, whole: PreTrainedModel, tmp_path: Path, agree: Agree
) -> None:
    recipe = tiny_recipe(model, placement=PlacementRecipe(labels=labels))  # type: ignore[arg-type]
    asked = [(prompt, 3 + 5 * (index % 4)) for index, prompt in enumerate(prompts(14))]
    async with launch_serving(recipe, folder=tmp_path) as gateway:
        answers = await asyncio.gather(*(whole_answer(gateway, *one) for one in asked))
    for one, (tokens, finish) in zip(asked, answers, strict=True):
        agree(tokens, alone(whole, *one))
        assert finish.node_ids == tuple(DEVICES)
        assert 0 < finish.bill.energy_j.low < finish.bill.energy_j.mid < finish.bill.energy_j.high
        assert min(finish.t_ul_s, finish.t_inference_s, finish.t_dl_s, finish.bill.emissions_g.mid) > 0


async def test_each_device_has_only_its_own_tensors_on_its_disk(model: Path, tmp_path: Path) -> None:
    async with serving(tiny_recipe(model), tmp_path) as (gateway, _):
        await answer(gateway, [5, 6], 2)
    whole = open_folder(model)
    held = tensors_on_disks(tmp_path)
    assert len(held) == 3
    assert set().union(*held) == whole.files.keys()
    assert not held[0] & held[1]
    assert held[0] & held[2] == {"model.embed_tokens.weight"}  # tied to the head


def tensors_on_disks(folder: Path) -> list[set[str]]:
    return [set(open_folder(path).files) for path in sorted(folder.glob("nodes/*device*/model-*"))]


@pytest.mark.parametrize("victim", DEVICES)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=7, frequency_penalty=0.6)], ids=["greedy", "drawn"])
async def test_a_device_lost_in_mid_generation(victim: str, sampling: Sampling, model: Path, tmp_path: Path) -> None:
    """The others take its blocks, and every answer goes on: no token is lost or doubled."""
    asked = [(prompt, 30) for prompt in prompts(5)]
    async with serving(tiny_recipe(model), tmp_path / "a") as (gateway, _):
        wanted = await asyncio.gather(*(answer(gateway, *one, sampling) for one in asked))
    async with serving(tiny_recipe(model), tmp_path / "b") as (gateway, engine):
        answering = [asyncio.create_task(answer(gateway, *one, sampling)) for one in asked]
        first = gateway.generate(request(gateway, [7, 8, 9], 30))
        for _ in range(4):
            await anext(first)
        await engine.kill(victim)
        assert await asyncio.wait_for(asyncio.gather(*answering), 30) == wanted
        rest, finish = [one async for one in first], None
        finish = rest[-1]
        assert not isinstance(finish, Chosen)
        assert set(DEVICES) - {victim} <= set(finish.node_ids)
        await engine.start_node(victim)
        assert await asyncio.wait_for(answer(gateway, *asked[0], sampling), 30) == wanted[0]


async def test_an_edge_lost_in_mid_generation(model: Path, tmp_path: Path) -> None:
    """Another edge goes on with its answers."""
    [prompt] = prompts(1)
    sampling = Sampling(seed=2, presence_penalty=0.3)
    async with serving(tiny_recipe(model, devices=1, edges=2), tmp_path) as (gateway, engine):
        wanted = await answer(gateway, prompt, 40, sampling)
        tokens = gateway.generate(request(gateway, prompt, 40, sampling))
        begun = [await anext(tokens) for _ in range(5)]
        edge = next(edge.node_id for edge in gateway._edges if edge.answers)
        await engine.kill(edge)
        rest = [one async for one in tokens]
        assert [one.token for one in [*begun, *rest] if isinstance(one, Chosen)] == wanted


async def test_what_nobody_reads_before_its_end_comes_in_one_message(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = list[int]()
    pack = MemoryTransport.pack

    def weighed(self: MemoryTransport, message: Message, receiver_id: str) -> Any:
        parcel = pack(self, message, receiver_id)
        sizes.extend([parcel.num_bytes] * (message.method == NEWS))
        return parcel

    monkeypatch.setattr(MemoryTransport, "pack", weighed)
    async with serving(tiny_recipe(model, devices=1, edges=2), tmp_path) as (gateway, engine):
        streamed = [one async for one in gateway.generate(request(gateway, [5, 6, 7], 20))]
        many = sizes.copy()
        sizes.clear()
        whole = replace(request(gateway, [5, 6, 7], 20), is_whole=True)
        told = [one async for one in gateway.generate(whole)]
        assert told[:-1] == streamed[:-1]
        assert isinstance(told[-1], Finish)
        assert len(sizes) == 1 < len(many)
        assert sum(sizes) < sum(many) / 2
        again = asyncio.create_task(_all(gateway, replace(whole, max_new=40)))
        await until(lambda: any(edge.answers for edge in gateway._edges))
        await engine.kill(next(edge.node_id for edge in gateway._edges if edge.answers))
        assert (await again)[:20] == told[:20], "at the other edge, from the beginning"


async def _all(gateway: Gateway, asked: GenerationRequest) -> list[Chosen | Finish]:
    return [one async for one in gateway.generate(asked)]


async def test_an_edge_that_cannot_hold_the_model_leaves_answers_to_another(
    model: Path, whole: PreTrainedModel, tmp_path: Path, agree: Agree
) -> None:
    """Those that it had begun too, and from then on it is asked no more than is needed to see whether it can again."""
    spec = Serving(slots=2, max_tokens=64, patience_s=1)
    async with serving(tiny_recipe(model, devices=1, edges=2, serving=spec), tmp_path) as (gateway, engine):
        await asyncio.gather(*(answer(gateway, prompt, 2) for prompt in prompts(4)))
        asked = [(prompt, 30) for prompt in prompts(4)]
        answering = [asyncio.create_task(answer(gateway, *one)) for one in asked]
        await asyncio.sleep(0.05)
        await engine.kill(DEVICES[0])
        for given, one in zip(await asyncio.gather(*answering), asked, strict=True):
            agree(given, alone(whole, *one))
        gateway._patience_s = 60
        began_s = time.monotonic()
        for prompt in prompts(4):
            agree(await answer(gateway, prompt, 2), alone(whole, prompt, 2))
        assert time.monotonic() - began_s < 1
        await engine.kill("edge-1.cluster-0.device-0")
        with pytest.raises(UnavailableError, match="none of its devices is here"):
            await answer(gateway, [5, 6, 7], 2)


async def test_without_a_spare_readers_are_told(model: Path, tmp_path: Path) -> None:
    """Two devices that hold half of the model each."""
    spec = Serving(slots=1, shelf=0, max_tokens=64, patience_s=1)
    devices = TopologyRecipe(edges=1, clusters_per_edge=1, devices_per_cluster=2, end=DeviceProfile(memory_gib=0.0006))
    recipe = tiny_recipe(model, serving=spec, topology=devices)
    async with serving(recipe, tmp_path) as (gateway, engine):
        tokens = gateway.generate(request(gateway, [5, 6, 7], 50))
        await anext(tokens)
        await engine.kill(DEVICES[1])
        with pytest.raises(ServingError, match=r"the model needs .* add a device"):
            async for _ in tokens:
                pass
        await engine.start_node(DEVICES[1])
        assert len(await answer(gateway, [5, 6, 7], 4)) == 4


async def test_who_leaves_frees_its_slot(model: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(model, devices=1, serving=Serving(slots=1, max_tokens=64, waiting=3))
    async with serving(recipe, tmp_path) as (gateway, _):
        for prompt in prompts(6):
            stream = gateway.generate(request(gateway, prompt, 30))
            await anext(stream)
            await stream.aclose()
        assert len(await answer(gateway, [5, 6, 7], 8)) == 8


async def test_clusters_share_the_work(model: Path, tmp_path: Path) -> None:
    async with serving(tiny_recipe(model, devices=1, clusters=2, edges=2), tmp_path) as (gateway, _):
        for seed in range(20):  # until the last one has loaded the model
            answers = await asyncio.gather(*(whole_answer(gateway, prompt, 25) for prompt in prompts(8, seed)))
            devices = [finish.node_ids for _, finish in answers]
            if len(set(devices)) == 4:
                break
        assert sorted(devices.count(device) for device in set(devices)) == [2, 2, 2, 2]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_next", "deepseek_v3"])
async def test_what_begins_alike_is_not_computed_again(kind: str, tmp_path: Path, agree: Agree) -> None:
    """And gives the same answers; states that have seen all tokens help chats that go on, and nobody else."""
    whole = save_decoder(kind, tmp_path / "tiny")
    [system, first, second] = [prompt[:12] for prompt in prompts(3, seed=9)]
    system = [*range(3, 23), *system]
    async with serving(tiny_recipe(tmp_path / "tiny", devices=2), tmp_path) as (gateway, _):
        tokens, finish = await whole_answer(gateway, [*system, *first], 8)
        agree(tokens, alone(whole, [*system, *first], 8))
        assert finish.num_reused == 0
        chat = [*system, *first, *tokens, *second]
        going_on, other = [await whole_answer(gateway, prompt, 8) for prompt in (chat, [*system, *second])]
    assert going_on[1].num_reused == len([*system, *first, *tokens]) - 1
    assert other[1].num_reused == (0 if kind == "qwen3_next" else len(system))
    agree(going_on[0], alone(whole, chat, 8))
    agree(other[0], alone(whole, [*system, *second], 8))


async def test_a_device_that_is_seen_to_be_slow_holds_less(
    model: Path, whole: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agree: Agree
) -> None:
    """Nothing tells so beforehand: it is as fast as the others by the recipe."""
    given = DecoderStage.run

    def run(stage: DecoderStage, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02 * len(stage._segment) * (4 if stage._segment.has_head else 1))
        return given(stage, *args, **kwargs)

    monkeypatch.setattr(DecoderStage, "run", run)
    async with serving(tiny_recipe(model, devices=2), tmp_path) as (gateway, engine):
        agree(await answer(gateway, [5, 6, 7], 4), alone(whole, [5, 6, 7], 4))
        edge = engine.roles[EDGE]
        assert isinstance(edge, ServingEdge)
        [cluster] = edge._clusters
        assert cluster.chain is not None
        assert [len(visit.segment) for visit in cluster.chain.placement] == [5, 1]


async def test_cuts_that_fail_when_they_are_tried_are_not_kept(
    model: Path, whole: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agree: Agree
) -> None:
    given = DecoderStage.run

    def run(stage: DecoderStage, *args: Any, **kwargs: Any) -> Any:
        if len(stage._segment) > 3:
            raise RuntimeError("out of memory")
        time.sleep(0.1 if stage._segment.has_head else 0.02)
        return given(stage, *args, **kwargs)

    monkeypatch.setattr(DecoderStage, "run", run)
    async with serving(tiny_recipe(model, devices=2), tmp_path) as (gateway, _):
        agree(await answer(gateway, [5, 6, 7], 4), alone(whole, [5, 6, 7], 4))


async def test_a_stage_that_fails_is_no_fault_of_those_who_asked(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, fails = DecoderStage.run, False

    def run(stage: DecoderStage, *args: Any, **kwargs: Any) -> Any:
        if fails:
            raise RuntimeError("out of memory")
        return given(stage, *args, **kwargs)

    monkeypatch.setattr(DecoderStage, "run", run)
    async with serving(tiny_recipe(model, devices=2), tmp_path) as (gateway, _):
        before, fails = await answer(gateway, [5, 6, 7], 4), True
        with pytest.raises(StepError, match=r"^a step through the model failed; the log says why$"):
            await answer(gateway, [8, 9], 4)
        fails = False
        assert await answer(gateway, [5, 6, 7], 4) == before


async def test_a_device_lost_while_its_chain_is_measured(
    model: Path, whole: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agree: Agree
) -> None:
    started: asyncio.Future[InprocEngine] = asyncio.get_running_loop().create_future()
    seen = []

    async def measure(chain: ServedChain, slots: int) -> dict[str, float]:
        engine = await asyncio.shield(started)
        if not seen:
            await engine.kill(chain.placement.node_ids[-1])
        seen.append(chain.placement.node_ids)
        return await stage_times(chain, slots)

    monkeypatch.setattr(cluster_module, "stage_times", measure)
    async with serving(tiny_recipe(model), tmp_path) as (gateway, engine):
        started.set_result(engine)
        agree(await answer(gateway, [5, 6, 7], 4), alone(whole, [5, 6, 7], 4))
    assert [len(node_ids) for node_ids in seen[:2]] == [3, 2]


# What may be wrong.


async def test_requests_that_cannot_be_answered(model: Path, tmp_path: Path) -> None:
    async with serving(tiny_recipe(model, devices=1), tmp_path) as (gateway, _):
        with pytest.raises(UnknownModelError, match="there is no model 'other'"):
            await anext(gateway.generate(GenerationRequest("other", (5,), GREEDY, 4)))
        with pytest.raises(ServingError, match=r"a prompt of 60 tokens and an answer of 5 do not fit 1 to 64 tokens"):
            await answer(gateway, [5] * 60, 5)


def test_a_model_that_does_not_fit(model: Path) -> None:
    small = TopologyRecipe(edges=1, clusters_per_edge=1, devices_per_cluster=2, end=DeviceProfile(memory_gib=1e-4))
    with pytest.raises(PlacementError, match=r"no cuts of its 6 blocks fit 2 devices .* add a device"):
        check_serving(tiny_recipe(model, topology=small))


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no model folder"):
        check_serving(tiny_recipe(tmp_path))


def test_no_longer_requests_than_the_model_was_made_for(model: Path) -> None:
    assert check_serving(tiny_recipe(model)).max_tokens == SPEC.max_tokens
    assert check_serving(tiny_recipe(model, serving=Serving(max_tokens=4096))).max_tokens == 128


def test_a_recipe_that_serves_is_no_recipe_that_tunes() -> None:
    assert Recipe().task == "tune"


# Other numbers.


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 0.55), ("int8", 0.45)])
async def test_smaller_weights_say_nearly_the_same(dtype: str, share: float, tmp_path: Path) -> None:
    """Some matrices of a tiny model are hardly larger than their scales; the embedding stays in float32."""
    whole = save_decoder("llama", tmp_path / "tiny", hidden_size=128, intermediate_size=256, tie_word_embeddings=False)
    adapter = open_adapter(save_adapter(tmp_path / "tiny", tmp_path / "adapter", 1))
    recipe = tiny_recipe(tmp_path / "tiny", devices=2, compute=Compute(dtype=dtype))  # type: ignore[arg-type]
    async with serving(recipe, tmp_path) as (gateway, engine):
        await gateway.versions.put_adapter("tuned", adapter)
        said = [await answer(gateway, prompt, 1) for prompt in prompts(40)]
        tuned = GenerationRequest("tuned", (5, 6), GREEDY, 4)
        assert len([one async for one in gateway.generate(tuned)]) == 5
        devices = [role for role in engine.roles.values() if isinstance(role, ServingDevice)]
        held = sum(device._held_bytes for device in devices)
    assert held < share * sum(parameter.nbytes for parameter in whole.parameters())
    agreeing = sum(one == alone(whole, prompt, 1).tokens for one, prompt in zip(said, prompts(40), strict=True))
    assert agreeing > 30


def test_weights_in_integers_are_not_tuned() -> None:
    with pytest.raises(ConfigError, match="int8 is for serving; tune in float32 or bfloat16"):
        from_table({"compute": {"dtype": "int8"}})
