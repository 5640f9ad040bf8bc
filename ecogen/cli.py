"""The command line. It prints; everything else logs or returns."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler

from ecogen import config as recipes
from ecogen.errors import ConfigError, EcoGenError, RunError
from ecogen.storage import storage_error

if TYPE_CHECKING:
    from ecogen.reports.summary import Summary

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=(
        "EcoGen tunes and serves generative models across a cloud, edge sites and end devices, and bills every round "
        "in seconds, bytes, joules and grams of CO2e. Begin with: ecogen run digits"
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
)
certs_app = typer.Typer(no_args_is_help=True, help="The federation's certificates: who may be which node.")
app.add_typer(certs_app, name="certs")

screen = Console(stderr=True)

EngineName = Literal["inproc", "local"]

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as `ecogen run` wrote it.")]
AuthorityFolder = Annotated[Path, typer.Argument(metavar="DIR", help="The authority's folder.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe, say tuning.rounds=4; repeatable."),
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
    _show_run(_run_here(resolved, folder, resume), folder, as_json)


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
def serve(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            show_default=False,
            help="A run that tuned a language model, or a model's folder; with --join it may be left out.",
        ),
    ] = None,
    port: Annotated[int, typer.Option(metavar="P", min=0, max=65535, help="0 for any that is free.")] = 8000,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Where it is served: devices, clusters, edges; default serve.")
    ] = None,
    engine: Annotated[EngineName | None, typer.Option(help="All nodes in this process, or a process a node.")] = None,
    devices: Annotated[int | None, typer.Option(metavar="N", min=1, help="Devices that share the blocks.")] = None,
    join: Annotated[
        str | None,
        typer.Option(metavar="ID@HOST:PORT", help="Serve on nodes that were started by hand: where their cloud is."),
    ] = None,
    certificates: Annotated[
        Path | None, typer.Option("--certs", metavar="DIR", help="With --join, the operator's certificate.")
    ] = None,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the nodes' disks and the books of what was served there.")
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=DIR", help="A LoRA adapter and its name; repeatable."),
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help='API keys: TOML, a line `tenant = "key"` each.')
    ] = None,
    allow_open: Annotated[bool, typer.Option("--allow-open", help="Let other machines ask without a key.")] = False,
) -> None:
    """Serve a language model through OpenAI's API.

    Prints one line when it answers. Ctrl-C ends it when running answers are told; nodes started by hand go on.
    """
    overrides = [*(settings or []), *([f"engine={engine}"] if engine else [])]
    overrides += [f"topology.devices_per_cluster={devices}"] if devices else []
    where = [*([recipe] if recipe else []), *([f"--out {out}"] if out else []), *overrides]
    _check_serving_options(model, join, certificates, where)
    resolved = recipes.load(recipe or "serve", overrides)
    if resolved.engine == "local" and not join:
        from ecogen.engines.forking import fork_server

        fork_server()  # before the imports that take long, since it does the same ones
    from ecogen.engines import served, serving
    from ecogen.engines.by_hand import split_parent
    from ecogen.serving.openai.keys import Keys, read_keys

    found, named = served.find_served(model) if model else None, served.adapters_of(adapters or [])
    ready = lambda address, gateway: print(serving.ready_line(address, gateway), flush=True)  # noqa: E731
    door = serving.Door(host, port, ready, read_keys(keys) if keys else Keys(), allow_open)
    if join and certificates:
        work = serving.serve_joined(split_parent("--join", join), certificates, found, named, door)
    else:
        assert found is not None
        work = serving.serve(found.beside(named), resolved, door, folder=out)
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        asyncio.run(work)


@app.command()
def status(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN_OR_CLOUD", help="A run folder, or one of several; with --certs, ID@HOST:PORT."),
    ] = "runs",
    certificates: Annotated[
        Path | None, typer.Option("--certs", metavar="DIR", help="An operator's certificate, to ask a cloud.")
    ] = None,
) -> None:
    """Show how a run is, and which nodes are there.

    A federation that was started by hand is asked at its cloud; one that serves shows what it served.
    """
    from ecogen.engines import session
    from ecogen.engines.by_hand import split_parent

    if certificates is None:
        work = session.status(Path(run))
    else:
        work = session.status_of_cloud(*split_parent("RUN_OR_CLOUD", run), certificates)
    for line in asyncio.run(work):
        Console().print(line)


@app.command()
def node(
    node_id: Annotated[
        str, typer.Argument(metavar="NODE_ID", help="Such as cloud, edge-0 or edge-0.cluster-1.device-2.")
    ],
    certificates: Annotated[
        Path, typer.Option("--certs", metavar="DIR", help="What `ecogen certs issue` wrote for this node.")
    ],
    folder: Annotated[Path, typer.Option(metavar="DIR", help="This node's disk; kept over restarts.")],
    recipe: Annotated[str | None, typer.Option(metavar="RECIPE", help="For the cloud: what to carry out.")] = None,
    settings: Settings = None,
    join: Annotated[str | None, typer.Option(metavar="ID@HOST:PORT", help="For others: the parent to join.")] = None,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where to listen; port 0 takes a free one.")
    ] = "127.0.0.1:0",
    advertise: Annotated[
        str | None, typer.Option(metavar="HOST", help="The host by which others reach it, if another.")
    ] = None,
    revoked: Annotated[Path | None, typer.Option(metavar="FILE", help="The federation's revocation list.")] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda:N or mps.")] = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16", "int8"], typer.Option(help="Of the frozen weights; int8 serves only.")
    ] = "float32",
    message_mib: Annotated[
        int | None,
        typer.Option(
            metavar="MIB", min=8, max=2047, help="The largest message, the same on all nodes; 64, or as RECIPE says."
        ),
    ] = None,
) -> None:
    """Be one node of a federation, until interrupted.

    Its certificate says which tier it is of. Start the cloud first, then the edges, then the devices.
    """
    from ecogen.engines.by_hand import node_settings, run_by_hand

    started = node_settings(
        node_id,
        certificates,
        folder,
        recipes.load(recipe, settings or []) if recipe else None,
        join=join,
        listen=listen,
        device=device,
        dtype=dtype,
        advertise=advertise,
        revoked=revoked,
        message_mib=message_mib,
    )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run_by_hand(started, lambda address: print(f"{node_id} serves at {address}", flush=True)))


@app.command()
def watch(
    cloud: Annotated[str, typer.Argument(metavar="ID@HOST:PORT", help="The cloud's node id and where it is.")],
    certificates: Annotated[
        Path, typer.Option("--certs", metavar="DIR", help="What `ecogen certs issue` wrote for the operator.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The run folder to write.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object at the end.")] = False,
) -> None:
    """Watch nodes that were started by hand, and save their run.

    The run folder is written once the federation has finished. Leaving stops nothing: watch again to see all of it
    from the first round.
    """
    from ecogen.engines import session
    from ecogen.engines.by_hand import split_parent

    cloud_id, address = split_parent("ID@HOST:PORT", cloud)
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        _show_run(asyncio.run(session.watch(cloud_id, address, certificates, out, screen=screen)), out, as_json)
        return
    screen.print("the federation goes on; watch it again with the same command", style="yellow")
    raise typer.Exit(130)


@certs_app.command("init")
def certs_init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the authority will be; keep it safe.")],
    federation: Annotated[str, typer.Option(metavar="NAME", help="Its federation's name.")] = "ecogen",
) -> None:
    """Make a federation's authority, which issues certificates."""
    from ecogen.transport.authority import create_authority

    create_authority(directory, federation)
    print(f"made the authority of {federation!r} in {directory}")


