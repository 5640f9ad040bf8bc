"""What FixMatch wins back on MNIST: `python -m benchmarks.few_labels_mnist [--out DIR] [--resume]`.

Skipped where MNIST is not: name its file by `--set data.path=FILE`, or its folder by ECOGEN_DATA.
"""

from __future__ import annotations

import sys

from benchmarks.few_labels import goals, lines
from benchmarks.study import carry_out
from benchmarks.table3_mnist import check_data

__all__ = ["lines"]

if __name__ == "__main__":
    check_data(sys.argv[1:])
    print("\n".join(lines(carry_out("few_labels-mnist", goals, sys.argv[1:]))))
