"""One poisoned cluster of six, by strategy of aggregation: `python -m benchmarks.poisoned [--out DIR] [--resume]`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.study import carry_out, lines

__all__ = ["goals", "lines"]


def goals(study: Mapping[str, Any]) -> dict[str, bool]:
    """Robust strategies lose at most a point to themselves without the fault; FedAvg loses more."""
    honest = {row["name"]: row["last_mean"] for row in study["parts"]["honest"]}
    lost = {
        row["name"].partition(",")[0]: honest[row["name"].partition(",")[0]] - row["last_mean"]
        for row in study["parts"]["poisoned"]
    }
    robust = [name for name in lost if name != "FedAvg"]
    return {
        "each robust strategy loses at most a point": all(lost[name] <= 0.01 for name in robust),
        "FedAvg loses more than each of them": all(lost["FedAvg"] > lost[name] for name in robust),
    }


if __name__ == "__main__":
    print("\n".join(lines(carry_out("poisoned", goals, sys.argv[1:]))))
