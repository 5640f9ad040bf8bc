"""Progress on a screen: bars, with what is being done and the time left, and a line for what is worth one."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ecogen import config as recipes
from ecogen.node.context import ProgressReport
from ecogen.records import EventRecord, PhaseRecord, Record, RelayRecord, RoundRecord
from ecogen.reports.console import delivered_line, lesson_line, round_line


class PhaseProgress:
    """A bar for each phase, one after the other."""

    def __init__(self, screen: Console) -> None:
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
        )
        self._bars = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
        self._task = self._bars.add_task("starting", total=None, detail="")
        self._phase = ""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show_phase(self, phase: str, done: int, total: int, detail: str) -> None:
        """Show how far a phase is."""
        self._enter(phase, total)
        self._bars.update(self._task, completed=done, total=total, detail=detail)

    def _enter(self, phase: str, total: int) -> None:
        if phase != self._phase:
            self._phase = phase
            if not self._bars.console.is_terminal:
                self._bars.console.print(phase)  # where no bar shows it
            self._bars.reset(self._task, description=phase, total=total, detail="")


class RunProgress(PhaseProgress):
    """The phase, the round, and the time left; and a line for each round and event."""

    def __init__(self, recipe: recipes.Recipe, screen: Console) -> None:
        super().__init__(screen)
        self._rounds = recipe.tuning.rounds
        self._edges = recipe.topology.edges

    def report(self, progress: ProgressReport) -> None:
        """Show how far a phase is, other than tuning, which its records show."""
        if progress.phase != "tuning":
            self.show_phase(progress.phase, progress.done, progress.total, progress.detail)

    def show(self, record: Record) -> None:
        """Show a record that tells something to people."""
        if isinstance(record, RoundRecord):
            self._enter("tuning", self._rounds * self._edges)
            if record.loss is not None or record.epsilon is not None:  # an edge's
                self._bars.update(self._task, advance=1, detail=f"round {record.round_index + 1} of {self._rounds}")
            self._bars.console.print(round_line(record, self._rounds))
        elif isinstance(record, RelayRecord):
            self._bars.console.print(lesson_line(record))
        elif isinstance(record, PhaseRecord) and record.perplexity is not None:
            self._bars.console.print(delivered_line(record))
        elif isinstance(record, EventRecord) and record.event not in ("joined", "finished"):
            self._bars.console.print(f"{record.event}: {record.node_id}: {record.detail}", style="yellow", markup=False)