@certs_app.command("issue")
def certs_issue(
    directory: AuthorityFolder,
    node_id: Annotated[str, typer.Argument(metavar="NODE_ID", help="Whose certificate it is, say edge-0.")],
    tier: Annotated[str, typer.Argument(metavar="TIER", help="cloud, edge, end or operator.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the node's key and certificates go.")],
    valid_days: Annotated[int, typer.Option(metavar="DAYS", min=1, max=36_500, help="How long it is valid.")] = 365,
) -> None:
    """Issue a certificate that names a node and its tier."""
    from ecogen.transport.authority import issue, load_authority

    identity = issue(load_authority(directory), node_id, tier, out, valid_days=valid_days)
    print(f"issued {identity.uri} to {out}; move that folder to the node, and nothing else")


@certs_app.command("revoke")
def certs_revoke(
    directory: AuthorityFolder,
    node_id: Annotated[str, typer.Argument(metavar="NODE_ID", help="Who shall not come in any more.")],
) -> None:
    """Revoke every certificate of a node."""
    from ecogen.transport.authority import load_authority, revoke
    from ecogen.transport.credentials import REVOKED

    revoked = revoke(load_authority(directory), node_id)
    print(f"revoked {len(revoked)} of {node_id!r}; give the other nodes {directory / REVOKED}")


@certs_app.command("show")
def certs_show(directory: AuthorityFolder) -> None:
    """List the certificates that an authority has issued."""
    from ecogen.transport.authority import issued, load_authority

    for entry in issued(load_authority(directory)):
        print(json.dumps(_plain(entry)))


def main() -> None:
    """The entry point: errors that a user can act on end with exit code 2 and no traceback."""
    level = os.environ.get("ECOGEN_LOG", "WARNING").upper()
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(console=screen, show_path=False)])
    import ecogen.node.quiet  # noqa: F401 - before what talks

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    with _errors_as_exit_codes():
        app(prog_name="ecogen")


def _check_serving_options(model: Path | None, join: str | None, certificates: Path | None, where: list[str]) -> None:
    problems = []
    if not (model or join):
        problems.append("give RUN_OR_MODEL, or --join a cloud that serves")
    if bool(join) is not bool(certificates):
        problems.append("--join and --certs go together: a cloud lets in those only who have a certificate")
    if join and where:
        problems.append(f"--join: where it is served is the cloud's to say; leave out {', '.join(where)}")
    if problems:
        raise ConfigError(problems, "the command line")


def _show_served(folder: Path, as_json: bool) -> None:
    from ecogen.engines.books import read_books
    from ecogen.reports.console import show_served

    summary = read_books(folder)
    if as_json:
        print(json.dumps(_plain(summary)))
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
        screen.print(f"interrupted; go on with: {resume_command(folder)}", style="yellow", soft_wrap=True)
        raise typer.Exit(130) from None


def _show_run(summary: Summary, folder: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary))
        return
    from ecogen.reports.console import show_summary

    Console().print(show_summary(summary))
    print(f"report: {folder / 'report.html'}")


@contextlib.contextmanager
def _errors_as_exit_codes() -> Iterator[None]:
    try:
        yield
    except EcoGenError as problem:
        _fail(problem)
    except OSError as problem:
        full = storage_error(problem)
        if full is None:
            raise
        _fail(full)


def _fail(problem: EcoGenError) -> NoReturn:
    screen.print(f"error: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


def _plain(value: Any) -> Any:
    import msgspec

    return msgspec.to_builtins(value)


if __name__ == "__main__":
    main()
