"""The books of what was served: handed in by edges, kept in the folder of `ecogen serve --out`, read again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

from ecogen import config as recipes
from ecogen.engines.run_folder import NODES, RECIPE, load_recipe, write_recipe
from ecogen.engines.saving import RECORDS
from ecogen.errors import RunError
from ecogen.node.context import BOOKS
from ecogen.records import read_records
from ecogen.reports.served import ServedSummary, summarise_served
from ecogen.storage import read_lines
from ecogen.transport.base import Message, Transport

_HAND_IN_S = 4.0


async def hand_in_books(transport: Transport, edge_ids: Iterable[str]) -> None:
    """Have every edge that answers write down what it has served since the last time."""
    ask = Message.of(BOOKS, counted=False)
    calls = [transport.call(edge_id, ask, timeout_s=_HAND_IN_S) for edge_id in edge_ids]
    await asyncio.gather(*calls, return_exceptions=True)  # who is away does so when it is time


def begin_books(folder: Path, recipe: recipes.Recipe) -> None:
    """Make a folder one that `ecogen serve` may keep its nodes' disks and its books in, or go on with it.

    Raises:
        RunError: if it holds something else.
        StorageError: if it cannot be written.
    """
    if (folder / RECIPE).exists():
        old = load_recipe(folder)
        if (old.task, old.topology) != (recipe.task, recipe.topology):
            raise RunError(f"{folder} holds a run or other nodes than these; choose another folder with --out")
    write_recipe(folder, recipe)


def read_books(folder: Path) -> ServedSummary:
    """What was served from a folder.

    Raises:
        RunError: if the records are damaged.
    """
    path = folder / NODES / "cloud" / RECORDS
    topology = recipes.build_topology(load_recipe(folder).topology)
    return summarise_served(read_records(read_lines(path), str(path)), topology)
