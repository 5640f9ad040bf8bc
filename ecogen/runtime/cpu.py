"""CPUs that promise more than they do: some virtual machines list AMX among their flags and then trap it.

The first bfloat16 product would end a node with SIGILL. oneDNN, which makes those products, can be told what to leave.
https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
from functools import cache

import torch

logger = logging.getLogger(__name__)

_VARIABLE, _WITHOUT_AMX = "ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16"
_PATIENCE_S = 10


@cache
def avoid_trapped_instructions() -> None:
    """Try a bfloat16 product in a child; if that ends it, let oneDNN do without AMX in this process.

    oneDNN reads its settings with its first product, so this comes before any. A setting that is there is kept.
    """
    if _VARIABLE not in os.environ and hasattr(os, "fork") and _signal_of_a_product() == signal.SIGILL:
        os.environ[_VARIABLE] = _WITHOUT_AMX
        logger.warning("this machine lists AMX and traps it: going on with %s=%s", _VARIABLE, _WITHOUT_AMX)


def _signal_of_a_product() -> int:
    """The signal that ended a child which computed a product; 0 for none."""
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()  # this one may die without a word
            signal.alarm(_PATIENCE_S)
            ones = torch.ones(64, 64, dtype=torch.bfloat16)
            torch.nn.functional.linear(ones, ones)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
