"""The fork server that node processes come from: it has imported everything once. Imports no torch itself.

Started early, it imports while the launcher imports the same; on two cores the two take no longer than one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

PRELOAD = ["ecogen.node.quiet", "__main__", "ecogen.node.process"]


def fork_server() -> ForkServerContext:
    """Where to get processes from; the server is started by the first call, and ends with this process.

    SIGTERM is blocked in them: a whole process group may get it, and who forked them ends them in order.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    resource_tracker.ensure_running()  # or the server's start would start it, which unblocks signals
    own = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of this thread; what it starts inherits it
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, own)
    return context


def heed_sigterm() -> None:
    """From now on, in a process that was forked and is to end by it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
