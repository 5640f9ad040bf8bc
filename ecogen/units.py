"""Units: SI inside the library, kWh, GB and percent only where people read or write.

A GB here is 10^9 bytes, as link speeds and energy intensities per GB are quoted; memory is in GiB of 2^30 bytes.
"""

from __future__ import annotations

GB = 10**9
MIB = 2**20
GIB = 2**30
MBIT_PER_S_IN_BYTES_PER_S = 1e6 / 8
JOULES_PER_KWH = 3.6e6


def kwh(energy_j: float) -> float:
    """Joules as kilowatt-hours."""
    return energy_j / JOULES_PER_KWH


def format_bytes(num_bytes: float) -> str:
    """A byte count for people: `format_bytes(12_800)` is `'12.8 kB'`."""
    return _scaled(num_bytes, "B")


def format_joules(energy_j: float) -> str:
    """An energy for people: `format_joules(1500)` is `'1.5 kJ'`."""
    return _scaled(energy_j, "J")


def format_seconds(seconds: float) -> str:
    """A duration for people: `format_seconds(0.0123)` is `'12.3 ms'`."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _scaled(value: float, unit: str) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
