"""What is wrong with a recipe is told at once, each problem with its place, its value and the next step."""

from __future__ import annotations

import tomllib

import pytest

from ecogen.config import from_table
from ecogen.errors import ConfigError

POOL = "[topology]\nedges = 1\nclusters_per_edge = 2\npool = [{count = 3}]\n[topology.clusters]"


def problems_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        from_table(tomllib.loads(text))
    return caught.value.problems


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
        (
            "[tunables]\nlora_targets = ['query']",
            "tunables.lora_targets: 'query' is no projection of a vision transformer; name",
        ),
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
            "aggregation.faulty: multi_krum tolerates 3 among 9 clusters of an edge or more, not among 3",
        ),
        (
            "[aggregation]\nstrategy = 'trimmed_mean'\nfaulty = 2",
            "aggregation.faulty: trimmed_mean tolerates 2 among 5 clusters of an edge or more, not among 3",
        ),
        (
            "[aggregation]\nstrategy = 'median'\nserver_rate = 0.5",
            "aggregation.server_rate: median has none; set it to 0",
        ),
        (
            "[data]\nvalidation = 0\n[evaluation]\nsplit = 'validation'",
            "evaluation.split: 'validation' has no examples; set data.validation above 0",
        ),
        ("[privacy]\nnoise_multiplier = 1e-300", "privacy.noise_multiplier: 1e-300 protects nobody; set 1e-09 or more"),
        ("[privacy]\nnoise_multiplier = 1e300", "privacy.noise_multiplier: input should be less than or equal to 1000"),
        (
            "[faults.slow]\n'edge-0.cluster-0.device-0' = 1e300",
            "faults.slow.edge-0.cluster-0.device-0: input should be less",
        ),
        (
            "[faults.update_factor]\n'edge-0.cluster-0' = 1e300",
            "faults.update_factor.edge-0.cluster-0: input should be less",
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
