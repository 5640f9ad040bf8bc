"""A study's folder: every run of the table in a folder of its own, several at once, and what they show together.

study.json     the rows with their recipes
runs/          one run folder a row and seed
table.json     the figures of `ecogen run --json`
report.html    plot and tables, made anew whenever a run ends
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ecogen import config as recipes
from ecogen.engines import detached
from ecogen.engines.background import why
from ecogen.engines.check import check_recipe
from ecogen.engines.forking import fork_server, heed_sigterm
from ecogen.engines.run_folder import RECIPE, SUMMARY, check_same, is_running, locked
from ecogen.engines.saving import REPORT
from ecogen.engines.session import ended_in_order
from ecogen.errors import ConfigError, RunError
from ecogen.node.process import log_to
from ecogen.reports.console import accuracy_line
from ecogen.reports.study import Scores, StudySummary, summarise_study
from ecogen.reports.study_page import write_study
from ecogen.reports.summary import Summary
from ecogen.storage import make_folder, write_atomically
from ecogen.tuning.classical import classical_accuracies
from ecogen.tuning.foundation import foundation_folder, obtain_foundation

_JOIN_S = 0.5

STUDY, TABLE, BESIDE, RUNS, LOG, ASKED = "study.json", "table.json", "beside.json", "runs", "run.log", "asked.json"


class Run(NamedTuple):
    """One row with one seed, in its folder."""

    row: recipes.Row
    seed: int
    folder: Path

    @property
    def recipe(self) -> recipes.Recipe:
        return replace(self.row.recipe, seed=self.seed)

    @property
    def has_finished(self) -> bool:
        return (self.folder / SUMMARY).exists() and (not self.row.case.beside or (self.folder / BESIDE).exists())


async def run_study(study: recipes.Study, folder: Path, *, resume: bool, at_once: int, screen: Console) -> StudySummary:
    """Carry out every run that has not finished, `at_once` at a time; returns the figures of all.

    Raises:
        RunError: if the folder is another study's, or a run fails; --resume goes on with the others.
        EcoGenError: what keeps a row from being carried out, before anything is started.
    """
    study = replace(study, rows=tuple(replace(row, recipe=check_recipe(row.recipe)) for row in study.rows))
    check_study(study, folder, resume=resume)
    runs, slots = runs_of(study, folder), asyncio.Semaphore(at_once)
    with locked(folder), ended_in_order(), _Bars(len(runs), screen) as bars:
        write_atomically(folder / STUDY, json.dumps(_table(study), indent=2))
        await asyncio.to_thread(_obtain_foundations, study, bars)

        async def carry_out(run: Run) -> None:
            async with slots:
                await _carry_out(run, bars)
                conclude(study, folder)

        try:
            async with asyncio.TaskGroup() as group:
                for run in runs:
                    group.create_task(carry_out(run))
        except ExceptionGroup as problems:
            raise problems.exceptions[0] from None
    return conclude(study, folder)


def check_study(study: recipes.Study, folder: Path, *, resume: bool) -> None:
    """Check that a study may begin in the folder, or go on there; writes nothing.

    Raises:
        RunError: if it may not.
    """
    path = folder / STUDY
    if (folder / RECIPE).exists() or (path.exists() and not resume):
        raise RunError(f"{folder} holds runs already; choose another folder with --out, or add --resume to go on")
    if resume and not path.exists():
        raise RunError(f"{folder} holds no study to resume; leave --resume out to begin one there")
    if resume and _read_study(folder) != _table(study):
        raise RunError(f"{folder} holds a study of other recipes; give the same ones, or another folder with --out")
    for run in runs_of(study, folder):
        if (run.folder / RECIPE).exists():
            check_same(run.recipe, run.folder)


def runs_of(study: recipes.Study, folder: Path) -> list[Run]:
    """Every run, seed by seed, so that a study that is cut short has some of every row."""
    return [
        Run(row, seed, folder / RUNS / row.slug / f"seed-{seed}") for seed in study.sweep.seeds for row in study.rows
    ]


def load_saved(folder: Path) -> recipes.Study:
    """The study of a folder.

    Raises:
        RunError: if study.json is damaged.
    """
    table = _read_study(folder)
    try:
        sweep = recipes.section_from_table(recipes.Sweep, table["sweep"])
        rows = [recipes.Row(case, recipes.from_table(table["rows"][case.name])) for case in sweep.cases]
        return recipes.Study(table["name"], sweep, tuple(rows))
    except (KeyError, TypeError, ValueError, ConfigError) as problem:
        raise _damaged(folder, f"{type(problem).__name__}: {problem}") from problem


def conclude(study: recipes.Study, folder: Path) -> StudySummary:
    """Write table.json and report.html from the runs that have finished."""
    finished = [run for run in runs_of(study, folder) if run.has_finished]
    summaries: dict[tuple[str, int], Summary] = {_key(run): _read(run.folder / SUMMARY) for run in finished}
    beside: dict[tuple[str, int], Scores] = {
        _key(run): _read(run.folder / BESIDE) for run in finished if run.row.case.beside
    }
    summary = summarise_study(study, summaries, beside)
    write_atomically(folder / TABLE, json.dumps(summary, indent=2))
    write_study(folder / REPORT, summary)
    return summary


async def _carry_out(run: Run, bars: _Bars) -> None:
    # A study that was killed leaves its last runs to end by themselves, and they have no event to wait for.
    while is_running(run.folder):  # noqa: ASYNC110
        await asyncio.sleep(1)
    if not run.has_finished:
        name = f"{run.row.case.name}, seed {run.seed}"
        bars.begin(name)
        make_folder(run.folder)
        if not (run.folder / SUMMARY).exists():
            await _run_apart(run, name)
        if run.row.case.beside:
            accuracies = await asyncio.to_thread(classical_accuracies, run.recipe)
            write_atomically(run.folder / BESIDE, json.dumps(accuracies))
        bars.end(name, _read(run.folder / SUMMARY))
    bars.count()


async def _run_apart(run: Run, name: str) -> None:
    """The run in a process of its own, which ends with this task.

    Raises:
        RunError: if it fails.
    """
    write_atomically(run.folder / ASKED, json.dumps(recipes.to_table(run.recipe)))
    arguments = [str(run.folder / ASKED), str(run.folder), *["--resume"] * (run.folder / RECIPE).exists()]
    process = fork_server().Process(target=_be_the_run, args=(arguments, run.folder / LOG), name=name)
    await asyncio.to_thread(process.start)
    try:
        while process.is_alive():
            await asyncio.to_thread(process.join, _JOIN_S)
    finally:
        process.terminate()
        process.join()
    if process.exitcode:
        raise RunError(f"{name}: {why(run.folder / LOG)}; mend it, then --resume")


def _be_the_run(arguments: list[str], log: Path) -> None:
    """The main function of a run's process."""
    heed_sigterm()
    log.unlink(missing_ok=True)
    log_to(log)
    sys.exit(detached.main(arguments))


