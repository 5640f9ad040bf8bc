"""The verb for smaller models that a run's generator teaches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from ecogen.cli.application import app, screen
from ecogen.cli.runs import RunFolder

if TYPE_CHECKING:
    from ecogen.engines.teaching import TaughtStudent
    from ecogen.relay.examination import Scores


@app.command()
def teach(
    run_folder: RunFolder,
    student: Annotated[
        Literal["decoder", "classifier"],
        typer.Option(help="A smaller generator, or a vision transformer that names what it sees."),
    ] = "decoder",
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", show_default="RUN/students/STUDENT", help="The student's folder.")
    ] = None,
    captions: Annotated[
        list[str] | None,
        typer.Option(
            "--caption",
            metavar="TEXT",
            show_default="all that edges taught the cloud",
            help='What to teach, say "a handwritten seven"; repeatable.',
        ),
    ] = None,
    edge: Annotated[
        str | None, typer.Option(metavar="EDGE_ID", show_default="the cloud's", help="Whose model teaches.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, max=50_000, show_default="10000", help="Pictures that it learns from, at most."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, show_default="2000; of a classifier 1800", help="Of 64 pictures or passages.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same gives the same student.")] = 0,
    judge: Annotated[bool, typer.Option(help="Judge student and teacher with the run's real test pairs.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Teach a smaller model by what a run's generator draws.

    The student is made anew and learns from drawings alone. A decoder is served and drawn with like any model.
    """
    from ecogen.engines.progress import PhaseProgress
    from ecogen.engines.teaching import STUDENT, StudentSpec, teach_student

    spec = StudentSpec(student, captions or (), samples, edge, steps, seed, judge)
    folder = out or run_folder / "students" / student
    try:
        with PhaseProgress(screen) as progress:
            taught = teach_student(run_folder, folder, spec, progress.show_phase)
    except KeyboardInterrupt:
        saved = f"the student is in {folder}, not judged" if (folder / STUDENT).exists() else "nothing was written"
        screen.print(f"interrupted; {saved}", style="yellow", soft_wrap=True, markup=False)
        raise typer.Exit(130) from None
    if taught.unknown:
        unknown = ", ".join(map(repr, taught.unknown))
        screen.print(f"not taught, since the teacher does not know them: {unknown}", style="yellow", markup=False)
    if judge and not taught.scores:
        screen.print("not judged, since no test pair of the run has these captions", style="yellow")
    if as_json:
        print(json.dumps({"folder": str(taught.folder), **taught.table()}))
        return
    _show(taught)


def _show(taught: TaughtStudent) -> None:
    from ecogen.reports.console import show_table
    from ecogen.reports.wording import format_grams
    from ecogen.units import format_joules, format_seconds

    smaller = taught.num_teacher_parameters / taught.num_parameters
    size = f"{taught.num_parameters:,} parameters, {smaller:.1f} times smaller than its teacher"
    print(f"{taught.folder}: a {taught.spec.kind} of {size}, taught by {taught.num_drawings:,} drawings")
    if taught.scores:
        Console().print(show_table(_scores(taught)))
    took = f"{format_seconds(taught.usage.wall_s)}, {format_joules(taught.bill.energy_j.mid)}"
    print(f"teaching took {took} and {format_grams(taught.bill.emissions_g.mid)} CO2e, modelled")
    if taught.spec.kind == "decoder":
        print(f'draw with it: ecogen generate {taught.folder} "{taught.captions[0]}"')


def _scores(taught: TaughtStudent) -> Any:
    from ecogen.reports.tables import Column, Table, word
    from ecogen.reports.wording import DASH, format_share

    def row(name: str, scores: Scores) -> tuple[str, ...]:
        drawn = f"{format_share(scores.recognised)} of {scores.num_drawn}" if scores.num_drawn else DASH
        return name, drawn, f"{format_share(scores.captions_right)} of {scores.num_tests}"

    columns = word("of"), Column("drawings recognised"), Column("real test pairs described right")
    return Table("Judged by real pairs", columns, tuple(row(*one) for one in taught.scores.items()))
