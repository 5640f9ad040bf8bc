"""A recipe with a `[sweep]`: one recipe a case, every problem with the case that has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ecogen.config import Study, load, load_study
from ecogen.errors import ConfigError

TEXT = """
name = "pair"
[topology]
edges = 1
clusters_per_edge = 1
[data]
train = 200
[topology.sites]
cloud = { zone = "FR" }
[sweep]
seeds = [3, 4]
source = "somebody"
[[sweep.cases]]
name = "one"
reference = { first = 0.5, last = 0.75 }
[[sweep.cases]]
name = "two"
part = "more"
change = { topology.clusters_per_edge = 2, topology.sites.cloud.pue = 1.5, data.train = 400 }
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "pair.toml").write_text(TEXT)
    return tmp_path / "pair.toml"


def study_of(path: Path, *overrides: str) -> Study:
    study = load_study(path, overrides)
    assert study is not None
    return study


def test_a_case_is_the_recipe_with_its_change_section_by_section(path: Path) -> None:
    study = study_of(path)
    one, two = study.rows
    assert (study.name, study.sweep.seeds, study.sweep.source) == ("pair", (3, 4), "somebody")
    assert (one.num_clusters, one.recipe.data.train, one.case.part) == (1, 200, "table")
    assert (two.num_clusters, two.recipe.data.train, two.case.part) == (2, 400, "more")
    assert two.recipe.topology.edges == 1
    assert (two.recipe.topology.sites["cloud"].zone, two.recipe.topology.sites["cloud"].pue) == ("FR", 1.5)
    assert one.recipe.topology.sites["cloud"].pue == 1.0


def test_what_the_caller_sets_wins_over_a_case(path: Path) -> None:
    study = study_of(path, "data.train=50", "tuning.rounds=2", "sweep.seeds=[9]")
    assert [row.recipe.data.train for row in study.rows] == [50, 50]
    assert [row.recipe.tuning.rounds for row in study.rows] == [2, 2]
    assert study.sweep.seeds == (9,)


def test_a_recipe_without_a_sweep_is_no_study() -> None:
    assert load_study("digits") is None


def test_a_study_is_not_taken_for_one_run(path: Path) -> None:
    with pytest.raises(ConfigError, match="it is a study of many runs; `ecogen run` carries it out"):
        load(path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "two"', 'name = "one"', "sweep.cases: 'one', 'one' would share the folder 'one'; name them apart"),
        ('name = "two"', 'name = "One!"', "sweep.cases: 'one', 'One!' would share the folder 'one'; name them apart"),
        ('name = "two"', 'name = "±"', "sweep.cases: '±' gives no name for a folder"),
        ("seeds = [3, 4]", "seeds = [3, 4, 3]", "sweep.seeds: give each seed once, not [3, 4, 3]"),
        ("seeds = [3, 4]", "seeds = []", "sweep.seeds: list has too few values, not []"),
        ("seeds = [3, 4]", "sedes = [3]", "sweep.sedes: unknown key; did you mean 'seeds'?"),
        ('part = "more"', 'aprt = "more"', "sweep.cases.1.aprt: unknown key; did you mean 'part'?"),
        ("last = 0.75", "last = 75", "sweep.cases.0.reference.last: input should be less than or equal to 1"),
        ("data.train = 400", "data.trian = 400", "case 'two': 1 problem\n  data.trian: unknown key"),
        (
            "data.train = 400",
            "evaluation.split = 'none'",
            "a study is a table of accuracies; choose 'test' or 'validation' ",
        ),
        ("data.train = 400", "faults.update_factor = {'edge-0.cluster-0' = nan}", "input should be a finite number"),
        ("data.train = 400", "tuning = 5", "case 'two': 1 problem\n  tuning: input should be a section"),
    ],
)
def test_problems_say_where_they_are(path: Path, old: str, new: str, said: str) -> None:
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    assert said in str(caught.value)


def test_a_sweep_that_is_no_section_is_named(path: Path) -> None:
    path.write_text("sweep = 5\nname = 'pair'")
    with pytest.raises(ConfigError, match="sweep: input should be a section, not 5"):
        load_study(path)


def test_malformed_overrides_are_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set: sweep\.seeds\.x: 'seeds' is a value"):
        load_study(path, ["sweep.seeds.x=1"])
    with pytest.raises(ConfigError, match="--set: 'tuning' is not KEY=VALUE"):
        load_study(path, ["tuning"])


def test_a_row_of_a_pool_has_as_many_clusters_as_are_to_be_formed(path: Path) -> None:
    study = study_of(path, "topology.pool=[{count = 3}]")
    assert [row.num_clusters for row in study.rows] == [1, 2]
    with pytest.raises(ConfigError, match="a row of a study has a number of clusters, not 'auto'"):
        study_of(path, "topology.pool=[{count = 3}]", "topology.clusters_per_edge=auto")
