"""What is served has a name each."""

from __future__ import annotations

from pathlib import Path

import pytest

from ecogen.engines.served import Served, adapters_of, find_served
from ecogen.errors import CheckpointError
from tests.tiny import save_foundation


def test_a_run_that_tuned_a_classifier_is_not_served(tmp_path: Path) -> None:
    save_foundation(tmp_path / "run" / "backbone")
    with pytest.raises(CheckpointError, match=r"run/backbone holds a classifier of images; only decoders are served"):
        find_served(tmp_path / "run")


def test_a_name_is_given_once() -> None:
    """On the command line, and beside what a run has."""
    assert adapters_of(["a=ad1", "b=ad1"]) == {"a": Path("ad1"), "b": Path("ad1")}
    with pytest.raises(CheckpointError, match="the name 'a' is given twice"):
        adapters_of(["a=ad1", "b=ad3", "a=ad2"])
    run = Served(Path("run/backbone"), "run/backbone", {"run": Path("run/adapter")})
    assert list(run.beside({"a": Path("ad1")}).adapters) == ["run", "a"]
    for name in ("run", "run/backbone"):
        with pytest.raises(CheckpointError, match=f"the name '{name}' is given twice"):
            run.beside({name: Path("ad1")})
