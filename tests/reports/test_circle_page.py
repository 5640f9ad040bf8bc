"""The page of the relay's circle says what its rows say, of as many runs as there are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.relay_circle import EDGES, result_of
from benchmarks.relay_circle_page import circle_page

VALUES = {"relay": (0.81, 0.87), "no <b>relay</b>": (0.12, 0.14)}


def rows() -> list[dict[str, Any]]:
    measured = [(domain, name) for domain in EDGES for name in ("recognised", "caption_accuracy", "frechet")]
    return [
        {"variant": variant, "seed": seed, "cycle": cycle, "node": node, "domain": domain, "measure": name}
        | {"value": value * (cycle or 0.1)}
        for variant, values in VALUES.items()
        for seed, value in enumerate(values)
        for node in (*EDGES, "cloud")
        for cycle in ((0, 1) if node == "cloud" else (1,))
        for domain, name in [*measured, ("letters", "read")]
    ]


@pytest.fixture(scope="module")
def page() -> str:
    return circle_page(result_of(rows(), {"cycles": 1, "settings": []}))


def tables(page: str) -> Mapping[str, list[list[str]]]:
    """Rows of cells by caption."""
    found = ElementTree.fromstring(page).iter("table")
    return {
        one.findtext("caption") or "": [["".join(cell.itertext()) for cell in row] for row in one.findall("tbody/tr")]
        for one in found
    }


def test_each_model_has_a_table_of_what_every_variant_ended_with(page: str) -> None:
    found = tables(page)
    assert len(found) == len(EDGES) + 1
    for caption, cells in found.items():
        assert [row[0] for row in cells] == [*VALUES], caption
        for row, values in zip(cells, VALUES.values(), strict=True):
            mean, deviation = fmean(values), stdev(values)
            share, distance = f"{100 * mean:.1f} ± {100 * deviation:.1f} %", f"{mean:.1f} ± {deviation:.1f}"
            assert row[1:] == [share, share, distance] * len(EDGES)


def test_the_cloud_comes_first_and_each_model_has_its_plots(page: str) -> None:
    titles = [title.text for title in ElementTree.fromstring(page).iter("h2")]
    assert titles == ["The model of cloud", "The model of edge-0", "The model of edge-1"]
    assert len(re.findall("<svg ", page)) == len(titles)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_what_was_not_run_to_its_end_is_shown_so_far() -> None:
    left = [row for row in rows() if row["variant"] == "relay" and row["seed"] == 0]
    page = circle_page(result_of(left, {"cycles": 1, "settings": []}))
    assert "relay 1 seed;" in page
    assert [row[0] for row in tables(page)["After the last cycle: mean ± standard deviation of cloud's model"]] == [
        "relay"
    ]
