"""What to tune, kind by kind: `python -m benchmarks.tunables [--out DIR] [--resume]`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.study import carry_out
from benchmarks.study import lines as lines_of_study

NAME = "tunables"


def goals(study: Mapping[str, Any]) -> dict[str, bool]:
    """Every kind does at least as well as the head alone, as a mean over seeds."""
    rows = {row["name"]: row["last_mean"] for row in study["parts"]["kinds"]}
    return {
        f"{name} at least as good as the head alone": mean >= rows["head"]
        for name, mean in rows.items()
        if name != "head"
    }


def lines(result: Mapping[str, Any]) -> list[str]:
    """What it shows, in words: also what each kind took."""
    took = [
        f"{row['name']}: {row['tunable_fraction'] * 100:.2f} % tunable, {row['sent_bytes'] / 1e6:.2f} MB sent, "
        f"{row['flops'] / 1e9:.1f} GFLOP, {row['energy_j']:.0f} J"
        for row in result["study"]["parts"]["kinds"]
    ]
    greenest = [f"{part}: {found['case']} was the greenest" for part, found in result["study"]["greenest"].items()]
    return [*lines_of_study(result), *took, *greenest]


if __name__ == "__main__":
    print("\n".join(lines(carry_out(NAME, goals, sys.argv[1:]))))
