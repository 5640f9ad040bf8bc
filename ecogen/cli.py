"""The command line: `ecogen run`, `report`, `predict`, `status`, `node`, `certs`. Prints; everything else logs or returns."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from ecogen import config as recipes
from ecogen.errors import EcoGenError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="EcoGen tunes and serves generative models across a cloud, edge sites and end devices, and bills every round.",
)
certs_app = typer.Typer(no_args_is_help=True, help="The federation's certificates: who may be which node.")
app.add_typer(certs_app, name="certs")

screen = Console(stderr=True)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as `ecogen run --out` wrote it.")]


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe's name, or the path of a TOML file.")],
    engine: Annotated[
        str | None, typer.Option(help="inproc: all nodes in this process; local: a process a node.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a value, say tuning.rounds=4; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run folder; default runs/NAME.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out from its last finished round.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Leave the run in the background; `ecogen status` finds it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object at the end.")] = False,
) -> None:
    """Tune a model with a federation, and write its run folder with a report."""
    overrides = [*(settings or []), *([f"engine={engine}"] if engine else [])]
    resolved = recipes.load(recipe, overrides)
    folder = out or Path("runs") / resolved.name
    if detach:
        from ecogen.engines import background

        background.detach(resolved, folder, resume=resume)
        print(f"runs in the background; look at it with: ecogen status {folder}")
        return
    from ecogen.engines import session

    summary = asyncio.run(session.run(resolved, folder, resume=resume, screen=screen))
    if as_json:
        print(json.dumps(summary))
    else:
        from ecogen.reports.console import show_summary

        Console().print(show_summary(summary))
        print(f"report: {folder / 'report.html'}")


@app.command()
def report(
    run_folder: RunFolder, as_json: Annotated[bool, typer.Option("--json", help="Print the figures too.")] = False
) -> None:
    """Rebuild report.html from the records of a run."""
    from ecogen.engines.saving import REPORT, rebuild_report

    summary = rebuild_report(run_folder)
    print(json.dumps(summary) if as_json else f"report: {run_folder / REPORT}")


@app.command()
def predict(
    run_folder: RunFolder,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="PNG files.")],
    engine: Annotated[str, typer.Option(help="inproc or local.")] = "inproc",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Classify pictures through the split chain, and tell what each device computed and what crossed each link."""
    from ecogen.engines import session

    asked, topology = asyncio.run(session.predict(run_folder, images, engine))
    if as_json:
        print(json.dumps(session.prediction_table(images, asked)))
        return
    from ecogen.reports.console import show_prediction

    for path, label, probability in zip(images, asked.labels, asked.probabilities, strict=True):
        print(f"{path}: {label} ({probability:.1%})")
    Console().print(show_prediction(", ".join(map(str, asked.labels)), asked.record, topology))


@app.command()
def status(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")] = Path("runs")) -> None:
    """Show how a run is, and which of its nodes are there."""
    from ecogen.engines import session

    for line in asyncio.run(session.status(run_folder)):
        Console().print(line)


@app.command()
def node(
    node_id: Annotated[
        str, typer.Argument(metavar="NODE_ID", help="Such as cloud, edge-0 or edge-0.cluster-1.device-2.")
    ],
    certificates: Annotated[
        Path, typer.Option("--certs", metavar="DIR", help="The folder that `ecogen certs issue` made.")
    ],
    folder: Annotated[Path, typer.Option(metavar="DIR", help="This node's disk.")],
    recipe: Annotated[str | None, typer.Option(help="For the cloud: the recipe.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="For the cloud: override a value.")
    ] = None,
    join: Annotated[
        str | None, typer.Option(metavar="PARENT_ID@HOST:PORT", help="For the others: whom to join.")
    ] = None,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where to listen; port 0 takes a free one.")
    ] = "127.0.0.1:0",
    advertise: Annotated[str | None, typer.Option(metavar="HOST", help="Under which host others reach it.")] = None,
    revoked: Annotated[Path | None, typer.Option(metavar="FILE", help="The revocation list.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:N or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Be one node of a federation, until interrupted."""
    from ecogen.engines.by_hand import node_settings, run_by_hand

    table = recipes.to_table(recipes.load(recipe, settings or [])) if recipe else {}
    started = node_settings(node_id, certificates, folder, table, join, listen, advertise, revoked, device, dtype)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run_by_hand(started, lambda address: print(f"{node_id} serves at {address}", flush=True)))


@certs_app.command("init")
def certs_init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the authority will be; keep it safe.")],
    federation: Annotated[str, typer.Option(help="The federation's name.")] = "ecogen",
) -> None:
    """Make a federation's authority."""
    from ecogen.transport.certs import create_authority

    create_authority(directory, federation)
    print(f"made the authority of {federation!r} in {directory}")


@certs_app.command("issue")
def certs_issue(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The authority's folder.")],
    node_id: Annotated[str, typer.Argument(metavar="NODE_ID")],
    tier: Annotated[str, typer.Argument(help="cloud, edge, end or operator.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the node's files go.")],
    valid_days: Annotated[int, typer.Option(help="How long it is valid.")] = 365,
) -> None:
    """Issue a certificate that names a node and its tier."""
    from ecogen.transport.certs import issue, load_authority

    identity = issue(load_authority(directory), node_id, tier, out, valid_days=valid_days)
    print(f"issued {identity.uri} to {out}; move that folder to the node, and nothing else")


@certs_app.command("revoke")
def certs_revoke(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The authority's folder.")],
    node_id: Annotated[str, typer.Argument(metavar="NODE_ID")],
) -> None:
    """Revoke every certificate of a node."""
    from ecogen.transport.certs import REVOKED, load_authority, revoke

    revoked = revoke(load_authority(directory), node_id)
    print(f"revoked {len(revoked)} of {node_id!r}; give the other nodes {directory / REVOKED}")


@certs_app.command("show")
def certs_show(directory: Annotated[Path, typer.Argument(metavar="DIR", help="The authority's folder.")]) -> None:
    """List the certificates that an authority has issued."""
    from ecogen.transport.certs import issued, load_authority

    for entry in issued(load_authority(directory)):
        print(json.dumps(_plain(entry)))


def main() -> None:
    """The entry point: errors that a user can act on end with exit code 2 and no traceback."""
    level = os.environ.get("ECOGEN_LOG", "WARNING").upper()
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(console=screen, show_path=False)])
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with _errors_as_exit_codes():
        app()


@contextlib.contextmanager
def _errors_as_exit_codes() -> Iterator[None]:
    try:
        yield
    except EcoGenError as problem:
        screen.print(f"error: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        screen.print("interrupted; go on with --resume", style="yellow")
        sys.exit(130)


def _plain(value: Any) -> Any:
    import msgspec

    return msgspec.to_builtins(value)


if __name__ == "__main__":
    main()
