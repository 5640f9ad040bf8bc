"""A built-in study and how its goals are met; table and plot beside the result: `python -m benchmarks.table3`.

The study is run as a user runs it, by `ecogen run NAME`; its page is copied beside the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, circumstances, cpu_times, wait_until_quiet, write_result

Goals = Callable[[Mapping[str, Any]], dict[str, bool]]
"""Whether each goal is met, by its name, from the JSON object of the study."""


def carry_out(name: str, goals: Goals, arguments: list[str]) -> dict[str, Any]:
    """Run the study, in a folder of `--out` if given, and write benchmarks/results/NAME.json and .html.

    Of the name, dashes are underscores there, as in the script's.
    """
    parser = argparse.ArgumentParser(description=f"the study {name}")
    parser.add_argument("--out", type=Path, help="the study's folder; default a temporary one")
    parser.add_argument("--resume", action="store_true", help="go on in that folder")
    options, others = parser.parse_known_args(arguments)
    quiet = wait_until_quiet()
    began_s, began_cpu_s = time.perf_counter(), _cpu_s()
    with tempfile.TemporaryDirectory(prefix="ecogen-study-") as temporary:
        folder = options.out or Path(temporary) / name
        command = [sys.executable, "-m", "ecogen", "run", name, "--out", str(folder), "--json", *others]
        done = subprocess.run([*command, *(["--resume"] if options.resume else [])], stdout=subprocess.PIPE, check=True)
        shutil.copy(folder / "report.html", RESULTS / f"{name.replace('-', '_')}.html")
    summary = json.loads(done.stdout)
    took: dict[str, float | None] = {"wall_s": None, "cpu_s": None}
    if options.resume:  # only what was left of it was timed
        others = [*others, "--resume"]
    else:
        took = {"wall_s": round(time.perf_counter() - began_s, 1), "cpu_s": round(_cpu_s() - began_cpu_s, 1)}
    result = {**circumstances(["torch", "transformers", "peft"]), "others_before": quiet, **took}
    result["command"] = " ".join(["python -m", f"benchmarks.{name.replace('-', '_')}", *others])
    result |= {"study": summary, "goals": goals(summary)}
    write_result(name.replace("-", "_"), result)
    return result


def lines(result: Mapping[str, Any]) -> list[str]:
    """What it shows, in words."""
    study = result["study"]
    rows = [*study["table"], *(row for part in study["parts"].values() for row in part)]
    text = [
        f"{row['name']}: {row['first_mean']:.4f} (sd {row['first_sd']:.4f}), {row['last_mean']:.4f} "
        f"(sd {row['last_sd']:.4f}), {row['seeds']} seeds"
        for row in rows
    ]
    if result["wall_s"]:
        cpu = f", {result['cpu_s'] / 60:.1f} CPU min of the whole machine" if result["cpu_s"] else ""
        text.append(f"{result['wall_s'] / 60:.1f} min{cpu}, foundation model included if made")
    return [*text, *(f"{'reached' if met else 'MISSED'}: {goal}" for goal, met in result["goals"].items())]


def _cpu_s() -> float:
    """CPU time of the whole machine since boot: a study's runs are no descendants of this process."""
    idle, total = cpu_times() or (0, 0)
    return (total - idle) / os.sysconf("SC_CLK_TCK")
