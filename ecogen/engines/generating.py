"""Pictures of a run's generator, drawn through the split chain."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from ecogen import config as recipes
from ecogen.accounting.bill import Bill
from ecogen.engines.served import Served, find_served, serving_recipe
from ecogen.engines.serving import launch_serving
from ecogen.errors import CheckpointError, ServingError
from ecogen.models.mixed_lora import open_adapter
from ecogen.serving.gateway import Gateway
from ecogen.serving.generation import Finish, GenerationRequest
from ecogen.serving.openai.drawing import picture_request
from ecogen.serving.openai.questions import spread_seeds
from ecogen.serving.openai.text import load_text
from ecogen.serving.sampling import Sampling


@dataclass(frozen=True)
class Generated:
    """Pictures, and what they took.

    Attributes:
        model: the name of the one that drew them.
        tokens: the codes of each picture.
        sheet: all of them side by side, as a PNG file.
    """

    model: str
    tokens: list[list[int]]
    sheet: bytes
    bill: Bill
    t_inference_s: float


async def generate(
    folder: Path, prompt: str, number: int, *, sampling: Sampling, edge: str | None, engine: str
) -> Generated:
    """So many pictures for a prompt, by a run's model or one edge's.

    Raises:
        CheckpointError: if there is no such model, or it draws no pictures.
        ServingError: if the prompt is too long.
    """
    served = find_served(folder)
    name = _chosen(served, edge)
    text = await asyncio.to_thread(load_text, served.folder)
    if text.pictures is None:
        raise CheckpointError(f"{folder} holds a model that draws no pictures; give a run of the recipe pairs")
    recipe = serving_recipe(served.folder, recipes.load("serve", [f"engine={engine}"]))
    async with launch_serving(recipe, name=served.name) as gateway:
        if name in served.adapters:
            await gateway.versions.put_adapter(name, open_adapter(served.adapters[name]))
        model = next(model for model in gateway.models() if model.name == name)
        requests = spread_seeds(picture_request(text, model, prompt, sampling), number)
        drawn = await asyncio.gather(*(_drawn(gateway, request) for request in requests))
    tokens = [chosen for chosen, _ in drawn]
    finishes = [finish for _, finish in drawn]
    bill = sum((finish.bill for finish in finishes), Bill.zero())
    return Generated(name, tokens, text.pictures.sheet(tokens), bill, max(one.t_inference_s for one in finishes))


def _chosen(served: Served, edge: str | None) -> str:
    """The name of the model that is asked: the edge's; or else the run's, if all edges have one in common."""
    run = served.name.partition("/")[0]
    name = f"{run}/{edge}" if edge else run
    if name in served.adapters:
        return name
    if edge is None and not served.adapters:
        return served.name
    edges = [other.partition("/")[2] for other in served.adapters if "/" in other]
    if not edges:
        raise CheckpointError(f"there is no model of {edge!r}: {served.name} is one for all edges; leave --edge out")
    wrong = "" if edge is None else f", not {edge!r}"
    wrong += ", or leave --edge out for the cloud's" if run in served.adapters else ""
    raise CheckpointError(f"this run has a model for each edge; name one with --edge: {', '.join(edges)}{wrong}")


async def _drawn(gateway: Gateway, request: GenerationRequest) -> tuple[list[int], Finish]:
    tokens = list[int]()
    async with aclosing(gateway.generate(request)) as answer:
        async for event in answer:
            if isinstance(event, Finish):
                return tokens, event
            tokens.append(event.token)
    raise ServingError("the picture did not end; the log says why")
