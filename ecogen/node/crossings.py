"""After tuning, an edge has the cloud's generator draw and describe: once in tokens and once in pictures, each time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ecogen import config as recipes
from ecogen.errors import EcoGenError
from ecogen.models.family import whole_segment
from ecogen.models.pair_model import PairModel
from ecogen.models.picture_modules import load_modules
from ecogen.node.context import NodeContext
from ecogen.planning.cost import ModelShape, forward_flops
from ecogen.records import Crossing, CrossingRecord
from ecogen.runtime.stage import Stage
from ecogen.serving.crossing import AskedGenerator, Front, Told
from ecogen.tuning.captions import DIGITS, digit_caption

logger = logging.getLogger(__name__)


def asked_generator(
    context: NodeContext,
    stage: Stage,
    folder: Path,
    shape: ModelShape,
    length: int,
    tunables: Callable[[], Mapping[str, Tensor]],
) -> AskedGenerator:
    """The generator of a node that holds all of it in a stage.

    Args:
        tunables: of now.

    Raises:
        CheckpointError: if the model draws no pictures.
    """
    modules = load_modules(folder)
    model, segment = stage.model.whole, whole_segment(stage.model.whole.config)
    return AskedGenerator(
        modules,
        PairModel(model, modules.tokenizer, modules.images),
        context.worker,
        length=length,
        begin=lambda: stage.begin(tunables()),
        count=lambda number: context.worker.meter.add_flops(forward_flops(shape, segment, number)),
    )


async def compare_crossings(
    context: NodeContext, cloud_id: str, folder: Path, recipe: recipes.Recipe, publish: Callable[[CrossingRecord], None]
) -> None:
    """Ask for so many pictures as the recipe says, and what each shows, in tokens and in pictures; publish each record.

    Captions are of all ten digits, whatever the edge knows, and what is described is what was drawn: so the questions
    tell nothing of the edge. Where something fails, there are fewer records: a run does not end for a measurement.
    """
    link = recipes.build_topology(recipe.topology).link(context.node_id, cloud_id)
    assert link is not None
    try:
        modules = await context.worker.compute(load_modules, folder)
        front = Front(context.node_id, cloud_id, modules, context.worker, context.transport, link)
        for number in range(recipe.evaluation.crossings):
            for record in await _both(front, number):
                publish(record)
    except EcoGenError as problem:
        logger.warning("not all pictures were asked for: %s", problem)


async def _both(front: Front, number: int) -> list[CrossingRecord]:
    """One picture drawn and described both ways, which take turns in being the first."""
    records = list[CrossingRecord]()
    caption, picture = Told(text=digit_caption(number % len(DIGITS))), Told()
    ways: tuple[Crossing, ...] = ("pictures", "tokens") if number % 2 else ("tokens", "pictures")
    for crossing in ways:
        request_id = f"{front.node_id}-crossing-{number}"
        picture, drawn = await front.ask(request_id, "draw", caption, number, crossing)
        _, described = await front.ask(request_id, "describe", picture, number, crossing)
        records += [drawn, described]
    return records
