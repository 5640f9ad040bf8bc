"""Where a recipe puts its model, before anything runs: what each device holds, takes and needs, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict

from ecogen.config import Recipe, build_topology
from ecogen.planning.clusters import explain_forming, microbatch_size, plan_clusters
from ecogen.planning.cost import ModelShape
from ecogen.planning.search import Plan
from ecogen.reports.tables import Column, Table, identifier, word
from ecogen.reports.wording import DASH, format_number, format_share
from ecogen.topology import Cluster, Topology
from ecogen.units import format_bytes, format_seconds


class PlacedDevice(TypedDict):
    """What one device holds of the model; seconds are those of one microbatch, `sending_s` is part of `stage_s`."""

    device: str
    holds: str
    blocks: list[int]
    stage_s: float
    sending_s: float
    needs_bytes: int
    memory_bytes: int


class PlacedCluster(TypedDict):
    """One cluster; `slowest_device` decides how fast it is."""

    cluster: str
    edge: str
    cuts: list[int]
    slowest_s: float
    slowest_device: str
    examples_per_s: float
    devices: list[PlacedDevice]


class LeftOutDevice(TypedDict):
    """A device of the pool in no cluster; `slowest_s` is the slowest stage if it were in one."""

    device: str
    reason: str
    slowest_s: float | None


class PlacementSummary(TypedDict):
    """A recipe's placement.

    Attributes:
        examples_per_s: of all clusters, each as fast as the slowest, since a round waits for it.
        bound_s: no clusters of the pool, so many an edge, have a faster slowest stage; None without a pool.
    """

    name: str
    microbatch: int
    clusters: list[PlacedCluster]
    slowest_s: float
    slowest_device: str
    examples_per_s: float
    bound_s: float | None
    left_out: list[LeftOutDevice]


def summarise_placement(recipe: Recipe, shape: ModelShape) -> PlacementSummary:
    """The placement of a recipe whose clusters are formed.

    Raises:
        PlacementError: if a cluster cannot hold the model.
    """
    topology, plans, microbatch = build_topology(recipe.topology), plan_clusters(recipe, shape), microbatch_size(recipe)
    clusters = [_cluster(topology, topology.clusters[name], plan, microbatch) for name, plan in plans.items()]
    slowest = max(clusters, key=lambda cluster: cluster["slowest_s"])
    bound_s, left_out = explain_forming(recipe, shape)
    return PlacementSummary(
        name=recipe.name,
        microbatch=microbatch,
        clusters=clusters,
        slowest_s=slowest["slowest_s"],
        slowest_device=slowest["slowest_device"],
        examples_per_s=len(clusters) * microbatch / slowest["slowest_s"],
        bound_s=bound_s,
        left_out=[LeftOutDevice(device=d.node_id, reason=d.reason, slowest_s=d.slowest_s) for d in left_out],
    )


def placement_tables(summary: PlacementSummary) -> list[Table]:
    """The clusters, and the devices that were left out, where some were."""
    names = {device["device"]: cluster["cluster"] for cluster in summary["clusters"] for device in cluster["devices"]}
    is_told = all(device.startswith(f"{cluster}.") for device, cluster in names.items())  # a pool's devices do not
    columns = [] if is_told else [identifier("cluster")]
    columns += [identifier("device"), word("holds"), Column("stage", "ms"), Column("of it sending", "ms")]
    columns += [Column("waits"), Column("needs"), Column("has")]
    rows = tuple(row[is_told:] for row in _rows(summary))
    tables = [Table("Placement", tuple(columns), rows)]
    if summary["left_out"]:
        rows = tuple((left["device"], left["reason"]) for left in summary["left_out"])
        tables.append(Table("Left out", (identifier("device"), word("why")), rows))
    return tables


def placement_line(summary: PlacementSummary) -> str:
    """What the whole is as fast as, and how much faster it could be at most."""
    slowest = next(c for c in summary["clusters"] if c["slowest_device"] == summary["slowest_device"])
    device = next(d for d in slowest["devices"] if d["device"] == summary["slowest_device"])
    text = (
        f"slowest stage {format_seconds(summary['slowest_s'])} a microbatch of {summary['microbatch']}, on "
        f"{summary['slowest_device']} ({format_share(device['sending_s'] / device['stage_s'])} of it sending): "
        f"{format_number(summary['examples_per_s'])} examples/s over {len(summary['clusters'])} clusters"
    )
    if summary["bound_s"] is None:
        return text
    return f"{text}; of this pool, none faster than {format_seconds(summary['bound_s'])} is possible"


def _cluster(topology: Topology, cluster: Cluster, plan: Plan, microbatch: int) -> PlacedCluster:
    slowest = plan.stage_s.index(plan.bottleneck_s)
    return PlacedCluster(
        cluster=cluster.cluster_id,
        edge=cluster.edge_id,
        cuts=list(plan.cuts),
        slowest_s=plan.bottleneck_s,
        slowest_device=cluster.node_ids[slowest],
        examples_per_s=microbatch / plan.bottleneck_s,
        devices=[_device(topology, plan, index, node_id) for index, node_id in enumerate(cluster.node_ids)],
    )


def _device(topology: Topology, plan: Plan, index: int, node_id: str) -> PlacedDevice:
    segments = plan.placement.segments_of(node_id)
    return PlacedDevice(
        device=node_id,
        holds=", ".join(str(segment) for segment in segments),
        blocks=[block for segment in segments for block in segment.blocks],
        stage_s=plan.stage_s[index],
        sending_s=plan.sending_s[index],
        needs_bytes=plan.memory_bytes[index],
        memory_bytes=topology.nodes[node_id].device.memory_bytes,
    )


def _rows(summary: PlacementSummary) -> Iterator[tuple[str, ...]]:
    for cluster in summary["clusters"]:
        for device in cluster["devices"]:
            waits = 1 - device["stage_s"] / summary["slowest_s"]
            yield (
                cluster["cluster"],
                device["device"],
                device["holds"],
                format_number(device["stage_s"] * 1e3),
                format_number(device["sending_s"] * 1e3) if device["sending_s"] else DASH,
                format_share(waits),
                format_bytes(device["needs_bytes"]),
                format_bytes(device["memory_bytes"]),
            )
