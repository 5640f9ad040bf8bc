"""Imported first by programs of our own: libraries say nothing of kernels that are for other platforms."""

from __future__ import annotations

import logging

for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
