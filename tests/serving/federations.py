"""Federations that serve a tiny random model, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ecogen.config import Recipe, Serving, TopologyRecipe
from ecogen.engines.inproc import InprocEngine, launch_inproc
from ecogen.engines.served import check_serving, serving_recipe
from ecogen.serving.gateway import Gateway
from ecogen.serving.generation import Finish, GenerationRequest
from ecogen.serving.sampling import Chosen, Sampling
from tests import greedy

GREEDY = Sampling(temperature=0)
SPEC = Serving(slots=2, max_tokens=64, chunk=5, patience_s=20)


def tiny_recipe(model: Path, *, devices: int = 3, edges: int = 1, clusters: int = 1, **sections: Any) -> Recipe:
    topology = TopologyRecipe(edges=edges, clusters_per_edge=clusters, devices_per_cluster=devices)
    return serving_recipe(model, **({"serving": SPEC, "topology": topology} | sections))


@asynccontextmanager
async def serving(recipe: Recipe, folder: Path) -> AsyncIterator[tuple[Gateway, InprocEngine]]:
    """A gateway and the engine behind it, for tests that stop and start nodes."""
    served = check_serving(recipe)
    async with launch_inproc(recipe, folder) as federation:
        engine = federation._engine
        assert isinstance(engine, InprocEngine)
        edge_ids, patience_s = federation.topology.edge_ids, recipe.serving.patience_s
        gateway = Gateway(federation.transport, edge_ids, served, patience_s, federation.is_given_up)
        yield gateway, engine
        await gateway.close()


def request(gateway: Gateway, prompt: Sequence[int], max_new: int, sampling: Sampling = GREEDY) -> GenerationRequest:
    return GenerationRequest(gateway.models()[0].name, tuple(prompt), sampling, max_new)


async def answer(gateway: Gateway, prompt: Sequence[int], max_new: int, sampling: Sampling = GREEDY) -> list[int]:
    return (await whole_answer(gateway, prompt, max_new, sampling))[0]


async def whole_answer(
    gateway: Gateway, prompt: Sequence[int], max_new: int, sampling: Sampling = GREEDY
) -> tuple[list[int], Finish]:
    told = [one async for one in gateway.generate(request(gateway, prompt, max_new, sampling))]
    assert isinstance(told[-1], Finish)
    return [one.token for one in told[:-1] if isinstance(one, Chosen)], told[-1]


def alone(whole: PreTrainedModel, prompt: Sequence[int], max_new: int) -> list[int]:
    """What transformers' own `generate` answers."""
    return greedy.alone(whole, prompt, max_new).tokens


def prompts(number: int, seed: int = 4) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 25, (number,), generator=generator).tolist()
    return [torch.randint(3, 99, (length,), generator=generator).tolist() for length in lengths]


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that nodes of this process bring about."""
    for _ in range(1500):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come about")
