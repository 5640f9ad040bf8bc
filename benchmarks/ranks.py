"""Clusters of unequal LoRA ranks, by what their edge makes of them: `python -m benchmarks.ranks [--out DIR]`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.study import carry_out
from benchmarks.study import lines as lines_of_study

NAME = "ranks"


def goals(study: Mapping[str, Any]) -> dict[str, bool]:
    """The default for unequal ranks is better than zero-padding and than the least rank everywhere."""
    rows = {row["name"]: row["last_mean"] for row in study["parts"]["ranks"]}
    ours = rows["unequal, changes"]
    return {f"changes at least as good as {name}": ours >= mean for name, mean in rows.items() if mean is not ours}


def lines(result: Mapping[str, Any]) -> list[str]:
    """What it shows, in words: also LoRA's error, where it was measured."""
    rows = result["study"]["parts"]["ranks"]
    errors = [f"{row['name']}: LoRA error {row['lora_error']:.4f}" for row in rows if row["lora_error"] is not None]
    return [*lines_of_study(result), *errors]


if __name__ == "__main__":
    print("\n".join(lines(carry_out(NAME, goals, sys.argv[1:]))))
