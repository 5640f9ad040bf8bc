"""Meters: how a node's seconds and FLOPs become `Usage`, window after window.

Windows are contiguous: `take` returns everything since the last `take` and begins the next window, so nothing is lost
and nothing counted twice. A reading costs microseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Literal, ParamSpec, Protocol, TypeVar

from ecogen.metering.hardware import peak_memory_bytes
from ecogen.records import Phase, Traffic, Usage

Scope = Literal["process", "thread"]
"""Whose CPU time counts: the whole process, for a node that has one; what went through `run`, where nodes share one."""

P = ParamSpec("P")
R = TypeVar("R")


class Meter(Protocol):
    """Everything measured passes through here."""

    def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's result, with its CPU time counted; called on the compute thread."""

    def add_flops(self, flops: float) -> None:
        """Count floating-point operations, by formula (`planning.cost`)."""

    def take(self, phase: Phase, traffic: tuple[Traffic, ...] = (), memory_bytes: int | None = None) -> Usage:
        """The usage since the last `take`; begins a new window.

        Args:
            memory_bytes: None lets the meter say what it knows.
        """


@dataclass(slots=True)
class _Reading:
    """Wall and CPU clocks at one moment, and what was added by then."""

    wall_ns: int
    cpu_ns: int
    flops: float


class CpuMeter:
    """Measures by the wall clock and a CPU clock of the operating system; safe to use from several threads.

    Args:
        scope: `"process"` reads the CPU time of the process, all threads together; `"thread"` adds up the thread CPU
            time of each `run`, which then belongs to the window in which it ended.
    """

    def __init__(self, node_id: str, scope: Scope = "process") -> None:
        self.node_id = node_id
        self._scope = scope
        self._lock = Lock()
        self._run_ns = 0
        self._flops = 0.0
        self._last = self._read()

    def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """As `Meter.run`; not nested, or the inner one would count twice."""
        began_ns = time.thread_time_ns()
        try:
            return function(*args, **kwargs)
        finally:
            ran_ns = time.thread_time_ns() - began_ns
            with self._lock:
                self._run_ns += ran_ns

    def add_flops(self, flops: float) -> None:
        with self._lock:
            self._flops += flops

    def take(self, phase: Phase, traffic: tuple[Traffic, ...] = (), memory_bytes: int | None = None) -> Usage:
        """As `Meter.take`; without `memory_bytes` a process says its peak so far, and a shared one nothing (0)."""
        with self._lock:
            last, now = self._last, self._read()
            self._last = now
        wall_s, cpu_s = (now.wall_ns - last.wall_ns) / 1e9, (now.cpu_ns - last.cpu_ns) / 1e9
        if memory_bytes is None:
            memory_bytes = peak_memory_bytes() if self._scope == "process" else 0
        return Usage(self.node_id, phase, wall_s, cpu_s, now.flops - last.flops, memory_bytes, traffic)

    def _read(self) -> _Reading:
        cpu_ns = time.process_time_ns() if self._scope == "process" else self._run_ns
        return _Reading(time.perf_counter_ns(), cpu_ns, self._flops)


class ModelledMeter:
    """Computes seconds instead of measuring them: CPU time is FLOPs / (FLOP/s), wall time is the caller's clock.

    Args:
        clock: virtual seconds, such as a simulator's.
    """

    def __init__(self, node_id: str, flops_per_s: float, clock: Callable[[], float]) -> None:
        self.node_id = node_id
        self._flops_per_s = flops_per_s
        self._clock = clock
        self._flops = 0.0
        self._began_s = clock()

    def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    def add_flops(self, flops: float) -> None:
        self._flops += flops

    def take(self, phase: Phase, traffic: tuple[Traffic, ...] = (), memory_bytes: int | None = None) -> Usage:
        flops, self._flops = self._flops, 0.0
        now_s = self._clock()
        began_s, self._began_s = self._began_s, now_s
        cpu_s = flops / self._flops_per_s
        return Usage(self.node_id, phase, now_s - began_s, cpu_s, flops, memory_bytes or 0, traffic, "modelled")


def null_meter(node_id: str) -> ModelledMeter:
    """A meter whose seconds are all zero; FLOPs and traffic are kept. For tests of everything else."""
    return ModelledMeter(node_id, float("inf"), lambda: 0.0)
