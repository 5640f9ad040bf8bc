"""What every benchmark does alike: wait for a quiet machine, interleave what it compares, say where and when it ran."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from ecogen.storage import cache_folder

RESULTS = Path(__file__).parent / "results"

SKIPPED = 77  # the exit code by which automake's tests say so
_CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"

_PRESSURE = Path("/proc/pressure/cpu")
# Others on the machine disturb too much above this: percent of the last 10 s in which some task waited for a core.
QUIET_PRESSURE_PERCENT = 5.0
# And above this share of all cores in use.
QUIET_BUSY_PERCENT = 10.0


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of repeated measurements, in the unit of what was measured."""

    median: float
    lower_quartile: float
    upper_quartile: float
    num_runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least two values."""
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, len(values))

    def to_dict(self, digits: int = 4) -> dict[str, float]:
        return {
            "median": round(self.median, digits),
            "lower_quartile": round(self.lower_quartile, digits),
            "upper_quartile": round(self.upper_quartile, digits),
            "num_runs": self.num_runs,
        }


def cpu_pressure() -> float | None:
    """Percent of the last 10 s in which some task waited for a core; None where the kernel does not say."""
    try:
        first = _PRESSURE.read_text().split()
    except OSError:
        return None
    return float(first[1].removeprefix("avg10="))


def cpu_busy_percent(window_s: float = 1.0) -> float | None:
    """Percent of all cores that was in use during the next `window_s`; None where the kernel does not say."""
    before = cpu_times()
    time.sleep(window_s)
    after = cpu_times()
    if before is None or after is None or after == before:
        return None
    return 100.0 * (1.0 - (after[0] - before[0]) / (after[1] - before[1]))


def wait_until_quiet(*, timeout_s: float = 60.0) -> dict[str, float | None]:
    """Wait, at most `timeout_s`, until others leave the cores alone; returns how it was then, for the record.

    Pressure alone does not see one busy process on one of two cores, which already slows what needs both.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        busy, pressure = cpu_busy_percent(), cpu_pressure()
        is_quiet = (pressure or 0.0) < QUIET_PRESSURE_PERCENT and (busy or 0.0) < QUIET_BUSY_PERCENT
        if is_quiet or time.monotonic() >= deadline:
            return {"cpu_pressure_percent": pressure, "cpu_busy_percent": None if busy is None else round(busy, 1)}


async def interleaved(
    contenders: Mapping[str, Callable[[], Awaitable[float]]], *, rounds: int, warm_up: int = 2
) -> dict[str, Spread]:
    """Run all contenders in turn, round after round, so that a disturbance hits all; each returns its figure."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(warm_up + rounds):
        for name, measure in contenders.items():
            figure = await measure()
            if index >= warm_up:
                figures[name].append(figure)
    return {name: Spread.of(values) for name, values in figures.items()}


def circumstances(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Date, hardware, versions and command, as they belong beside every figure."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python " + " ".join(_module_arguments()),
        "hardware": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "versions": {"python": platform.python_version(), "kernel": platform.release()}
        | {package: _version(package) for package in packages},
    }


def median_of_worker(module: str, argument: str, num_cores: int) -> float:
    """The median of what `python -m MODULE --worker ARGUMENT` measures, pinned to the first cores.

    Its last line is a list of figures, as JSON.

    Raises:
        RuntimeError: if it fails.
    """
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, sorted(allowed)[:num_cores])
        command = [sys.executable, "-m", module, "--worker", argument]
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        os.sched_setaffinity(0, allowed)
    if done.returncode:
        raise RuntimeError(f"a run failed:\n{done.stderr[-3000:]}")
    return statistics.median(json.loads(done.stdout.splitlines()[-1]))


def skip(reason: str) -> NoReturn:
    """End this benchmark without a result, saying what it lacks."""
    print(f"skipped: {reason}")
    sys.exit(SKIPPED)


def peer_environment(name: str, packages: Sequence[str], *, first: Sequence[str] = ()) -> Path:
    """The Python of a virtual environment that holds another project's packages, made by pip where there is none yet.

    They never enter the project's own environment. The environments lie in `$ECOGEN_PEERS`, or in EcoGen's cache.

    Args:
        first: what is installed before the others, so that none of them brings another build of it.
    """
    folder = Path(os.environ.get("ECOGEN_PEERS") or cache_folder() / "peers") / name
    python = folder / "bin" / "python"
    wanted = "\n".join([*first, *packages])
    if not (folder / "packages").exists() or (folder / "packages").read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for together in filter(None, (first, packages)):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *together], check=True)
        (folder / "packages").write_text(wanted)
    return python


def pinned(names: Sequence[str]) -> list[str]:
    """Packages in the versions that the project itself has, for a peer that runs some of its code."""
    pins = dict(line.split("==") for line in _CONSTRAINTS.read_text().splitlines() if "==" in line and line[0] != "#")
    return [f"{name}=={pins[name]}" for name in names]


def write_result(name: str, result: Mapping[str, Any]) -> Path:
    """Write benchmarks/results/<name>.json and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def cpu_times() -> tuple[int, int] | None:
    """Idle and total time of all cores since boot, in ticks."""
    try:
        ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    return ticks[3] + ticks[4], sum(ticks)


def _module_arguments() -> list[str]:
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", specification.name, *sys.argv[1:]] if specification is not None else list(sys.argv)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
