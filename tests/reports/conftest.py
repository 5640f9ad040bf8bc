"""A made-up run as its records would tell it: 2 edges, 8 rounds, 18 devices, one of them lost and back again."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

from ecogen.accounting.ledger import Ledger, settle
from ecogen.config import Recipe, build_topology, load
from ecogen.measurements import Inversion, InversionAttack, Probe
from ecogen.placement import Placement, place
from ecogen.records import (
    EventRecord,
    Hop,
    PhaseRecord,
    Record,
    RequestRecord,
    RoundRecord,
    Traffic,
    Usage,
)
from ecogen.reports.summary import RunFacts
from ecogen.topology import Cluster, Topology

TUNABLES_BYTES = 21_600 * 4
ACTIVATION_BYTES = 25 * 128 * 4
START_S = 1_760_000_000.0
LOST = "edge-0.cluster-1.device-2"


def traffic(receiver_id: str, kind: str, messages: int, each: int) -> Traffic:
    return Traffic(receiver_id, kind, messages, messages * each, messages * 96, messages * 41)


class RunOfRecords:
    """Writes the records of a run, one after the other, on a clock of its own."""

    def __init__(self, recipe: Recipe, topology: Topology) -> None:
        self.recipe, self.topology = recipe, topology
        self.random = random.Random(recipe.seed)
        self.time_s = START_S

    def records(self) -> Iterator[Record]:
        for node_id in self.topology.nodes:
            yield EventRecord("joined", node_id, time_s=self.time_s)
        yield from self.delivery()
        for index in range(self.recipe.tuning.rounds):
            yield from self.round(index)
        yield from self.requests()
        yield EventRecord("finished", self.topology.cloud_id, time_s=self.time_s)

    def delivery(self) -> Iterator[Record]:
        cloud, edges = self.topology.cloud_id, self.topology.edge_ids
        self.time_s += 31.0
        sent = tuple(traffic(edge, "backbone", 1, 3_200_000) for edge in edges)
        yield PhaseRecord(
            cloud, "pretraining", 30.0, (Usage(cloud, "pretraining", 30.0, 29.1, 9e12),), "ViT", self.time_s
        )
        yield PhaseRecord(cloud, "delivery", 1.0, (Usage(cloud, "delivery", 1.0, 0.1, traffic=sent),), "", self.time_s)
        for edge in edges:
            sent = tuple(traffic(node, "backbone", 1, 1_100_000) for c in self.clusters(edge) for node in c.node_ids)
            yield PhaseRecord(
                edge, "delivery", 0.8, (Usage(edge, "delivery", 0.8, 0.1, traffic=sent),), "", self.time_s
            )

    def round(self, index: int) -> Iterator[Record]:
        if index == 3:
            yield EventRecord("lost", LOST, index, "no heartbeat for 5.0 s", self.time_s + 1.9)
        if index == 4:
            yield EventRecord("rejoined", LOST, index, "continues with round 5 of 8", self.time_s + 0.2)
        ends = []
        for number, edge in enumerate(self.topology.edge_ids):
            wall_s = 4.2 + 0.4 * number + self.random.random() * 0.5
            ends.append(self.time_s + wall_s)
            yield self.edge_round(edge, index, wall_s, ends[-1])
        self.time_s = max(ends)
        every = self.recipe.tuning.cloud_every
        if every and (index + 1) % every == 0:
            self.time_s += 0.4
            yield self.cloud_round(index)

    def edge_round(self, edge: str, index: int, wall_s: float, time_s: float) -> RoundRecord:
        lost = index == 3 and edge == "edge-0"
        clusters = self.clusters(edge)
        missing = (clusters[1].cluster_id,) if lost else ()
        members = tuple(cluster.cluster_id for cluster in clusters if cluster.cluster_id not in missing)
        usages = [u for c in clusters if c.cluster_id in members for u in self.cluster_usages(c, wall_s, edge)]
        down = tuple(traffic(node, "tunables", 1, TUNABLES_BYTES // 3) for c in clusters for node in c.node_ids)
        up = traffic(self.topology.cloud_id, "tunables", 1, TUNABLES_BYTES)
        usages += [
            Usage(edge, "tuning", wall_s, 0.06, 0.0, 210_000_000, (*down, up)),
            Usage(edge, "evaluation", 0.2, 0.18, 4e9),
        ]
        accuracy = 0.968 - 0.05 * 0.6**index - (0.012 if edge == "edge-1" else 0) + self.random.gauss(0, 0.002)
        loss = 0.12 + 0.5 * 0.6**index + (0.03 if edge == "edge-1" else 0)
        return RoundRecord(edge, index, accuracy, loss, 600, members, missing, wall_s, tuple(usages), time_s)

    def cluster_usages(self, cluster: Cluster, wall_s: float, edge: str) -> Iterator[Usage]:
        for position, node in enumerate(cluster.node_ids):
            neighbours = [cluster.node_ids[i] for i in (position - 1, position + 1) if 0 <= i < len(cluster.node_ids)]
            sent = [traffic(edge, "tunables", 1, TUNABLES_BYTES // 3), traffic(edge, "control", 12, 0)]
            for neighbour in neighbours:
                sent += [
                    traffic(neighbour, "activations", 80, 10 * ACTIVATION_BYTES),
                    traffic(neighbour, "gradients", 80, 10 * ACTIVATION_BYTES),
                ]
            cpu_s = wall_s * (0.1 + 0.02 * self.random.random())
            yield Usage(node, "tuning", wall_s, cpu_s, 2.4e10, 180_000_000, tuple(sent))

    def cloud_round(self, index: int) -> RoundRecord:
        cloud, edges = self.topology.cloud_id, tuple(self.topology.edge_ids)
        accuracy = 0.975 - 0.045 * 0.6**index + self.random.gauss(0, 0.001)
        sent = tuple(traffic(edge, "tunables", 1, TUNABLES_BYTES) for edge in edges)
        usages = (Usage(cloud, "tuning", 0.4, 0.05, 0.0, 260_000_000, sent),)
        return RoundRecord(cloud, index, accuracy, 0.11 + 0.45 * 0.6**index, 1200, edges, (), 0.4, usages, self.time_s)

    def requests(self) -> Iterator[RequestRecord]:
        for edge in self.topology.edge_ids:
            for number in range(self.recipe.evaluation.requests):
                self.time_s += 0.02
                yield self.request(self.clusters(edge)[0], number)

    def request(self, cluster: Cluster, number: int) -> RequestRecord:
        first, *others = cluster.node_ids
        stops = [*others, first]
        hops = tuple(
            Hop(node, f"blocks {i}..{i + 1}", 0.0011 + 0.0002 * self.random.random(), stop, ACTIVATION_BYTES, 0.0023)
            for i, (node, stop) in enumerate(zip(cluster.node_ids, stops, strict=True))
        )
        last = Hop(first, "head", 0.0003, None, 0, 0.0)
        inference_s = sum(hop.compute_s for hop in hops) + last.compute_s + 0.0023
        usages = tuple(
            Usage(
                hop.node_id,
                "serving",
                0.012,
                hop.compute_s,
                2e7,
                0,
                (traffic(hop.receiver_id, "activations", 1, 12_800),),
            )
            for hop in hops
        )
        name = f"{cluster.cluster_id}-{number}"
        return RequestRecord(
            name, cluster.cluster_id, 1, 0.0023, inference_s, 0.0021, (*hops, last), usages, self.time_s
        )

    def clusters(self, edge: str) -> list[Cluster]:
        return self.topology.clusters_of(edge)


def recipe_with(cloud_every: int = 1, requests: int = 20) -> Recipe:
    return load("digits", [f"tuning.cloud_every={cloud_every}", f"evaluation.requests={requests}"])


def records_of(recipe: Recipe) -> list[Record]:
    return list(RunOfRecords(recipe, build_topology(recipe.topology)).records())


def placements_of(topology: Topology, num_blocks: int = 4) -> dict[str, Placement]:
    cuts = [1, 3]
    return {name: place(cluster.node_ids, cuts, num_blocks) for name, cluster in topology.clusters.items()}


def attack(attacker: str, best_db: float) -> InversionAttack:
    """Three depths of the cut; the deeper, the more the images blur."""
    generator = random.Random(0)
    originals = tuple(digit(generator.random()) for _ in range(4))
    results = tuple(
        Inversion(
            depth,
            best_db - 6 * depth,
            11.2,
            0.93 - 0.3 * depth,
            0.98 - 0.25 * depth,
            tuple(blur(i, depth, generator) for i in originals),
        )
        for depth in (0, 1, 2)
    )
    return InversionAttack(attacker, "trained on 600 images of its own", 64, results, originals, 0.99)


def digit(slant: float) -> tuple[tuple[float, ...], ...]:
    return tuple(
        tuple(1.0 if abs((x - 14) ** 2 / (1 + slant) + (y - 14) ** 2 - 64) < 22 else 0.0 for x in range(28))
        for y in range(28)
    )


def blur(image: Sequence[Sequence[float]], depth: int, generator: random.Random) -> tuple[tuple[float, ...], ...]:
    noise = 0.1 + 0.25 * depth
    return tuple(tuple(min(1.0, max(0.0, v + generator.gauss(0, noise))) for v in row) for row in image)


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return recipe_with()


@pytest.fixture(scope="session")
def topology(recipe: Recipe) -> Topology:
    return build_topology(recipe.topology)


@pytest.fixture(scope="session")
def records(recipe: Recipe) -> list[Record]:
    return records_of(recipe)


@pytest.fixture(scope="session")
def ledger(records: list[Record], topology: Topology) -> Ledger:
    return settle(records, topology)


@pytest.fixture(scope="session")
def facts(topology: Topology) -> RunFacts:
    return RunFacts(
        tunable_parameters=21_642,
        total_parameters=801_546,
        wall_s=71.3,
        engine="inproc",
        host="Linux 6.1, x86_64, AMD EPYC 9R14, 2 cores, 7.6 GiB",
        versions={"ecogen": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "numpy": "2.4.6"},
        probe=Probe(0.951, 0.712),
        inversion=(attack("least squares", 27.4), attack("trained decoder", 31.8)),
        placements=placements_of(topology),
    )
