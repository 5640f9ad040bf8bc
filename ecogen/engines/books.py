"""The books of what was served, in the folder of `ecogen serve --out`."""

from __future__ import annotations

from pathlib import Path

from ecogen import config as recipes
from ecogen.engines.run_folder import NODES, RECIPE, load_recipe, write_recipe
from ecogen.engines.saving import RECORDS
from ecogen.errors import RunError
from ecogen.records import read_records
from ecogen.reports.served import ServedSummary, summarise_served
from ecogen.storage import read_lines


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
