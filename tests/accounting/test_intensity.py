"""Carbon intensity: the quoted figures, their sources, and what an unknown zone gets to hear."""

from __future__ import annotations

import pytest

from ecogen.accounting.intensity import CODECARBON, INTENSITIES, Intensity, check_zones, intensity
from ecogen.errors import ConfigError

# codecarbon 3.3.2, as reference/energy.md quotes it.
QUOTED = {"FR": 56, "US": 369, "DE": 381, "CN": 582, "IN": 713}


@pytest.mark.parametrize(("zone", "g_per_kwh"), QUOTED.items())
def test_the_figures_are_those_quoted(zone: str, g_per_kwh: float) -> None:
    assert intensity(zone) == Intensity(g_per_kwh, CODECARBON)


def test_every_figure_names_its_source() -> None:
    assert all(entry.source and entry.g_per_kwh > 0 for entry in INTENSITIES.values())
    assert "IEA" in intensity("WORLD").source


@pytest.mark.parametrize(("zone", "hint"), [("fr", "'FR'"), ("FRA", "'FR'"), ("World", "did you mean 'WORLD'")])
def test_an_unknown_zone_lists_close_ones(zone: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"zone '{zone}' has no carbon intensity.*{hint}"):
        intensity(zone)


def test_all_unknown_zones_are_told_at_once_and_each_once() -> None:
    check_zones(["FR", "WORLD"])
    with pytest.raises(ConfigError) as caught:
        check_zones(["FRA", "FR", "XX", "FRA"])
    assert [problem[:10] for problem in caught.value.problems] == ["zone 'FRA'", "zone 'XX' "]


def test_a_zone_like_no_other_lists_all() -> None:
    with pytest.raises(ConfigError, match=r"known zones: AT, AU, .*, WORLD, ZA"):
        intensity("Q7#")


def test_the_table_is_the_callers_to_change() -> None:
    table = {**INTENSITIES, "FR": Intensity(20, "mine")}
    assert intensity("FR", table).g_per_kwh == 20
