"""The verbs for runs: tune, plan, show, ask."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ecogen import config as recipes
from ecogen.cli.application import EngineName, Settings, app, existing, plain, screen
from ecogen.errors import RunError

if TYPE_CHECKING:
    from ecogen.reports.summary import Summary

RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", callback=existing, help="A run folder, as `ecogen run` wrote it.")
]


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A built-in recipe's name, or a TOML file.")],
    engine: Annotated[EngineName | None, typer.Option(help="All nodes in this process, or a process a node.")] = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run folder; default runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last finished round.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Leave it running in the background.")] = False,
    at_once: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of a study, runs at a time; default one a core.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object at the end.")] = False,
) -> None:
    """Tune a model, and write a run folder with a report.

    A recipe with a [sweep], such as table3, is a study: many runs, and one table.
    """
    overrides = [*(settings or []), *([f"engine={engine}"] if engine else [])]
    study = recipes.load_study(recipe, overrides)
    if study is not None:
        _run_study(study, out or Path("runs") / study.name, resume, detach, at_once, as_json)
        return
    resolved = recipes.load(recipe, overrides)
    folder = out or Path("runs") / resolved.name
    if detach:
        from ecogen.engines import background

        background.detach(resolved, folder, resume=resume)
        print(f"runs in the background; look at it with: ecogen status {folder}")
        return
    show_run(_run_here(resolved, folder, resume), folder, as_json)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A built-in recipe's name, or a TOML file.")],
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the placement as one JSON object.")] = False,
) -> None:
    """Show where a recipe puts its model, and why, running nothing.

    Forms the clusters of a pool of devices, says what each device holds, takes and needs, and why some are left out.
    """
    from ecogen.engines.forming import announced_shape, formed
    from ecogen.reports.placement import placement_line, placement_tables, summarise_placement

    resolved = formed(recipes.load(recipe, settings or []))
    summary = summarise_placement(resolved, announced_shape(resolved))
    if as_json:
        print(json.dumps(summary))
        return
    from ecogen.reports.console import show_table

    for table in placement_tables(summary):
        Console().print(show_table(table))
    Console().print(placement_line(summary), markup=False, highlight=False)


@app.command()
def report(
    run_folder: RunFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Make report.html anew from a run's records.

    Of a folder of `ecogen serve --out`, show what was served.
    """
    from ecogen.engines.run_folder import load_recipe
    from ecogen.engines.saving import REPORT, rebuild_report
    from ecogen.engines.study import STUDY, conclude, load_saved

    is_study = (run_folder / STUDY).exists()
    if not is_study and load_recipe(run_folder).task == "serve":
        _show_served(run_folder, as_json)
        return
    summary = conclude(load_saved(run_folder), run_folder) if is_study else rebuild_report(run_folder)
    print(json.dumps(summary) if as_json else f"report: {run_folder / REPORT}")


@app.command()
def predict(
    run_folder: RunFolder,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="PNG files.")],
    engine: Annotated[EngineName, typer.Option(help="All nodes in this process, or a process a node.")] = "inproc",
    edge: Annotated[
        str | None, typer.Option(metavar="EDGE_ID", help="Whose model, where the edges know different labels.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as one JSON object.")] = False,
) -> None:
    """Classify pictures through the split chain.

    Tells what each device computed, what crossed each link, and how long it took.
    """
    from ecogen.engines import session

    asked, topology = asyncio.run(session.predict(run_folder, images, engine, edge))
    if as_json:
        print(json.dumps(session.prediction_table(images, asked)))
        return
    from ecogen.reports.console import show_request

    for path, label, probability in zip(images, asked.labels, asked.probabilities, strict=True):
        print(f"{path}: {label} ({probability:.1%})")
    Console().print(show_request(asked.record, topology))


