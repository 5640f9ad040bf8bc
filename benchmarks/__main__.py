"""All benchmarks, one after the other, and their figures in one table: `python -m benchmarks [NAME...]`."""

from __future__ import annotations

import importlib
import subprocess
import sys
from json import loads

from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, SKIPPED

STUDIES = ["table3", "table3_mnist", "poisoned", "traffic", "tunables", "ranks", "few_labels", "uneven"]
OTHERS = ["straggler", "time_to_accuracy", "forming", "formed_runs", "private", "labels", "serving", "api_server"]
OTHERS += ["semantic_cache", "crossings"]
RELAY = [f"relay_{name}" for name in ("students", "inversion", "privacy", "circle", "sources")]
PEERS = ["flower", "llama_cpp", "split_lora"]
NAMES = ["hop", "round_overhead", "split_vs_central", *PEERS, "node_startup", "accuracy", *STUDIES, *OTHERS, *RELAY]


def main(names: list[str]) -> int:
    """Run each as a process of its own, so that none inherits another's threads; returns how many failed."""
    codes = {}
    for name in names:
        Console().rule(name)
        codes[name] = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode
    table = Table("benchmark", "date", "figure")
    for name in names:
        if codes[name]:
            table.add_row(name, "", "skipped, see above" if codes[name] == SKIPPED else "FAILED, see above")
            continue
        result = loads((RESULTS / f"{name}.json").read_text())
        for line in importlib.import_module(f"benchmarks.{name}").lines(result):
            table.add_row(name, result["date"][:10], line)
        table.add_section()
    Console().print(table)
    return sum(code not in (0, SKIPPED) for code in codes.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or NAMES))
