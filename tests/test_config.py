"""Recipes: TOML in, frozen values out, every problem in one error with its place and the nearest valid key."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from ecogen import config
from ecogen.config import Recipe, build_topology, builtin_names, compute_of, from_table, load, load_study, to_table
from ecogen.errors import ConfigError
from ecogen.reports.toml import to_toml
from ecogen.topology import Tier


def test_the_defaults_are_a_valid_recipe() -> None:
    assert from_table({}) == Recipe()


@pytest.mark.parametrize("name", builtin_names())
def test_built_in_recipes_load_and_round_trip(name: str) -> None:
    study = load_study(name)
    for recipe in [row.recipe for row in study.rows] if study else [load(name)]:
        assert from_table(to_table(recipe)) == recipe


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().tuning.rounds = 3


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("tuning.rounds=4", ("tuning", "rounds"), 4),
        ("placement.labels=end", ("placement", "labels"), "end"),
        ('name="quoted"', ("name",), "quoted"),
        ("tunables.head=false", ("tunables", "head"), False),
        ("placement.cuts=[1, 2]", ("placement", "cuts"), (1, 2)),
        ("topology.sites.cloud.zone=FR", ("topology", "sites", "cloud", "zone"), "FR"),
        ("topology.devices.edge-0.memory_gib=2", ("topology", "devices", "edge-0", "memory_gib"), 2.0),
        (
            "topology.devices.edge-0.cluster-0.device-1.gflops=7",
            ("topology", "devices", "edge-0.cluster-0.device-1", "gflops"),
            7.0,
        ),
        (
            'compute.nodes."edge-1.cluster-2.device-0".dtype=bfloat16',
            ("compute", "nodes", "edge-1.cluster-2.device-0", "dtype"),
            "bfloat16",
        ),
        ("tuning.learning_rate = 1e-3", ("tuning", "learning_rate"), 1e-3),
        ("placement.cuts_of.edge-0.cluster-1=[1, 3]", ("placement", "cuts_of", "edge-0.cluster-1"), (1, 3)),
    ],
)
def test_a_value_can_be_set_from_outside(override: str, place: tuple[str, ...], value: object) -> None:
    found: object = load("digits", [override])
    for part in place:
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value


@pytest.mark.parametrize("override", ["tuning.rounds", "=3", "name.part=1", "tuning..rounds=1", "a b=1"])
def test_an_override_that_is_none_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"recipe 'digits': 1 problem\n  --set: "):
        load("digits", ["name=x", override])


def test_all_overrides_that_are_none_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load("digits", ["tuning.rounds", "name.y=x", "a b=1", "tuning.batch_size=0", "seed.x=1", "topology.edges=0"])
    assert [problem.partition(" is ")[0] for problem in caught.value.problems[:4]] == [
        "--set: 'tuning.rounds'",
        "--set: 'a b'",
        "--set: name.y: 'name'",
        "--set: seed.x: 'seed'",
    ]
    assert {problem.partition(":")[0] for problem in caught.value.problems[4:]} == {
        "tuning.batch_size",
        "topology.edges",
    }


def test_an_override_holds_one_value() -> None:
    with pytest.raises(ConfigError, match=r"tuning\.rounds: input should be a whole number"):
        load("digits", ["tuning.rounds=2\nseed=3"])


def test_a_later_override_wins() -> None:
    assert load("digits", ["tuning.rounds=2", "tuning.rounds=5"]).tuning.rounds == 5


def test_a_file_that_is_missing_or_no_toml_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read it: No such file.*built-in recipes: .*digits"):
        load(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("rounds = = 3")
    with pytest.raises(ConfigError, match="not TOML"):
        load(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read it"):
        load(tmp_path / "binary.toml")
    with pytest.raises(ConfigError, match="cannot read it"):
        load("digitz")


def test_what_is_no_table_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="it is empty; a recipe says at least its name"):
        load(tmp_path / "empty.toml")
    with pytest.raises(ConfigError, match=r"the whole: input should be a section, not \[\]"):
        from_table([])  # type: ignore[arg-type]


def test_the_topology_is_as_large_as_the_recipe_says() -> None:
    recipe = from_table({"topology": {"edges": 2, "clusters_per_edge": 3, "devices_per_cluster": 4}})
    topology = build_topology(recipe.topology)
    assert len(topology.nodes) == 1 + 2 + 2 * 3 * 4
    assert len(topology.clusters) == 6
    assert topology.nodes["edge-1.cluster-2.device-3"].tier is Tier.END


def test_one_node_may_be_another_machine() -> None:
    recipe = from_table(
        {
            "topology": {"devices": {"edge-0": {"memory_gib": 2}}, "end": {"gflops": 7}},
            "compute": {"dtype": "bfloat16", "nodes": {"cloud": {"device": "cpu"}}},
        }
    )
    topology = build_topology(recipe.topology)
    assert topology.nodes["edge-0"].device.memory_bytes == 2 * 2**30
    assert topology.nodes["edge-1"].device.memory_bytes == 16 * 2**30
    assert topology.nodes["edge-0.cluster-0.device-0"].device.flops_per_s == 7e9
    assert compute_of(recipe, "cloud").dtype == "float32"
    assert compute_of(recipe, "edge-0").dtype == "bfloat16"


def test_sections_travel_alone() -> None:
    spec = config.Tunables(prompts=3, lora_targets=("q_proj",))
    assert config.section_from_table(config.Tunables, config.section_table(spec)) == spec
    with pytest.raises(ConfigError, match="promts: unknown key; did you mean 'prompts'"):
        config.section_from_table(config.Tunables, {"promts": 3})


def test_fewer_edges_by_override_leave_out_what_the_recipe_says_of_the_others() -> None:
    recipe = load("digits", ["topology.edges=1", "topology.clusters_per_edge=1"])
    assert set(recipe.topology.sites) == {"cloud", "edge-0", "edge-0.field"}
    assert len(build_topology(recipe.topology).nodes) == 5


def test_fewer_edges_by_override_do_not_hide_what_the_same_caller_says_of_the_others() -> None:
    with pytest.raises(ConfigError, match=r"topology\.sites\.edge-1: no such name"):
        load("digits", ["topology.sites.edge-1.zone=FR", "topology.edges=1"])
    with pytest.raises(ConfigError, match=r"topology\.devices\.edge-4: no such name"):
        load("digits", ["topology.devices.edge-4.gflops=1", "topology.edge_end={rtt_ms=1, mbit_per_s=1}"])


@pytest.mark.parametrize(
    "text", ["[topology]\nsites = 5", "[topology]\ndevices = [1]", "compute = 3", "[compute]\nnodes = 3"]
)
def test_fewer_edges_by_override_meet_sections_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(ConfigError, match="input should be a section"):
        load(tmp_path / "recipe.toml", ["topology.edges=1"])


def test_a_pool_round_trips_through_toml() -> None:
    text = "[topology]\nedges = 1\npool = [{count = 4, link = {rtt_ms = 1, mbit_per_s = 9}}, {gflops = 2}]"
    recipe = from_table(tomllib.loads(text))
    assert from_table(tomllib.loads(to_toml(to_table(recipe)))) == recipe
    assert from_table(to_table(recipe)) == recipe


def test_what_a_recipe_says_of_the_pools_devices_may_be_more() -> None:
    one = {"topology": {"edges": 1, "pool": [{"count": 3}], "devices": {"edge-0.device-2": {"gflops": 4}}}}
    assert build_topology(from_table(one).topology).nodes["edge-0.device-2"].device.flops_per_s == 4e9
    one["topology"]["devices"] = {"edge-0.device-3": {"gflops": 4}}
    with pytest.raises(ConfigError, match=r"topology\.devices\.edge-0\.device-3: no such name .* 'edge-0\.device-2'"):
        from_table(one)


def test_fewer_clusters_by_override_leave_out_the_cuts_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        "[placement.cuts_of]\n'edge-0.cluster-1' = [1, 3]\n'edge-0.cluster-0' = [2, 3]"
    )
    recipe = load(tmp_path / "recipe.toml", ["topology.clusters_per_edge=1"])
    assert recipe.placement.cuts_of == {"edge-0.cluster-0": (2, 3)}