@app.command()
def generate(
    run_folder: RunFolder,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help='What to draw, say "a handwritten seven".')],
    number: Annotated[int, typer.Option("--n", metavar="N", min=1, max=256, help="How many pictures.")] = 1,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The PNG file with all of them.")] = Path("drawn.png"),
    edge: Annotated[
        str | None, typer.Option(metavar="EDGE_ID", help="Whose model, where each edge has its own.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, show_default="0.4", help="0 draws the likeliest always.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=-(2**63), max=2**63 - 1, help="The same gives the same pictures.")
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="All nodes in this process, or a process a node.")] = "inproc",
    as_json: Annotated[bool, typer.Option("--json", help="Print what it took as one JSON object.")] = False,
) -> None:
    """Draw pictures with a run's text-image generator.

    Through the split chain, as `ecogen serve` does.
    """
    if out.suffix.lower() != ".png" or out.is_dir():
        better = out / "drawn.png" if out.is_dir() else out.with_suffix(".png")
        raise typer.BadParameter(f"{out} is to be a PNG file; call it {better}", param_hint="'--out'")
    from ecogen.engines.generating import generate as draw
    from ecogen.models.pair_tokens import TEMPERATURE
    from ecogen.serving.sampling import Sampling
    from ecogen.storage import write_atomically

    sampling = Sampling(temperature=TEMPERATURE if temperature is None else temperature, seed=seed)
    drawn = asyncio.run(draw(run_folder, prompt, number, sampling=sampling, edge=edge, engine=engine))
    write_atomically(out, drawn.sheet)
    table = {
        "file": str(out),
        "model": drawn.model,
        "n": number,
        "t_inference_s": drawn.t_inference_s,
        "energy_j": drawn.bill.energy_j.mid,
        "emissions_g": drawn.bill.emissions_g.mid,
    }
    if as_json:
        print(json.dumps(table))
        return
    from ecogen.reports.wording import format_grams
    from ecogen.units import format_joules, format_seconds

    took = f"{format_seconds(drawn.t_inference_s)}, {format_joules(drawn.bill.energy_j.mid)}"
    print(f"{out}: {number} by {drawn.model}; {took} and {format_grams(drawn.bill.emissions_g.mid)} CO2e, modelled")


def _show_served(folder: Path, as_json: bool) -> None:
    from ecogen.engines.books import read_books
    from ecogen.reports.console import show_served

    summary = read_books(folder)
    if as_json:
        print(json.dumps(plain(summary)))
    else:
        Console().print(show_served(summary))


def _run_study(
    study: recipes.Study, folder: Path, resume: bool, detach: bool, at_once: int | None, as_json: bool
) -> None:
    if detach:
        raise RunError("a study cannot be left in the background; start it with nohup, or in tmux")
    from ecogen.engines.forking import fork_server

    fork_server()  # before the imports that take long, since it does the same ones
    from ecogen.engines.study import run_study
    from ecogen.reports.console import show_study

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        work = run_study(study, folder, resume=resume, at_once=at_once or cores, screen=screen)
        summary = asyncio.run(work)
    except (KeyboardInterrupt, asyncio.CancelledError):
        screen.print("interrupted; go on with the same command and --resume", style="yellow")
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(summary))
        return
    for line in show_study(summary):
        Console().print(line)
    print(f"report: {folder / 'report.html'}")


def _run_here(recipe: recipes.Recipe, folder: Path, resume: bool) -> Summary:
    """The run's figures; its nodes are started by this process, and end with it."""
    if recipe.engine == "local":
        from ecogen.engines.forking import fork_server

        fork_server()  # before the imports that take long, since it does the same ones
    from ecogen.engines import session
    from ecogen.engines.run_folder import resume_command

    try:
        return asyncio.run(session.run(recipe, folder, resume=resume, screen=screen))
    except (KeyboardInterrupt, asyncio.CancelledError):
        told = f"interrupted; go on with: {resume_command(folder)}"
        screen.print(told, style="yellow", soft_wrap=True, markup=False)
        raise typer.Exit(130) from None


def show_run(summary: Summary, folder: Path, as_json: bool) -> None:
    """Print a finished run's figures, as JSON or as a table."""
    if as_json:
        print(json.dumps(summary))
        return
    from ecogen.reports.console import show_summary

    Console().print(show_summary(summary))
    print(f"report: {folder / 'report.html'}")
