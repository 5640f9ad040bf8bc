"""Whose a run folder is: it begins or resumes one run, and one process at a time writes into it. Imports no torch."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ecogen import config as recipes
from ecogen.errors import ConfigError, RunError, StorageError
from ecogen.reports.toml import to_toml
from ecogen.storage import append_line, make_folder, read_lines, write_atomically

RECIPE, RECIPE_TOML, LOCK, RUNNING = "recipe.json", "recipe.toml", ".lock", "running.json"
MOST_TOLD = 5
"""Differences between recipes that an error names."""

NODES, LAUNCHES, SUMMARY = "nodes", "launches.jsonl", "summary.json"


def check_run(folder: Path, recipe: recipes.Recipe, *, resume: bool) -> None:
    """Check that a run may begin in the folder, or go on there; writes nothing.

    Raises:
        RunError: if there is a run already and it is not to be resumed, or it is of another recipe.
    """
    if not resume:
        check_free(folder)
        return
    if is_running(folder):
        raise _busy(folder)
    if not (folder / RECIPE).exists():
        raise RunError(f"{folder} holds no run to resume; leave --resume out to begin one there")
    if _is_of_others(folder):
        raise RunError(f"{folder} holds a finished run without its nodes' disks; there is nothing to go on with")
    check_same(recipe, folder)


def check_free(folder: Path) -> None:
    """Check that the folder holds no run.

    Raises:
        RunError: if it does.
    """
    if is_running(folder):
        raise _busy(folder)
    if not (folder / RECIPE).exists():
        return
    going_on = "" if _is_of_others(folder) else f", or go on with that run: `{resume_command(folder)}`"
    raise RunError(f"{folder} holds a run already; choose another folder with --out{going_on}")


def begin_run(folder: Path, recipe: recipes.Recipe, *, resume: bool) -> None:
    """Make the run folder what it is by writing the recipe; the process holds its lock.

    Raises:
        RunError: as `check_run`.
        StorageError: if the disk is full.
    """
    if resume:
        check_same(recipe, folder)
    write_recipe(folder, recipe)
    append_line(folder / LAUNCHES, json.dumps({"time_s": time.time()}).encode() + b"\n")


def write_recipe(folder: Path, recipe: recipes.Recipe) -> None:
    """The resolved recipe, for programs and for people."""
    table = recipes.to_table(recipe)
    write_atomically(folder / RECIPE_TOML, to_toml(table))
    write_atomically(folder / RECIPE, json.dumps(table, indent=2))


def earlier_s(folder: Path, times_s: Sequence[float]) -> float:
    """How long a resumed run went on before it was resumed last, each time until the last record of it.

    Args:
        times_s: of all its records.
    """
    launches: list[float] = [json.loads(line)["time_s"] for line in read_lines(folder / LAUNCHES)]
    ends = [max([time_s for time_s in times_s if time_s < later], default=0.0) for later in launches[1:]]
    return sum(max(0.0, end - began) for began, end in zip(launches[:-1], ends, strict=True))


def check_same(recipe: recipes.Recipe, folder: Path) -> None:
    """A run is resumed with its own recipe; only what changes no result may be another, and the rounds be more.

    Raises:
        RunError: with what differs.
    """
    new, old = recipes.to_table(recipe), recipes.to_table(load_recipe(folder))
    old["tuning"]["rounds"] = max(old["tuning"]["rounds"], new["tuning"]["rounds"])
    for table in (new, old):
        for key in ("engine", "name", "transport"):
            table.pop(key, None)
    if different := list(_differences(new, old)):
        more = "" if len(different) <= MOST_TOLD else f", and {len(different) - MOST_TOLD} more"
        raise RunError(
            f"{folder} holds a run of another recipe: {', '.join(different[:MOST_TOLD])}{more}; "
            f"resume with `{resume_command(folder)}`"
        )


def _differences(new: Mapping[str, Any], old: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """What differs, with both values, such as "seed is 0 there and 1 here"."""
    for key in dict.fromkeys([*old, *new]):
        ours, theirs = new.get(key), old.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _differences(ours, theirs, f"{place}{key}.")
        elif ours != theirs:
            yield f"{place}{key} is {_told(theirs)} there and {_told(ours)} here"


def _told(value: Any) -> str:
    return "not set" if value is None else repr(value)


def load_recipe(folder: Path) -> recipes.Recipe:
    """The resolved recipe of a run folder.

    Raises:
        RunError: if there is none, or it is damaged.
    """
    path = folder / RECIPE
    try:
        return recipes.from_table(json.loads(path.read_text()), str(path))
    except FileNotFoundError as problem:
        raise RunError(f"{folder} is no run folder: it has no {RECIPE}; give one that `ecogen run` wrote") from problem
    except ConfigError as problem:
        raise RunError(
            f"{folder} was written by a version of EcoGen with other settings; use that version, or run anew. {problem}"
        ) from problem
    except (OSError, ValueError) as problem:
        raise RunError(
            f"{path} cannot be read ({problem}); restore it: {RECIPE_TOML} beside it says the same in TOML"
        ) from problem


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process a run folder; the system unlocks it when that process ends, however it ends.

    Raises:
        RunError: if another process has it.
        StorageError: if it cannot be locked.
    """
    try:
        lock = (make_folder(folder) / LOCK).open("w")
    except OSError as problem:
        raise StorageError(f"cannot write into {folder}: {problem.strerror}; free some space") from problem
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(folder) from None
        try:
            yield
        finally:
            (folder / RUNNING).unlink(missing_ok=True)


def is_running(folder: Path) -> bool:
    """Whether a process has the folder."""
    try:
        with (folder / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def check_ended(folder: Path) -> None:
    """Refuse a run whose outcome is not there yet; of a folder that holds no run, nothing is said.

    Raises:
        RunError: if it is going on, or was cut off; with what to do.
    """
    if is_running(folder):
        raise RunError(f"{folder} belongs to a run that is going on; wait for its end: `ecogen status {folder}`")
    if (folder / RECIPE).exists() and not (folder / SUMMARY).exists():
        raise RunError(f"{folder} holds a run that has not finished; go on with it: `{resume_command(folder)}`")


def resume_command(folder: Path) -> str:
    """How to go on with a run."""
    return f"ecogen run {folder / RECIPE_TOML} --out {folder} --resume"


def _is_of_others(folder: Path) -> bool:
    """Whether the run's nodes were elsewhere, as with `ecogen watch`."""
    return (folder / SUMMARY).exists() and not (folder / NODES).exists()


def _busy(folder: Path) -> RunError:
    return RunError(f"{folder} belongs to a run that is going on; see `ecogen status {folder}`")
