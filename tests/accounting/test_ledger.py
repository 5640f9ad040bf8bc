"""Truths of the ledger: all groupings sum to one total, bounds are in order, bytes are conserved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecogen.accounting.bill import Bill, Bounds
from ecogen.accounting.constants import Constants, Embodied
from ecogen.accounting.intensity import Intensity
from ecogen.accounting.ledger import Entry, Ledger, settle
from ecogen.config import SiteProfile, TopologyRecipe, build_topology
from ecogen.errors import ConfigError, RunError
from ecogen.records import KINDS, LINK_CLASSES, PhaseRecord, Record, RoundRecord, Traffic, Usage
from ecogen.topology import Tier
from tests.accounting.strategies import OPERATOR, TOPOLOGY, records, usages

DEVICE = "edge-0.cluster-0.device-0"


def numbers(bill: Bill) -> list[float]:
    """Every figure of a bill, totals included."""
    lines = [getattr(bill, line.name) for line in fields(bill)] + [bill.energy_j, bill.emissions_g]
    return [figure for line in lines for figure in (line.low, line.mid, line.high)]


def total(bills: Iterable[Bill]) -> list[float]:
    return numbers(sum(bills, Bill.zero()))


@settings(max_examples=50)
@given(records)
def test_every_grouping_sums_to_the_total(run: list[Record]) -> None:
    ledger = settle(run, TOPOLOGY)
    expected = pytest.approx(numbers(ledger.total))
    for bills in (ledger.by_node(), ledger.by_site(), ledger.by_tier(), ledger.by_phase()):
        assert total(bills.values()) == expected
    assert total([*ledger.by_round().values(), ledger.outside_rounds]) == expected


@settings(max_examples=50)
@given(records)
def test_low_mid_and_high_rise_in_every_line(run: list[Record]) -> None:
    for entry in settle(run, TOPOLOGY).entries:
        figures = numbers(entry.bill)
        for low, mid, high in zip(figures[::3], figures[1::3], figures[2::3], strict=True):
            assert 0 <= low <= mid <= high


@given(usages)
def test_twice_the_usage_is_twice_the_bill(usage: Usage) -> None:
    twice = [double(line) for line in usage.traffic]
    doubled = msgspec.structs.replace(usage, wall_s=2 * usage.wall_s, cpu_s=2 * usage.cpu_s, traffic=tuple(twice))
    once = [2 * figure for figure in numbers(settle_one(usage).bill)]
    assert numbers(settle_one(doubled).bill) == pytest.approx(once)
    assert numbers(settle([phase(usage), phase(usage)], TOPOLOGY).total) == pytest.approx(once)


def double(line: Traffic) -> Traffic:
    sizes = {name: 2 * getattr(line, name) for name in ("payload_bytes", "header_bytes", "framing_bytes")}
    return msgspec.structs.replace(line, **sizes)


def phase(*usages: Usage) -> PhaseRecord:
    return PhaseRecord("cloud", "tuning", 1.0, usages)


def settle_one(usage: Usage, constants: Constants | None = None) -> Entry:
    return settle([phase(usage)], TOPOLOGY, constants).entries[0]


@settings(max_examples=50)
@given(records)
def test_bytes_are_conserved(run: list[Record]) -> None:
    ledger = settle(run, TOPOLOGY)
    sent = [line for record in run for usage in getattr(record, "usages", ()) for line in usage.traffic]
    written = sum(line.payload_bytes + line.header_bytes for line in sent)
    assert sum(ledger.traffic_by_kind().values()) == written
    assert sum(ledger.traffic_by_link().values()) + ledger.unlinked_bytes == written
    assert sum(line.sent_bytes for line in ledger.traffic()) == written
    assert ledger.framing_bytes == sum(line.framing_bytes for line in sent)
    assert sum(line.messages for line in ledger.traffic()) == sum(line.messages for line in sent)


def hand_made() -> tuple[Ledger, Constants]:
    """A device in France, PUE 1.5, 10 s with 4 s of CPU, 2 GB of memory, 0.5 GB device to device, all numbers round."""
    sites = {"edge-0.field": SiteProfile("HERE", 1.5)}
    topology = build_topology(TopologyRecipe(edges=1, clusters_per_edge=1, devices_per_cluster=2, sites=sites))
    node = topology.nodes[DEVICE]
    nodes = {**topology.nodes, DEVICE: replace(node, device=replace(node.device, busy_w=5.0, idle_w=1.0))}
    constants = Constants(
        busy_factor=Bounds(0.5, 1, 2),
        idle_factor=Bounds(0, 1, 2),
        memory_w_per_gb=Bounds(0.1, 0.5, 1),
        network_j_per_gb=dict.fromkeys(LINK_CLASSES, Bounds(20, 40, 80)),
        embodied=dict.fromkeys(Tier, Embodied(Bounds(1e6, 2e6, 4e6), 1e6, 0.1)),
        intensities={"HERE": Intensity(360, "made up")},
    )
    sent = Traffic("edge-0.cluster-0.device-1", "activations", 5, 400_000_000, 60_000_000, 40_000_000)
    usage = Usage(DEVICE, "tuning", 10.0, 4.0, 1e9, 2 * 10**9, (sent,))
    record = RoundRecord("edge-0", 7, 0.9, 0.1, 20, (), (), 10.0, (usage,))
    return settle([record], replace(topology, nodes=nodes), constants), constants


def test_a_bill_computed_by_hand_to_the_joule() -> None:
    ledger, _ = hand_made()
    bill = ledger.total
    lines = (bill.cpu_j, bill.idle_j, bill.memory_j, bill.network_j, bill.overhead_j, bill.energy_j)
    by_hand = (10, 20, 40), (0, 6, 12), (2, 10, 20), (10, 20, 40), (6, 18, 36), (28, 74, 148)
    for line, expected in zip(lines, by_hand, strict=True):
        assert (line.low, line.mid, line.high) == pytest.approx(expected)
    assert numbers(bill)[15:] == pytest.approx([0.0028, 0.0074, 0.0148, 1, 2, 4, 28, 74, 148, 1.0028, 2.0074, 4.0148])
    assert ledger.by_round() == {7: bill}
    assert ledger.by_tier() == {Tier.END: bill}
    assert ledger.by_site() == {"edge-0.field": bill}
    assert ledger.traffic_by_link() == {"cloud_edge": 0, "edge_end": 0, "d2d": 460_000_000}
    assert ledger.traffic_by_kind() == {kind: 460_000_000 * (kind == "activations") for kind in KINDS}


def test_an_entry_says_how_it_came_about() -> None:
    (entry,) = hand_made()[0].entries
    assert entry.method == "modelled: measured CPU time x watts"
    assert (entry.node_id, entry.site_id, entry.tier, entry.phase) == (DEVICE, "edge-0.field", "end", "tuning")
    assert (entry.wall_s, entry.cpu_s, entry.flops, entry.round_index) == (10.0, 4.0, 1e9, 7)


def test_the_method_tells_measured_from_modelled() -> None:
    mixed = [phase(Usage("cloud", "tuning", 1, 1)), phase(Usage("cloud", "tuning", 1, 1, method="modelled"))]
    assert settle(mixed, TOPOLOGY).method.startswith("measured and modelled CPU time; ")
    assert settle([], TOPOLOGY).method.startswith("no CPU time; ")


def test_what_goes_to_an_operator_is_listed_and_costs_nothing() -> None:
    sent = Traffic(OPERATOR, "control", 3, 100, 20, 7)
    ledger = settle([phase(Usage("cloud", "serving", 0, 0, traffic=(sent,)))], TOPOLOGY)
    assert ledger.total == Bill.zero()
    assert [(line.link_class, line.sent_bytes) for line in ledger.traffic()] == [(None, 120)]
    assert ledger.unlinked_bytes == 120


def test_each_byte_is_billed_once_by_its_sender() -> None:
    sent = Traffic("edge-0", "tunables", 1, 10**9, 0)
    usages = Usage("cloud", "tuning", 0, 0, traffic=(sent,)), Usage("edge-0", "tuning", 0, 0)
    sender, receiver = settle([phase(*usages)], TOPOLOGY).entries
    network_j = sender.bill.network_j
    assert (network_j.low, network_j.mid, network_j.high) == pytest.approx((240, 108_000, 504_000))
    assert sender.bill.overhead_j == Bounds.zero()
    assert receiver.bill == Bill.zero()


@pytest.mark.parametrize(("wall_s", "idle_s"), [(10, 6), (4, 0), (3, 0)])
def test_a_node_that_computes_on_several_threads_is_never_idle(wall_s: float, idle_s: float) -> None:
    idle_j = settle_one(Usage("cloud", "tuning", wall_s, 4)).bill.idle_j
    assert idle_j.mid == pytest.approx(idle_s * TOPOLOGY.nodes["cloud"].device.idle_w)


def test_a_node_of_another_topology_is_an_error() -> None:
    with pytest.raises(RunError, match=r"bills node 'edge-9', which is not in the topology; use the run's own recipe"):
        settle([phase(Usage("edge-9", "tuning", 1, 1))], TOPOLOGY)


def test_a_zone_without_intensity_is_an_error() -> None:
    constants = Constants(intensities={"DE": Intensity(381, "codecarbon")})
    with pytest.raises(ConfigError, match="zone 'US' has no carbon intensity"):
        settle_one(Usage("cloud", "tuning", 1, 1), constants)


def test_bounds_add_scale_and_rise() -> None:
    assert Bounds(1, 2, 3) + Bounds(1, 1, 1) == Bounds(2, 3, 4)
    assert 2 * Bounds(1, 2, 3) == Bounds(1, 2, 3) * 2 == Bounds(2, 4, 6)
    with pytest.raises(ConfigError, match="do not rise"):
        Bounds(2, 1, 3)


@settings(max_examples=30)
@given(st.lists(usages, max_size=4))
def test_the_order_of_records_does_not_matter(several: list[Usage]) -> None:
    run = [phase(usage) for usage in several]
    backwards = settle(run[::-1], TOPOLOGY)
    assert numbers(backwards.total) == pytest.approx(numbers(settle(run, TOPOLOGY).total))
    assert backwards.traffic() == settle(run, TOPOLOGY).traffic()
