"""The verb that serves a language model."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Annotated

import typer

from ecogen import config as recipes
from ecogen.cli.application import EngineName, Settings, app, existing
from ecogen.errors import ConfigError


@app.command()
def serve(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            show_default=False,
            callback=existing,
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
    if resolved.task != "serve":
        problem = f'--recipe: {recipe} tunes a model; give one with task = "serve", or none for the built-in one'
        raise ConfigError([problem], "the command line")
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
