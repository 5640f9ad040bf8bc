"""The paper's Table 3 on MNIST, with its goals: `python -m benchmarks.table3_mnist [--out DIR] [--resume]`.

Skipped where MNIST is not: name its file by `--set data.path=FILE`, or its folder by ECOGEN_DATA.
"""

from __future__ import annotations

import sys

from benchmarks.common import skip
from benchmarks.study import carry_out, lines
from benchmarks.table3 import goals
from ecogen.config import Data
from ecogen.errors import DataError
from ecogen.tuning.datasets import open_data

__all__ = ["lines"]


def check_data(arguments: list[str]) -> None:
    """Skip the benchmark where its data set is not."""
    if any("data.path=" in argument for argument in arguments):
        return
    try:
        open_data(Data(name="mnist"))
    except DataError as problem:
        skip(str(problem))


if __name__ == "__main__":
    check_data(sys.argv[1:])
    print("\n".join(lines(carry_out("table3-mnist", goals, sys.argv[1:]))))
