"""The verbs for the nodes of a federation: be one, look at them, watch what they do."""

from __future__ import annotations

import asyncio
import contextlib
import re
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from ecogen import config as recipes
from ecogen.cli.application import Settings, app, screen
from ecogen.cli.runs import show_run
from ecogen.errors import RunError


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
        _check_is_folder(run)
        work = session.status(Path(run))
    else:
        work = session.status_of_cloud(*split_parent("RUN_OR_CLOUD", run), certificates)
    for line in asyncio.run(work):
        Console().print(line)


def _check_is_folder(run: str) -> None:
    if re.fullmatch(r"[^@/]+@.+:\d+", run) and not Path(run).exists():
        raise RunError(f"{run} is no run folder; to ask a cloud, give an operator's certificate with --certs DIR")


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
        show_run(asyncio.run(session.watch(cloud_id, address, certificates, out, screen=screen)), out, as_json)
        return
    screen.print("the federation goes on; watch it again with the same command", style="yellow")
    raise typer.Exit(130)
