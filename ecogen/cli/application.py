"""What all verbs share: the application, the options that several have, and how errors end it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler

from ecogen.errors import EcoGenError, RunError
from ecogen.storage import storage_error

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

screen = Console(stderr=True)

EngineName = Literal["inproc", "local"]

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe, say tuning.rounds=4; repeatable."),
]


def existing(folder: Path | None) -> Path | None:
    """Refuse what is no folder before the imports that take seconds; a callback of arguments.

    Raises:
        RunError: if it is none.
    """
    if folder is None or folder.is_dir():
        return folder
    here = ", ".join(str(recipe.parent) for recipe in sorted(Path("runs").glob("*/recipe.json"))[:MOST_LISTED])
    known = f"the runs here are {here}" if here else "`ecogen run RECIPE` makes one"
    said = f"{folder} is no folder" if folder.exists() else f"there is no folder {folder}"
    raise RunError(f"{said}; {known}")


MOST_LISTED = 10
"""Runs that an error names."""


def main() -> None:
    """The entry point: errors that a user can act on end with exit code 2 and no traceback."""
    level = os.environ.get("ECOGEN_LOG", "WARNING").upper()
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(console=screen, show_path=False)])
    import ecogen.node.quiet  # noqa: F401 - before what talks

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    with _errors_as_exit_codes():
        app(prog_name="ecogen")


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


def plain(value: Any) -> Any:
    """A struct as what JSON has: objects, arrays, text and numbers."""
    import msgspec

    return msgspec.to_builtins(value)
