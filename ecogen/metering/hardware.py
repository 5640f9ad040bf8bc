"""What this machine says about itself: energy counters where it has any, peak memory, and its description.

Most virtual machines and containers have no counters. Then there is None, and joules are modelled; nothing is guessed.
"""

from __future__ import annotations

import logging
import os
import platform
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from ecogen.units import GIB

logger = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")
PACKAGES = ("ecogen", "numpy", "torch", "transformers", "peft", "grpcio")


@dataclass(slots=True)
class _Counter:
    """One RAPL domain: microjoules that wrap to zero at `limit_uj`."""

    path: Path
    limit_uj: int
    last_uj: int
    total_uj: int = 0

    def advance(self) -> int:
        """Read the counter; returns the microjoules since it was opened."""
        now_uj = int(self.path.read_text())
        passed_uj = now_uj - self.last_uj
        # Wraps at max_energy_range_uj, after minutes to hours: Documentation/power/powercap/powercap.rst.
        self.total_uj += passed_uj if passed_uj >= 0 else passed_uj + self.limit_uj
        self.last_uj = now_uj
        return self.total_uj


class Rapl:
    """The energy counters of all processor packages and their memory.

    They count the whole machine, so they check a run as a whole and bill no single node. Read at least once a wrap.
    """

    def __init__(self, counters: Sequence[_Counter]) -> None:
        self._counters = list(counters)

    def energy_j(self) -> float:
        """Measured joules since the counters were opened."""
        return sum(counter.advance() for counter in self._counters) / 1e6


def open_rapl(root: Path = POWERCAP) -> Rapl | None:
    """The machine's energy counters; None, with the reason logged, where it has none or they are not readable."""
    # Domains are intel-rapl:N and intel-rapl:N:M, on AMD too; intel-rapl-mmio repeats them, and psys, core and uncore
    # overlap with their package.
    domains = [path for path in sorted(root.glob("intel-rapl:*")) if _counts(path)]
    if not domains:
        logger.info("no energy counters: %s has no readable RAPL package; joules are modelled", root)
        return None
    try:
        return Rapl([_open_counter(domain) for domain in domains])
    except OSError as problem:
        # Since CVE-2020-8694 energy_uj belongs to root.
        logger.info("no energy counters: %s; joules are modelled", problem)
        return None


def _counts(domain: Path) -> bool:
    try:
        name = (domain / "name").read_text().strip()
    except OSError:
        return False
    return name.startswith("package") or name == "dram"


def _open_counter(domain: Path) -> _Counter:
    limit_uj = int((domain / "max_energy_range_uj").read_text())
    return _Counter(domain / "energy_uj", limit_uj, int((domain / "energy_uj").read_text()))


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far."""
    # Not ru_maxrss alone: on Linux a process begins with that of the one that started it, getrusage(2).
    try:
        _, found, rest = Path("/proc/self/status").read_bytes().partition(b"VmHWM:")
    except OSError:
        found, rest = b"", b""
    if found:
        return int(rest.split(None, 1)[0]) * 1024  # its kB are KiB: proc_pid_status(5)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


@dataclass(frozen=True, slots=True)
class Host:
    """The machine and the software that a figure was taken on.

    Attributes:
        num_cores: this process may use; not all that the machine has.
        has_counters: whether energy can be measured here.
    """

    cpu: str
    num_cores: int
    memory_bytes: int
    system: str
    has_counters: bool
    versions: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counters = "energy counters" if self.has_counters else "no energy counters"
        return f"{self.system}, {self.cpu}, {self.num_cores} cores, {self.memory_bytes / GIB:.1f} GiB, {counters}"


def describe_host(packages: Sequence[str] = PACKAGES) -> Host:
    """This machine and the versions of what is installed of `packages`; imports none of them."""
    return Host(
        cpu=_cpu_model(),
        num_cores=_num_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        has_counters=open_rapl() is not None,
        versions={"python": platform.python_version()} | _versions(packages),
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown CPU"


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
