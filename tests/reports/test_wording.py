"""How figures read, and that a recipe written as TOML is the same recipe."""

from __future__ import annotations

import tomllib

import pytest

from ecogen.config import from_table, load, to_table
from ecogen.placement import Segment
from ecogen.reports.drawing import shorthand
from ecogen.reports.toml import to_toml
from ecogen.reports.wording import format_grams, format_number, format_share, plural, short_id


@pytest.mark.parametrize(
    ("grams", "text"), [(0.0, "0 g"), (4.2e-7, "0.42 µg"), (0.0123, "12.3 mg"), (7.0, "7 g"), (2.5e6, "2.5 t")]
)
def test_grams(grams: float, text: str) -> None:
    assert format_grams(grams) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0123, "0.0123"),
        (3.4, "3.40"),
        (123.4, "123"),
        (999.7, "1 000"),
        (388_421, "388 000"),
        (3e-5, "3.0e-05"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert format_number(value).replace("\N{NARROW NO-BREAK SPACE}", " ") == text


def test_shares_counts_and_names() -> None:
    assert format_share(0.9644) == "96.4 %"
    assert format_share(None) == "\N{EN DASH}"
    assert (plural(1, "round"), plural(0, "round")) == ("1 round", "0 rounds")
    assert short_id("edge-0.cluster-1.device-2") == "device-2"


def test_a_device_in_a_few_characters() -> None:
    dash = "\N{EN DASH}"
    assert shorthand([Segment(0, 2, has_embedding=True), Segment(4, 4, has_head=True)]) == f"E 0{dash}1 H"
    assert shorthand([Segment(2, 3)]) == "2"


def test_a_recipe_survives_toml() -> None:
    recipe = load("digits", ["tunables.lora_targets=['q_proj', 'k_proj']", "placement.cuts=[1, 3]"])
    assert from_table(tomllib.loads(to_toml(to_table(recipe)))) == recipe


def test_odd_keys_and_strings_survive_toml() -> None:
    table = {"a": 1, "b c": {"d.é": 'x\n"y"\x7f\u0001😀', "empty": {}}, "e": [True, 1.5e-9, "z"]}
    assert tomllib.loads(to_toml(table)) == table
