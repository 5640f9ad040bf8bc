"""Energy counters through a made-up sysfs, and the description of this host."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ecogen.metering.hardware import describe_host, open_rapl, peak_memory_bytes

LIMIT_UJ = 1_000_000


def domain(root: Path, folder: str, name: str, energy_uj: int) -> Path:
    path = root / folder
    path.mkdir()
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{LIMIT_UJ}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    return path / "energy_uj"


def test_both_packages_count_across_their_own_wraps(tmp_path: Path) -> None:
    first = domain(tmp_path, "intel-rapl:0", "package-0", 900_000)
    second = domain(tmp_path, "intel-rapl:1", "package-1", 100_000)
    rapl = open_rapl(tmp_path)
    assert rapl is not None
    assert rapl.energy_j() == 0
    first.write_text("200000")  # wrapped: 100,000 to the limit and 200,000 on
    second.write_text("600000")
    assert rapl.energy_j() == pytest.approx(0.8)
    first.write_text("300000")
    second.write_text("50000")  # wrapped: 400,000 and 50,000
    assert rapl.energy_j() == pytest.approx(1.35)


def test_memory_counts_and_what_overlaps_does_not(tmp_path: Path) -> None:
    names = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram", "intel-rapl:1": "psys"}
    counters = {name: domain(tmp_path, folder, name, 0) for folder, name in names.items()}
    domain(tmp_path, "intel-rapl-mmio:0", "package-0", 0)
    rapl = open_rapl(tmp_path)
    assert rapl is not None
    for counter in counters.values():
        counter.write_text("1000")
    assert rapl.energy_j() == pytest.approx(0.002)


def test_no_counters_is_none_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert open_rapl(tmp_path / "missing") is None
    assert "no readable RAPL package; joules are modelled" in caplog.text


def test_unreadable_counters_are_none(tmp_path: Path) -> None:
    domain(tmp_path, "intel-rapl:0", "package-0", 0).unlink()
    assert open_rapl(tmp_path) is None


def test_the_host_is_described_without_importing_anything() -> None:
    host = describe_host(["numpy", "no-such-package"])
    assert host.num_cores >= 1
    assert host.memory_bytes > 10**8
    assert set(host.versions) == {"python", "numpy"}
    assert host.cpu in str(host)


def test_peak_memory_stays_after_a_large_block_is_gone() -> None:
    block = bytearray(30_000_000)
    block[::4096] = b"x" * len(block[::4096])
    grown = peak_memory_bytes()
    del block
    assert grown > 30_000_000
    assert peak_memory_bytes() > 0.99 * grown  # the kernel counts resident pages in batches, so not to the page