def _obtain_foundations(study: recipes.Study, bars: _Bars) -> None:
    """Make the foundation models that are not cached, before several runs would all begin to."""
    wanted = {str(foundation_folder(row.recipe)): row.recipe for row in study.rows}
    for recipe in wanted.values():
        if recipe.model.source in recipes.MADE_HERE:
            obtain_foundation(recipe, lambda phase, step, total, _: bars.pretrain(phase, step, total))


def _key(run: Run) -> tuple[str, int]:
    return run.row.case.name, run.seed


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise RunError(f"{path} cannot be read ({problem}); remove {path.parent} and --resume") from problem


def _read_study(folder: Path) -> Any:
    try:
        return json.loads((folder / STUDY).read_text())
    except (OSError, ValueError) as problem:
        raise _damaged(folder, problem) from problem


def _damaged(folder: Path, problem: object) -> RunError:
    return RunError(
        f"{folder / STUDY} does not say what the study is ({problem}); "
        f"remove that file, then run the recipe again with --out {folder}: the runs in it are used"
    )


def _table(study: recipes.Study) -> dict[str, Any]:
    """What the study is, as plain values."""
    rows = {row.case.name: recipes.to_table(row.recipe) for row in study.rows}
    return {"name": study.name, "sweep": recipes.section_table(study.sweep), "rows": rows}


class _Bars:
    """Progress: runs done, which are going on, and the time left."""

    def __init__(self, num_runs: int, screen: Console) -> None:
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[detail]}"),
        )
        self._bars = Progress(*columns, console=screen, transient=True, speed_estimate_period=3600)
        self._num_runs = num_runs
        self._task = self._bars.add_task("runs", total=num_runs, detail="")
        self._pretraining: TaskID | None = None
        self._going_on: list[str] = []

    def __enter__(self) -> _Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def pretrain(self, phase: str, step: int, total: int) -> None:
        """Called from another thread, which rich allows."""
        if self._pretraining is None:
            self._pretraining = self._bars.add_task("pretraining", total=total, detail=phase)
        self._bars.update(self._pretraining, completed=step, total=total, detail=phase)

    def begin(self, name: str) -> None:
        self._going_on.append(name)
        self._show()

    def end(self, name: str, summary: Summary) -> None:
        self._going_on.remove(name)
        self._bars.console.print(f"{name}: {accuracy_line(summary)}", highlight=False, markup=False)
        self._show()

    def count(self) -> None:
        """One more run is there."""
        self._bars.update(self._task, advance=1)

    def _show(self) -> None:
        self._bars.update(self._task, detail="; ".join(self._going_on))
