"""The fork server that node processes come from: it has imported everything once. Imports no torch itself.

Started early, it imports while the launcher imports the same; on two cores the two take no longer than one.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

PRELOAD = ["ecogen.node.quiet", "__main__", "ecogen.node.process"]


def fork_server() -> ForkServerContext:
    """Where to get processes from; the server is started by the first call, and ends with this process."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()
    return context
