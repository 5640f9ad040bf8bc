"""The paper's Table 3 on digits, with its goals: `python -m benchmarks.table3 [--out DIR] [--resume]`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.study import carry_out, lines

__all__ = ["goals", "lines"]


def goals(study: Mapping[str, Any]) -> dict[str, bool]:
    """The goals of the table: as accurate as the paper, and better with more clusters."""
    rows, trend = study["table"], study["trend"]
    return {
        "mean last accuracy at least the paper's with every number of clusters": all(
            row["last_mean"] >= row["reference"]["last"] for row in rows
        ),
        "mean first accuracy at least the paper's with 4 clusters or more": all(
            row["first_mean"] >= row["reference"]["first"] for row in rows if row["clusters"] >= 4
        ),
        "6 clusters above 1 by more than two standard errors": trend["gain"] > 2 * trend["standard_error"],
        "Spearman's correlation positive over all runs": trend["spearman"] > 0,
    }


if __name__ == "__main__":
    print("\n".join(lines(carry_out("table3", goals, sys.argv[1:]))))
