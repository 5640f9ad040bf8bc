"""Whose a run folder is, and how long its run took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ecogen.config import Recipe
from ecogen.engines.run_folder import LAUNCHES, NODES, SUMMARY, begin_run, check_free, check_run, earlier_s
from ecogen.errors import RunError


def test_a_run_that_was_never_resumed_has_no_earlier_time(tmp_path: Path) -> None:
    begin_run(tmp_path, Recipe(), resume=False)
    assert earlier_s(tmp_path, [1.0, 2.0]) == 0


def test_a_resumed_run_counts_each_launch_until_its_last_record_and_no_pause(tmp_path: Path) -> None:
    launches = (100.0, 200.0, 300.0, 400.0)
    (tmp_path / LAUNCHES).write_text("".join(json.dumps({"time_s": time_s}) + "\n" for time_s in launches))
    # 30 s, nothing recorded, 5 s, and the last launch, which is measured elsewhere.
    assert earlier_s(tmp_path, [110.0, 130.0, 305.0, 410.0]) == pytest.approx(35)


def test_what_a_folder_with_a_run_advises(tmp_path: Path) -> None:
    begin_run(tmp_path, Recipe(), resume=False)
    with pytest.raises(RunError, match=r"another folder with --out, or go on with that run: `ecogen run .* --resume`"):
        check_free(tmp_path)
    check_run(tmp_path, Recipe(), resume=True)
    (tmp_path / SUMMARY).write_text("{}")
    (tmp_path / NODES).mkdir()
    check_run(tmp_path, Recipe(), resume=True)


def test_a_run_whose_nodes_were_elsewhere_is_not_begun_anew_by_resuming_it(tmp_path: Path) -> None:
    begin_run(tmp_path, Recipe(), resume=False)
    (tmp_path / SUMMARY).write_text("{}")
    with pytest.raises(RunError, match=r"choose another folder with --out$"):
        check_run(tmp_path, Recipe(), resume=False)
    with pytest.raises(RunError, match="without its nodes' disks; there is nothing to go on with"):
        check_run(tmp_path, Recipe(), resume=True)
