"""A run that no terminal owns: started here, found again by `ecogen status`. Imports no torch, so it is quick."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from ecogen import config as recipes
from ecogen.errors import RunError
from ecogen.storage import make_folder, write_atomically

RUNNING, LOG = "running.json", "run.log"

_START_S = 180.0


def detach(recipe: recipes.Recipe, folder: Path, *, resume: bool) -> None:
    """Start the run in a process of its own that no terminal owns, and wait until its cloud serves.

    Raises:
        RunError: if it does not come up.
    """
    if recipe.engine == "inproc":
        raise RunError("--detach needs nodes that outlive this process; add --engine local")
    make_folder(folder)
    path = folder / "detached.json"
    write_atomically(path, json.dumps(recipes.to_table(recipe)))
    command = [
        sys.executable,
        "-m",
        "ecogen.engines.detached",
        str(path),
        str(folder),
        *(["--resume"] if resume else []),
    ]
    (folder / RUNNING).unlink(missing_ok=True)
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    deadline_s = time.monotonic() + _START_S
    while not (folder / RUNNING).exists():
        if process.poll() is not None or time.monotonic() > deadline_s:
            last = (folder / LOG).read_text(errors="replace").strip().splitlines()[-3:]
            raise RunError("the run did not start: " + " ".join(last or [f"see {folder / LOG}"]))
        time.sleep(0.1)


