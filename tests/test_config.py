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

POOL = "[topology]\nedges = 1\nclusters_per_edge = 2\npool = [{count = 3}]\n[topology.clusters]"


def problems_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        from_table(tomllib.loads(text))
    return caught.value.problems


def test_the_defaults_are_a_valid_recipe() -> None:
    assert from_table({}) == Recipe()


@pytest.mark.parametrize("name", builtin_names())
def test_built_in_recipes_load_and_round_trip(name: str) -> None:
    study = load_study(name)
    for recipe in [row.recipe for row in study.rows] if study else [load(name)]:
        assert from_table(to_table(recipe)) == recipe


def test_all_problems_are_told_at_once() -> None:
    problems = problems_of(
        """
        name = "a b"
        [tuning]
        roudns = 3
        batch_size = 0
        [topology.d2d]
        rtt_ms = -1
        mbit_per_s = 1
        [data.partition]
        across_edges = "fair"
        [model]
        patch_size = 5
        [compute.nodes.edge-9]
        device = "cpu"
        """
    )
    places = {problem.partition(":")[0] for problem in problems}
    assert places == {
        "compute.nodes.edge-9",
        "data.partition.across_edges",
        "model.patch_size",
        "name",
        "topology.d2d.rtt_ms",
        "tuning.batch_size",
        "tuning.roudns",
    }
    assert len(problems) == 7


