"""A run that no terminal owns: started here, found again by `ecogen status`. Imports no torch, so it is quick."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from ecogen import config as recipes
from ecogen.engines.forming import formed
from ecogen.engines.run_folder import RUNNING, check_run
from ecogen.errors import RunError, StorageError
from ecogen.storage import make_folder, write_atomically

LOG, ASKED = "run.log", "detached.json"

_START_S = 180.0


def detach(recipe: recipes.Recipe, folder: Path, *, resume: bool) -> None:
    """Start the run in a process of its own that no terminal owns, and wait until its cloud serves.

    Raises:
        RunError: if it does not come up.
    """
    if recipe.engine == "inproc":
        raise RunError("--detach needs nodes that others can reach; add --engine local")
    recipe = formed(recipe)
    check_run(folder, recipe, resume=resume)
    make_folder(folder)
    write_atomically(folder / ASKED, json.dumps(recipes.to_table(recipe)))
    (folder / RUNNING).unlink(missing_ok=True)
    command = [sys.executable, "-m", "ecogen.engines.detached", str(folder / ASKED), str(folder)]
    try:
        log = (folder / LOG).open("wb")
    except OSError as problem:
        raise StorageError(f"cannot write {folder / LOG}: {problem.strerror}; free some space") from problem
    with log:
        process = subprocess.Popen(
            [*command, *(["--resume"] if resume else [])],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline_s = time.monotonic() + _START_S
    while not (folder / RUNNING).exists():
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise RunError(f"the run did not start: {why(folder / LOG)}")
        time.sleep(0.1)


def why(log: Path) -> str:
    """What the last error in a log says, or its last line."""
    text = log.read_text(errors="replace").strip() if log.exists() else ""
    _, found, said = text.rpartition("error: ")
    return said if found else f"{text.splitlines()[-1] if text else 'it says nothing'}; see {log}"
