"""Clusters formed of a pool, and clusters with cuts of their own: they run as any others, however unequal they are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ecogen.accounting.ledger import settle
from ecogen.config import Recipe, build_topology, from_table, load, to_table
from ecogen.engines.check import check_recipe
from ecogen.engines.forming import announced_shape, formed
from ecogen.engines.local import launch_local
from ecogen.errors import CheckpointError, ConfigError, PlacementError
from ecogen.models.profile import model_shape
from ecogen.planning.clusters import place_clusters, plan_clusters
from ecogen.records import RequestRecord
from ecogen.reports.tables import links_table
from ecogen.reports.toml import to_toml
from ecogen.tuning.making import vit_config
from ecogen.units import format_seconds
from tests.command import Ran, save_recipe
from tests.runs import finish, run
from tests.tiny import save_foundation, tiny_recipe

EcoGen = Callable[..., Ran]
RecipeOf = Callable[..., Recipe]

SHORT: dict[str, Any] = {"tuning": {"rounds": 1}, "evaluation": {"requests": 0}}
SLOW = {"rtt_ms": 9, "mbit_per_s": 40}
KIB = 2**-20  # in GiB


def pool(**rest: Any) -> dict[str, Any]:
    """One device as fast as three others together, and one that holds nothing."""
    rows = [
        {"gflops": 0.004},
        {"gflops": 0.002},
        {"count": 2, "gflops": 0.001, "link": SLOW},
        {"memory_gib": 9 * KIB},
    ]
    return {"edges": 1, "clusters_per_edge": 2, "pool": rows} | rest


@pytest.fixture(scope="module")
def four_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_foundation(tmp_path_factory.mktemp("four"), 4)


@pytest.fixture
def pooled(four_blocks: Path) -> RecipeOf:
    def make(**sections: Any) -> Recipe:
        sections.setdefault("topology", pool())
        return tiny_recipe(four_blocks, model={"num_blocks": 4}, **sections)

    return make


def test_what_is_formed_is_written_down_and_stays(pooled: RecipeOf) -> None:
    recipe = pooled()
    once = check_recipe(recipe)
    assert formed(recipe) == formed(once) == once
    assert from_table(json.loads(json.dumps(to_table(once)))) == once
    sizes = sorted(len(cluster.node_ids) for cluster in build_topology(once.topology).clusters.values())
    assert sizes == [1, 3]
    assert "edge-0.device-4" not in build_topology(once.topology).nodes
    placed = place_clusters(once, announced_shape(once))
    assert {name: tuple(p.node_ids) for name, p in placed.items()} == once.topology.clusters


def test_clusters_are_as_many_as_their_aggregation_needs(pooled: RecipeOf) -> None:
    """Where the pool says how many there are, nobody knows before they are formed."""
    robust = {"strategy": "trimmed_mean", "faulty": 5}
    with pytest.raises(ConfigError, match=r"aggregation\.faulty: trimmed_mean tolerates 5 among 11 clusters"):
        formed(pooled(topology=pool(clusters_per_edge="auto"), aggregation=robust))


def test_what_is_announced_is_what_the_model_is(pooled: RecipeOf) -> None:
    """Without torch and from the folder alone: the same sizes."""
    for recipe in (load("digits"), pooled()):
        config = vit_config(recipe.model)
        config.num_labels = 10
        assert announced_shape(recipe) == model_shape(config, recipe.tunables)


@pytest.mark.parametrize(("labels", "owners"), [("start", 1), ("end", 1), ("start", 2)])
async def test_unequal_clusters_learn_what_whole_models_learn(
    pooled: RecipeOf, tmp_path: Path, one_thread: None, labels: str, owners: int
) -> None:
    """However unequal the clusters, the tunables are those of clusters that hold everything on one device or two."""
    settings = {"placement": {"labels": labels}, "data": {"owners": owners}} | SHORT
    names = [f"edge-0.device-{index}" for index in range(5)]
    clusters = {"edge-0.cluster-0": names[:2], "edge-0.cluster-1": names[2:]}
    topology = pool() if owners == 1 else pool(pool=[{"count": 5}], clusters=clusters)
    split = await run(formed(pooled(topology=topology, **settings)), tmp_path / "split")
    assert all(record.missing == () and record.num_examples == 48 for record in split.rounds("edge-0"))
    alike = pooled(topology={"clusters_per_edge": 2, "devices_per_cluster": owners}, **settings)
    whole = await run(alike, tmp_path / "whole")
    for name, tensor in whole.tunables.items():
        torch.testing.assert_close(split.tunables[name], tensor, rtol=2e-4, atol=2e-6, msg=name)


async def test_a_request_takes_the_time_of_the_links_it_crosses(pooled: RecipeOf, tmp_path: Path) -> None:
    recipe = formed(pooled(tuning={"rounds": 1}, evaluation={"requests": 4}))
    topology = build_topology(recipe.topology)
    finished = await run(recipe, tmp_path)
    requests = [record for record in finished.records if isinstance(record, RequestRecord)]
    crossed = [hop for request in requests for hop in request.hops if hop.receiver_id]
    assert {request.cluster_id for request in requests} == set(topology.clusters)
    assert len({topology.link(hop.node_id, hop.receiver_id) for hop in crossed if hop.receiver_id}) > 1
    for hop in crossed:
        link = topology.link(hop.node_id, hop.receiver_id or "")
        assert link is not None
        assert hop.link_s == pytest.approx(link.seconds(hop.sent_bytes))
    ledger = settle(finished.records, topology)
    assert ledger.traffic_by_link()["d2d"] > 0
    assert set(ledger.by_node()) == set(topology.nodes)


async def test_each_cluster_may_have_its_own_cuts(recipe_of: RecipeOf, tmp_path: Path, one_thread: None) -> None:
    recipe = recipe_of(placement={"cuts": [1], "cuts_of": {"edge-0.cluster-1": [2]}}, **SHORT)
    plans = plan_clusters(recipe, announced_shape(recipe))
    assert {name: plan.cuts for name, plan in plans.items()} == {"edge-0.cluster-0": (1,), "edge-0.cluster-1": (2,)}
    own = await run(recipe, tmp_path / "own")
    alike = await run(recipe_of(placement={"cuts": [1]}, **SHORT), tmp_path / "alike")
    for name, tensor in alike.tunables.items():
        torch.testing.assert_close(own.tunables[name], tensor, rtol=2e-4, atol=2e-6, msg=name)


def test_own_cuts_that_do_not_fit_say_whose_they_are(recipe_of: RecipeOf) -> None:
    recipe = recipe_of(placement={"cuts_of": {"edge-0.cluster-1": [3]}})
    with pytest.raises(
        PlacementError, match=r"^placement\.cuts_of\.edge-0\.cluster-1: cuts \[3\] do not divide 3 blocks"
    ):
        check_recipe(recipe)


@pytest.mark.slow
async def test_processes_form_the_same_clusters(pooled: RecipeOf, tmp_path: Path) -> None:
    recipe = formed(pooled(engine="local", **SHORT))
    async with launch_local(recipe, tmp_path) as federation:
        finished = await finish(federation)
    (record,) = finished.rounds("edge-0")
    assert record.members == tuple(recipe.topology.clusters)


def test_a_run_of_a_pool_from_its_plan_to_its_predictions(ecogen: EcoGen, pooled: RecipeOf, tmp_path: Path) -> None:
    recipe, folder = save_recipe(pooled(), tmp_path / "pool.toml"), tmp_path / "run"
    planned = ecogen("plan", recipe, "--json").figures
    by_name = {cluster["cluster"]: cluster for cluster in planned["clusters"]}
    assert [left["device"] for left in planned["left_out"]] == ["edge-0.device-4"]
    assert planned["left_out"][0]["reason"].startswith("cannot hold one block: that needs ")
    assert 0 < planned["bound_s"] <= planned["slowest_s"] == max(c["slowest_s"] for c in by_name.values())
    for cluster in by_name.values():
        assert sorted(block for device in cluster["devices"] for block in device["blocks"]) == [0, 1, 2, 3]
        assert all(device["needs_bytes"] <= device["memory_bytes"] for device in cluster["devices"])
    ran = ecogen("run", recipe, "--out", folder, "--json")
    assert ran.code == 0, ran.err
    saved = json.loads((folder / "recipe.json").read_text())["topology"]["clusters"]
    assert saved == {name: [d["device"] for d in cluster["devices"]] for name, cluster in by_name.items()}
    assert ecogen("plan", folder / "recipe.toml", "--json").figures == planned
    again = ecogen("run", recipe, "--out", folder, "--resume", "--json")
    assert again.figures["accuracy"] == ran.figures["accuracy"]
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    assert ecogen("predict", folder, tmp_path / "black.png").code == 0
    shown = ecogen("plan", recipe)
    assert "Left out" in shown.out
    assert f"slowest stage {format_seconds(planned['slowest_s'])} " in shown.out


@pytest.mark.slow  # two whole runs
def test_a_study_of_a_pool_is_resumed(ecogen: EcoGen, pooled: RecipeOf, tmp_path: Path) -> None:
    """Its runs have their clusters written down, which its recipe has not."""
    sweep = '\n[sweep]\nseeds = [0]\n[[sweep.cases]]\nname = "one"\n'
    (tmp_path / "study.toml").write_text(to_toml(to_table(pooled(**SHORT))) + sweep)
    ran = ecogen("run", tmp_path / "study.toml", "--out", tmp_path / "study", "--json")
    assert ran.code == 0, ran.err
    again = ecogen("run", tmp_path / "study.toml", "--out", tmp_path / "study", "--resume", "--json")
    assert again.code == 0, again.err
    assert again.figures == ran.figures


def test_a_placement_without_a_pool_is_shown_too(ecogen: EcoGen) -> None:
    planned = ecogen("plan", "digits", "--set", "topology.edges=1", "--json").figures
    assert (planned["bound_s"], planned["left_out"], len(planned["clusters"])) == (None, [], 3)
    assert planned["examples_per_s"] == pytest.approx(3 * planned["microbatch"] / planned["slowest_s"])


def test_a_pool_that_is_too_small_says_what_would_do(ecogen: EcoGen, pooled: RecipeOf, tmp_path: Path) -> None:
    recipe = save_recipe(pooled(), tmp_path / "pool.toml")
    for verb in ("plan", "run"):
        refused = ecogen(
            verb, recipe, "--set", "topology.clusters_per_edge=5", *(["--out", tmp_path / "run"] * (verb == "run"))
        )
        assert refused.code == 2
        assert (
            "error: found no 5 clusters of the 5 devices at edge-0 that can hold the model; 4 can: set" in refused.err
        )
        assert not (tmp_path / "run").exists()
    none = ecogen("plan", recipe, "--set", "topology.pool=[{memory_gib=1e-6}]", "--set", "topology.clusters_per_edge=1")
    assert (none.code, "no 1 cluster of the 1 devices" in none.err) == (2, True)


def test_a_model_whose_size_is_not_known_forms_nothing(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="the sizes of 'hf:a/b' are not known before it is here; download it"):
        formed(from_table({"model": {"source": "hf:a/b"}, "topology": pool()}))
    with pytest.raises(CheckpointError, match=r"none is no model folder: its config\.json cannot be read"):
        announced_shape(from_table({"model": {"source": str(tmp_path / "none")}}))


def test_planning_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "pool.toml").write_text("[topology]\nedges = 1\nclusters_per_edge = 'auto'\npool = [{count = 2}]")
    program = f"""
import sys
from ecogen import cli
sys.argv = ["ecogen", "plan", {str(tmp_path / "pool.toml")!r}, "--json"]
try:
    cli.main()
except SystemExit as ended:
    assert not ended.code
assert "scipy.optimize" in sys.modules
print([name for name in ("torch", "transformers", "peft", "grpc", "sklearn") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    planned, imported = done.stdout.splitlines()
    assert imported == "[]"
    assert len(json.loads(planned)["clusters"]) == 2


def test_a_report_lists_the_links_that_devices_have_of_their_own(pooled: RecipeOf) -> None:
    rows = links_table(build_topology(formed(pooled()).topology)).rows
    assert rows[-1] == ("access of 2 end devices", "9", "40")