def test_what_a_wrong_value_contradicts_is_not_told_twice() -> None:
    (problem,) = problems_of("[tuning]\nbatch_size = 0\nmicrobatches = 30")
    assert problem.startswith("tuning.batch_size: ")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[tuning]\nroudns = 3", "tuning.roudns: unknown key; did you mean 'rounds'?"),
        ("[tunning]\nrounds = 3", "tunning: unknown key; did you mean 'tuning'?"),
        ("[topology.sites.cloud]\nzoen = 'DE'", "topology.sites.cloud.zoen: unknown key; did you mean 'zone'?"),
        ("[placement]\nxyzzy = 1", "placement.xyzzy: unknown key; valid keys: labels, cuts, cuts_of"),
        ("[tuning]\nmicrobatches = 30\nbatch_size = 20", "tuning.microbatches: 30 is more than tuning.batch_size 20"),
        ("[model]\npatch_size = 5", "model.patch_size: 5 does not divide model.image_size 28"),
        ("[model]\nnum_heads = 3", "model.num_heads: 3 does not divide model.hidden_size 128"),
        (
            "[tunables]\nprompts = 0\nlora_rank = 0\nhead = false",
            "tunables: nothing to tune; set prompts, lora_rank, ia3, bottleneck, head or backbone",
        ),
        ("[compute.nodes.edge-9]\ndevice = 'cpu'", "compute.nodes.edge-9: no such name in this topology; did you mean"),
        ("[compute]\ndevice = 'gpu'", "compute.device: string should match pattern"),
        ("[tunables]\nlora_targets = ['query']", "tunables.lora_targets.0: input should be 'q_proj', 'k_proj'"),
        ("[tunables]\nlora_targets = []", "tunables.lora_targets: name one projection or more"),
        ("[tunables]\nia3 = true", "tunables.ia3: a PEFT directory holds LoRA or IA3, not both; set lora_rank = 0 or"),
        (
            "[tunables.blocks.'2..5']\nprompts = 1",
            "tunables.blocks.2..5: name blocks from first_block 0 up, at most",
        ),
        ("[tunables.blocks.two]\nprompts = 1", "tunables.blocks.two"),
        (
            "[tunables.blocks.'0..2']\nlora_rnak = 1",
            "tunables.blocks.0..2.lora_rnak: unknown key; did you mean",
        ),
        (
            "[tunables]\nfirst_block = 1\n[tunables.blocks.'0..2']\nprompts = 1",
            "tunables.blocks.0..2: name blocks from first_block 1 up, at most 1..4",
        ),
        (
            "[tunables.blocks.'0..2']\nprompts = 1\n[tunables.blocks.'1..3']\nprompts = 2",
            "tunables.blocks.1..3: has blocks in common with '0..2'; name each once",
        ),
        (
            "[tunables]\nprompt_depth = 'shallow'\nblocks = { '0..2' = { prompts = 1 } }",
            "tunables.blocks.0..2.prompts: shallow prompts enter once, at first_block",
        ),
        (
            "[tunables.cluster_ranks]\n'edge-0.cluster-0' = 5",
            "tunables.cluster_ranks.edge-0.cluster-0: 5 is more than the edge's LoRA rank, 4",
        ),
        (
            "[tunables.cluster_ranks]\n'edge-0.cluster-9' = 2",
            "tunables.cluster_ranks.edge-0.cluster-9: no such name in this topology",
        ),
        (
            "[tunables]\nlora_kind = 'dora'\ncluster_ranks = { 'edge-0.cluster-0' = 2 }",
            "tunables.cluster_ranks, aggregation.lora: what DoRA learns is no product of its factors: use 'lora' or",
        ),
        (
            "[tunables]\nlora_kind = 'dora'\n[aggregation]\nlora = 'products'",
            "tunables.cluster_ranks, aggregation.lora: what DoRA learns",
        ),
        (
            "[tunables.cluster_ranks]\n'edge-0.cluster-0' = 2\n[aggregation]\nstrategy = 'median'",
            "tunables.cluster_ranks: 'median' compares clusters number by number, and those of less rank lack some",
        ),
        ("[tunables]\nfirst_block = 5", "tunables.first_block: 5 is more than model.num_blocks 4"),
        ("[data]\nowners = 9", "data.owners: 9 is more than topology.devices_per_cluster 3"),
        ("[placement]\ncuts = 'autoo'", "placement.cuts: input should be 'auto' or a list, not 'autoo'"),
        ("[placement]\ncuts = [1, 0]", "placement.cuts.1: input should be greater than or equal to 1, not 0"),
        ("[topology]\nedge = 5", "topology.edge: input should be a section, not 5; did you mean 'edges'?"),
        ("[topology]\nsites = 5", "topology.sites: input should be a section, not 5"),
        ("[topology.d2d]\nrtt_ms = 1", "topology.d2d.mbit_per_s: is required"),
        ("[tuning]\nrounds = 'four'", "tuning.rounds: input should be a whole number, not 'four'"),
        ("[pretraining]\nsteps = nan", "pretraining.steps: input should be a finite number, not nan"),
        ("[pretraining]\nsteps = -3", "pretraining.steps: input should be greater than or equal to 1, not -3"),
        ("[pretraining]\nstep = 3", "pretraining.step: unknown key; did you mean 'steps'?"),
        ("[model]\nhidden_size = 6\nnum_heads = 2", "model.hidden_size: input should be a multiple of 4, not 6"),
        ("[faults.update_factor]\n'edge-0.cluster-9' = 2", "faults.update_factor.edge-0.cluster-9: no such name in"),
        (
            "[aggregation]\nbuffer = 4",
            "aggregation.buffer: 4 is more than an edge's 3 clusters",
        ),
        (
            "[aggregation]\nbuffer = 2\nstrategy = 'median'",
            "aggregation.buffer: median needs 0, not 2: one cluster may have several updates in a buffer",
        ),
        (
            "[aggregation]\nbuffer = 2\nstrategy = 'scaffold'",
            "aggregation.buffer: scaffold needs 0, not 2: a cluster begins its next attempt before",
        ),
        (
            "[wire]\nupdates = 'int8'\n[aggregation]\nbuffer = 2",
            "wire.updates: what int8 leaves of a change is added to the next one, but with aggregation.buffer that",
        ),
        (
            "[wire]\nupdates = 'bfloat16'\n[aggregation]\nlora = 'products'",
            "wire.updates: what bfloat16 leaves of a change is added to the next one, but averaging LoRA's products",
        ),
        (
            "[topology]\nedges = 1_000_000_000",
            "topology.edges, topology.clusters_per_edge, topology.devices_per_cluster: 9000000000 nodes are more",
        ),
        (
            "[topology]\nedges = 1\npool = [{ count = 100_000_000 }]",
            "topology.pool: 100000000 nodes are more than the 1000000 there may be",
        ),
        (
            "[aggregation]\nstrategy = 'multi_krum'\nfaulty = 3",
            "aggregation.faulty: 3 of an edge's 3 clusters leave none to trust",
        ),
        (
            "[tunables.cluster_ranks]\n'edge-0.cluster-0' = 2\n[aggregation]\nstrategy = 'scaffold'\nlora = 'factors'",
            "tunables.cluster_ranks: 'scaffold' compares clusters number by number",
        ),
        ("[data.labels_of_edges]\nedge-0 = [1]", "data.labels_of_edges.edge-0: list has too few values, not [1]"),
        ("[wire]\norders = 'int4'", "wire.orders: input should be 'float32', 'bfloat16' or 'int8', not 'int4'"),
        ("[aggregation]\nserver_rate = -1", "aggregation.server_rate: input should be greater than or equal to 0"),
        ("[faults.slow]\n'edge-0.cluster-0.device-9' = 2", "faults.slow.edge-0.cluster-0.device-9: no such name in"),
        ("[faults.slow]\nedge-0 = 2", "faults.slow.edge-0: no such name in"),
        (
            "[faults.slow]\n'edge-0.cluster-0.device-0' = 0.5",
            "faults.slow.edge-0.cluster-0.device-0: input should be greater than or equal to 1, not 0.5",
        ),
        (
            "[faults.slow]\n'edge-0.cluster-0.device-0' = inf",
            "faults.slow.edge-0.cluster-0.device-0: input should be a finite number, not inf",
        ),
        ("[evaluation]\ninversion = 'maybe'", "evaluation.inversion: input should be true or false, not 'maybe'"),
        ("[topology]\nclusters_per_edge = 'auto'", "topology.clusters_per_edge: 'auto' forms clusters of a pool; give"),
        (
            "[topology.clusters]\n'edge-0.cluster-0' = ['a']",
            "topology.clusters: names devices of a pool; give topology",
        ),
        (
            "[topology]\nedges = 1\npool = [{count = 2}]",
            "topology.pool: edge-0 has 2 devices for 3 clusters; add devices",
        ),
        (
            "[topology]\nedges = 1\npool = [{count = 3}, {edge = 'edge-1'}]",
            "topology.pool.1.edge: no edge 'edge-1' in this topology; valid: edge-0",
        ),
        ("[topology]\nedges = 1\npool = [{counts = 3}]", "topology.pool.0.counts: unknown key; did you mean 'count'?"),
        (f"{POOL}\n'edge-0.cluster-0' = []", "topology.clusters.edge-0.cluster-0: has no device; name one or more"),
        (f"{POOL}\n'edge-0.clutser-0' = ['edge-0.device-0']", "topology.clusters.edge-0.clutser-0: a cluster is named"),
        (
            f"{POOL}\n'edge-0.cluster-0' = ['edge-0.device-3']",
            "topology.clusters.edge-0.cluster-0: no device 'edge-0.device-3' in the pool of 'edge-0'; did you mean",
        ),
        (
            f"{POOL}\n'edge-0.cluster-0' = ['edge-0.device-1', 'edge-0.device-1']",
            "topology.clusters.edge-0.cluster-0: 'edge-0.device-1' is named twice; a device is in one cluster",
        ),
        (f"[placement]\ncuts = [1]\n{POOL}", "placement.cuts: forming clusters chooses their cuts; leave it out, or"),
        (
            "[placement.cuts_of]\n'edge-9.cluster-0' = [1, 2]",
            "placement.cuts_of.edge-9.cluster-0: no such name in this",
        ),
        (
            "[placement.cuts_of]\n'edge-0.cluster-1' = [1]",
            "placement.cuts_of.edge-0.cluster-1: [1] does not divide the model over 3 devices; give 2 rising cuts",
        ),
        (
            "[placement.cuts_of]\n'edge-0.cluster-1' = [3, 1]",
            "placement.cuts_of.edge-0.cluster-1: [3, 1] does not divide the model over 3 devices; give 2 rising cuts",
        ),
        ("seed = 9223372036854775808", "seed: input should be less than 9223372036854775808"),
        ("name = '..'", "name: string should match pattern"),
        ("[topology.sites.cloud]\npue = inf", "topology.sites.cloud.pue: input should be a finite number"),
        ("[tuning]\nlearning_rate = inf", "tuning.learning_rate: input should be a finite number, not inf"),
    ],
)
def test_a_problem_names_its_place_its_value_and_the_next_step(text: str, problem: str) -> None:
    (found,) = problems_of(text)
    assert found.startswith(problem)


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
