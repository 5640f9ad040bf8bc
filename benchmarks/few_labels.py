"""What FixMatch wins back with a tenth of the labels: `python -m benchmarks.few_labels [--out DIR] [--resume]`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.study import carry_out
from benchmarks.study import lines as study_lines

GOAL = "FixMatch wins back half of the gap"


def won_back(study: Mapping[str, Any]) -> float:
    """The share of the gap, in last mean accuracy, between a tenth of the labels and all of them."""
    few, matched, full = (row["last_mean"] for row in study["parts"]["labels"])
    return float((matched - few) / (full - few))


def goals(study: Mapping[str, Any]) -> dict[str, bool]:
    """Half of the gap, and in every seed better than the labels alone."""
    few, matched, _ = (row["last"] for row in study["parts"]["labels"])
    return {
        GOAL: won_back(study) >= 0.5,
        "it is better than the labels alone with every seed": all(m > f for f, m in zip(few, matched, strict=True)),
    }


def lines(result: Mapping[str, Any]) -> list[str]:
    """What it shows, in words."""
    return [*study_lines(result), f"{won_back(result['study']):.0%} of the gap won back"]


if __name__ == "__main__":
    print("\n".join(lines(carry_out("few_labels", goals, sys.argv[1:]))))
