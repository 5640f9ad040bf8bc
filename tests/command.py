"""The command line, called as a person calls it: in this process where that is enough, else in one of its own."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from ecogen import cli
from ecogen import config as recipes
from ecogen.reports.toml import to_toml

ECOGEN = str(Path(sys.executable).parent / "ecogen")


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def figures(self) -> dict[str, Any]:
        """The one JSON object that is all of standard output."""
        figures: dict[str, Any] = json.loads(self.out)
        return figures


def call(arguments: tuple[object, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Call `ecogen` in this process."""
    handlers = list(logging.getLogger().handlers)
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setattr(sys, "argv", ["ecogen", *map(str, arguments)])
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        logging.getLogger().handlers = handlers
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return Ran(int(ended.value.code or 0), shown.out, shown.err)


@contextmanager
def started(*arguments: object, **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """`ecogen` in a process of its own, which does not outlive the test."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "500", "PYTHONFAULTHANDLER": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([ECOGEN, *map(str, arguments)], env=environment, **(pipes | settings))
    try:
        yield process
    finally:
        family = relatives(process.pid)
        for relative in family:
            if relative.is_running():
                relative.kill()
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> int:
    """Its exit code; where it does not end, what its threads do."""
    try:
        return process.wait(45)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        _, told = process.communicate(timeout=10)
        raise AssertionError(told) from None


def relatives(pid: int) -> list[psutil.Process]:
    """All processes that a process has started."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def save_recipe(recipe: recipes.Recipe, path: Path) -> Path:
    path.write_text(to_toml(recipes.to_table(recipe)))
    return path


def wait_until(condition: Callable[[], object], timeout_s: float = 90) -> None:
    """Wait for something that another process brings about."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come about"
        time.sleep(0.01)


def wait_for_rounds(folder: Path, count: int) -> None:
    """Wait until the cloud of a run has recorded so many rounds of its own."""
    path = folder / "nodes" / "cloud" / "records.jsonl"

    def num_rounds() -> int:
        lines = path.read_text().splitlines()[:-1] if path.exists() else []
        return sum((r := json.loads(line))["type"] == "round" and r["node_id"] == "cloud" for line in lines)

    wait_until(lambda: num_rounds() >= count)
