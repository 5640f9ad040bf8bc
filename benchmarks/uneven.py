"""Clusters that know different digits, by strategy: `python -m benchmarks.uneven [--out DIR] [--resume]`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.study import carry_out, lines

__all__ = ["goals", "lines"]


def goals(study: Mapping[str, Any]) -> dict[str, bool]:
    """SCAFFOLD wins back half of what uneven clusters cost FedAvg with the same local steps."""
    last = {row["name"]: row["last_mean"] for row in study["parts"]["sgd"]}
    even, fedavg, scaffold = (last[name] for name in ("FedAvg, even, SGD", "FedAvg, SGD", "SCAFFOLD, SGD"))
    return {"SCAFFOLD wins back half of what uneven clusters cost FedAvg": scaffold - fedavg >= (even - fedavg) / 2}


if __name__ == "__main__":
    print("\n".join(lines(carry_out("uneven", goals, sys.argv[1:]))))
