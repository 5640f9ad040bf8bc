"""Grid carbon intensity by zone: annual averages in gCO2e per kWh, each with its source.

Location-based averages, as the SCI specification asks; no market-based factors. A caller who knows better passes a
table of its own: `INTENSITIES | {"FR": Intensity(21.3, "RTE eCO2mix, 2025")}`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ecogen.errors import ConfigError

CODECARBON = "codecarbon 3.3.2, global_energy_mix.json, annual average of 2023"
IEA = "IEA Global Energy and CO2 Status Report 2019, world average of 2018, as codecarbon 3.3.2 quotes it"


@dataclass(frozen=True, slots=True)
class Intensity:
    """Grams of CO2e a kWh of a zone's grid, and who says so."""

    g_per_kwh: float
    source: str


_CODECARBON_G_PER_KWH = {
    "AT": 111, "AU": 549, "BR": 98, "CA": 170, "CH": 35, "CN": 582, "DE": 381, "ES": 174, "FI": 79, "FR": 56,
    "GB": 238, "IE": 291, "IN": 713, "IT": 331, "JP": 485, "KR": 431, "NL": 268, "NO": 30, "PL": 662, "SE": 41,
    "SG": 471, "US": 369, "ZA": 708,
}  # fmt: skip

INTENSITIES: Mapping[str, Intensity] = {
    "WORLD": Intensity(475, IEA),
    **{zone: Intensity(value, CODECARBON) for zone, value in _CODECARBON_G_PER_KWH.items()},
}
"""Zones by ISO 3166-1 alpha-2 code, and WORLD."""


def intensity(zone: str, table: Mapping[str, Intensity] = INTENSITIES) -> Intensity:
    """The carbon intensity of a zone.

    Raises:
        ConfigError: if the table lacks the zone; it lists the closest ones.
    """
    check_zones([zone], table)
    return table[zone]


def check_zones(zones: Iterable[str], table: Mapping[str, Intensity] = INTENSITIES) -> None:
    """Refuse zones that a table lacks.

    Raises:
        ConfigError: with all of them, and the closest ones there are.
    """
    unknown = [zone for zone in dict.fromkeys(zones) if zone not in table]
    if unknown:
        raise ConfigError([_unknown(zone, table) for zone in unknown], "topology.sites")


def _unknown(zone: str, table: Mapping[str, Intensity]) -> str:
    close = difflib.get_close_matches(zone.upper(), table, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known zones: {', '.join(sorted(table))}"
    return f"zone {zone!r} has no carbon intensity; {hint}"
