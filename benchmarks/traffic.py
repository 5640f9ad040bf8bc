"""Bytes between devices against plain split learning, step by step: `python -m benchmarks.traffic [--out DIR]`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from benchmarks import study
from benchmarks.study import carry_out

__all__ = ["goals", "lines"]

_TIMES, _MOST_LOST = 10, 0.005


def goals(study: Mapping[str, Any]) -> dict[str, bool]:
    """At least ten times fewer bytes between devices, at no more than half a point of accuracy."""
    plain, *_, last = study["parts"]["steps"]
    return {
        f"{_TIMES} times fewer bytes between devices": plain["d2d_bytes"] >= _TIMES * last["d2d_bytes"],
        "at most half a point of accuracy lost": plain["last_mean"] - last["last_mean"] <= _MOST_LOST,
    }


def lines(result: Mapping[str, Any]) -> list[str]:
    """What it shows, in words: each step's factor, and the bytes of all links."""
    parts = result["study"]["parts"]
    steps, federated, narrow = (parts[part] for part in ("steps", "federated", "tunables_in_fewer_bytes"))
    *exact, int8 = [*pairwise(steps[:-1]), (steps[0], steps[-1])]
    factors = [f"{after['name']}: {_factor(before, after)}" for before, after in exact]
    totals = [
        f"{row['name']}: {row['sent_bytes'] / 1e6:.1f} MB over all links" for row in (*steps, *narrow, *federated)
    ]
    totals += [f"tunables in {row['name']}: {_points(steps[-1], row)} against float32" for row in narrow]
    return [*study.lines(result), *factors, f"all steps, with int8: {_factor(*int8)}", *totals]


def _factor(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    times = before["d2d_bytes"] / after["d2d_bytes"]
    return f"{times:.2f} times fewer bytes between devices, {_points(before, after)}"


def _points(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    return f"{100 * (after['last_mean'] - before['last_mean']):+.2f} points"


if __name__ == "__main__":
    print("\n".join(lines(carry_out("traffic", goals, sys.argv[1:]))))
