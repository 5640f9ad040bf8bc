"""What the command line does with federations: run one with progress, leave one in the background, ask one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from ecogen import config as recipes
from ecogen.engines.attached import attach, operator_of
from ecogen.engines.books import read_books
from ecogen.engines.check import check_recipe
from ecogen.engines.federation import Federation, ask_status
from ecogen.engines.forming import formed
from ecogen.engines.launch import launch, serve
from ecogen.engines.progress import RunProgress
from ecogen.engines.run_folder import (
    NODES,
    RECIPE,
    RUNNING,
    SUMMARY,
    begin_run,
    check_free,
    check_run,
    is_running,
    load_recipe,
    locked,
    resume_command,
)
from ecogen.engines.saving import RECORDS, REPORT, load_records
from ecogen.errors import DataError, RunError, TransportError
from ecogen.node.context import ProgressReport
from ecogen.node.device import Asked
from ecogen.node.presence import Presence
from ecogen.node.status import Status
from ecogen.records import RoundRecord
from ecogen.reports.console import NodeStatus, show_served, show_status
from ecogen.reports.summary import Summary
from ecogen.storage import write_atomically
from ecogen.topology import Topology


async def run(recipe: recipes.Recipe, folder: Path, *, resume: bool, screen: Console) -> Summary:
    """A whole run, with progress on `screen`; returns the figures.

    Raises:
        EcoGenError: what a user can act on; the run can be resumed if it had begun.
    """
    recipe = formed(recipe)
    check_run(folder, recipe, resume=resume)
    check_recipe(recipe)
    with locked(folder), ended_in_order():
        begin_run(folder, recipe, resume=resume)
        async with launch(recipe, folder=folder) as federation:
            remember(folder, federation.cloud_address)
            return await _watch_and_save(federation, folder, screen)


async def watch(cloud_id: str, address: str, certificates: Path, folder: Path, *, screen: Console) -> Summary:
    """Watch a federation that others started until it has finished, and write its run folder; returns the figures.

    Raises:
        EcoGenError: what a user can act on; the federation goes on, and may be watched again.
    """
    async with attach(cloud_id, address, certificates) as federation:
        check_free(folder)
        with locked(folder), ended_in_order():
            return await _watch_and_save(federation, folder, screen)


async def _watch_and_save(federation: Federation, folder: Path, screen: Console) -> Summary:
    with RunProgress(federation.recipe, screen) as progress:
        async for record in federation.watch(progress.report):
            progress.show(record)
        progress.report(ProgressReport("saving", 0, 1))
        return await federation.save(folder)


async def status(folder: Path) -> list[RenderableType]:
    """How a run is, in lines to print; of a folder that holds several, each.

    Raises:
        RunError: if the folder holds no run.
    """
    if several := _runs_in(folder):
        return [line for run_folder in several for line in await status(run_folder)]
    recipe = load_recipe(folder)
    live = await _live_status(folder) if is_running(folder) else None
    if live is not None:
        return _live_lines(str(folder), live)
    if recipe.task == "serve":
        return [f"{folder}: {'running' if is_running(folder) else 'ended'}", show_served(read_books(folder))]
    return [_resting_line(folder)]


async def status_of_cloud(cloud_id: str, address: str, certificates: Path) -> list[RenderableType]:
    """How a federation is whose nodes were started by hand, in lines to print.

    Raises:
        AuthenticationError, NodeLostError: as `operator_of`.
    """
    async with operator_of(cloud_id, address, certificates) as (_, live):
        return _live_lines(f"{cloud_id}@{address}", live)


def _live_lines(name: str, live: Status) -> list[RenderableType]:
    recipe = recipes.from_table(live.recipe, f"the recipe of {name}")
    topology = recipes.build_topology(recipe.topology)
    progress = live.progress
    state = "finished, and saving" if live.finished else "running"
    where = f"{progress.phase} {progress.done}/{progress.total} {progress.detail}".rstrip()
    line = f"{name}: {state}; {where}; {live.num_records} records"
    nodes = show_status([_node_status(node, topology, live.time_s) for node in live.presences])
    return [line, nodes, *([show_served(live.served)] if live.served else [])]


def _runs_in(folder: Path) -> list[Path]:
    """The run folders in a folder that is none itself."""
    if (folder / RECIPE).exists():
        return []
    found = [*folder.glob(f"*/{RECIPE}"), *folder.glob(f"runs/*/*/{RECIPE}")]  # the latter are a study's
    return sorted(path.parent for path in found)


async def predict(folder: Path, images: Sequence[Path], engine: str, edge: str | None = None) -> tuple[Asked, Topology]:
    """What the tuned model of a run says of pictures, through the split chain.

    Raises:
        DataError: if a picture cannot be read.
        RunError, CheckpointError: if the run has not finished or is damaged.
    """
    if missing := [str(path) for path in images if not path.is_file()]:
        raise DataError(f"no such file: {', '.join(missing)}; give PNG files")
    data = load_recipe(folder).data
    if data.is_pairs:
        said = "draw with `ecogen generate`, or ask what a picture shows with `ecogen serve`"
        raise RunError(f"{folder} holds a generator, which classifies nothing; {said}")
    if data.is_text:
        raise RunError(f"{folder} holds a model whose inputs are text, not pictures; ask it with `ecogen serve`")
    async with serve(folder, engine, edge=edge) as federation:
        start_id = next(iter(federation.topology.clusters.values())).node_ids[0]
        return await federation.ask(start_id, images), federation.topology


def prediction_table(images: Sequence[Path], asked: Asked) -> dict[str, Any]:
    """An answer as plain values."""
    import msgspec

    answers = zip(images, asked.labels, asked.probabilities, strict=True)
    predictions = [{"image": str(path), "label": label, "probability": p} for path, label, p in answers]
    record = msgspec.to_builtins(asked.record)
    return {"predictions": predictions, "latency_s": asked.record.latency_s, "record": record}


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end this task as Ctrl-C does, so that what it started is ended in order."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    names = [name for name in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(name) is signal.SIG_DFL]
    for name in names:
        loop.add_signal_handler(name, task.cancel)
    try:
        yield
    finally:
        for name in names:
            loop.remove_signal_handler(name)


def remember(folder: Path, cloud_address: str) -> None:
    """Let others who know the folder find its cloud while this process runs."""
    write_atomically(folder / RUNNING, json.dumps({"pid": os.getpid(), "cloud": cloud_address}))


async def _live_status(folder: Path) -> Status | None:
    """What the cloud of a run says; None if it does not answer, or lives within another process."""
    try:
        running = json.loads((folder / RUNNING).read_text())
        return await asyncio.wait_for(ask_status(folder, running["cloud"]), 10)
    except (OSError, ValueError, KeyError, TransportError, TimeoutError):
        return None


def _resting_line(folder: Path) -> str:
    """What the folder alone tells."""
    log = folder / NODES / "cloud" / RECORDS
    records = f"records so far are in {log}" if log.exists() else "no records yet"
    if is_running(folder):
        return f"{folder}: running, and its cloud does not answer from outside its process; {records}"
    if (folder / SUMMARY).exists():
        rounds = {r.round_index for r in load_records(folder) if isinstance(r, RoundRecord)}
        return f"{folder}: finished after {len(rounds)} rounds; see {folder / REPORT}"
    return f"{folder}: not finished, and nobody is running it; {records}; go on with `{resume_command(folder)}`"


def _node_status(node: Presence, topology: Topology, now_s: float) -> NodeStatus:
    heard_s = max(0.0, now_s - node.time_s) if node.time_s else None
    return NodeStatus(node.node_id, topology.nodes[node.node_id].tier, node.state, node.round_index, heard_s)
