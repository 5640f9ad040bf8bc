"""How much CPU time everything took that a benchmark started, whoever its parent was."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psutil


@dataclass
class CpuClock:
    """CPU time of all descendants: the larger of two figures that both may miss some.

    What was reaped misses whoever ended under a parent that does not wait for it; what was seen alive ten times a
    second misses the last moments.
    """

    seen_s: dict[tuple[int, float], float] = field(default_factory=dict)
    cpu_s: float = 0.0

    def look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error), process.oneshot():
                times = process.cpu_times()
                self.seen_s[process.pid, process.create_time()] = times.user + times.system

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[CpuClock]:
        """Look until the block ends; then end all descendants that are left, and put the sum into `cpu_s`."""
        clock, stop, before_s = cls(), threading.Event(), _reaped_s()

        def watch() -> None:
            while not stop.wait(0.1):
                clock.look()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield clock
        finally:
            stop.set()
            thread.join()
            clock.look()
            _end_descendants()
            clock.cpu_s = max(sum(clock.seen_s.values()), _reaped_s() - before_s)


def _reaped_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def adopt_orphans() -> None:
    """Descendants whose parents end become children of this process, on Linux: prctl(2), PR_SET_CHILD_SUBREAPER."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def _end_descendants() -> None:
    """Ask, wait, then end them hard; reap all."""
    left = psutil.Process().children(recursive=True)
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in left:
            with suppress(psutil.Error):
                end(process)
        _, left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=10)
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
