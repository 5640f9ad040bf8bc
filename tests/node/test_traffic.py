"""The books of a whole run: every byte that crossed a link is in the ledger, once, and every joule has its place."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from ecogen.accounting.ledger import settle
from ecogen.config import Recipe, build_topology
from ecogen.records import EventRecord, Record, Traffic
from ecogen.runtime import membership
from tests.runs import Finished, run
from tests.tiny import RecordingNetwork, Sent, tiny_recipe

OPERATOR = "operator"
Books = tuple[Recipe, RecordingNetwork, Finished]
Key, Numbers = tuple[str, str, str], tuple[int, int, int]


def billed(records: Sequence[Record]) -> dict[Key, Numbers]:
    """Bytes and messages by sender, receiver and kind, from the records."""
    lines = [
        (usage.node_id, line)
        for record in records
        if not isinstance(record, EventRecord)
        for usage in record.usages
        for line in usage.traffic
    ]
    return total(((sender, line.receiver_id, line.kind), measure(line)) for sender, line in lines)


def measure(line: Traffic | Sent) -> Numbers:
    messages = line.messages if isinstance(line, Traffic) else 1
    return messages, line.payload_bytes, line.header_bytes


def total(lines: Iterable[tuple[Key, Numbers]]) -> dict[Key, Numbers]:
    sums: dict[Key, Numbers] = {}
    for key, (messages, payload, header) in lines:
        before = sums.get(key, (0, 0, 0))
        sums[key] = (before[0] + messages, before[1] + payload, before[2] + header)
    return sums


@pytest.fixture(scope="module", params=["start", "end"])
def books(request: pytest.FixtureRequest, foundation: Path, tmp_path_factory: pytest.TempPathFactory) -> Books:
    recipe = tiny_recipe(
        foundation,
        topology={"edges": 2, "clusters_per_edge": 2, "devices_per_cluster": 2},
        placement={"labels": request.param},
    )
    network = RecordingNetwork()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(membership, "HEARTBEAT_S", 60.0)  # one after the closing of the books would be in none
        finished = asyncio.run(run(recipe, tmp_path_factory.mktemp("run"), network))
    return recipe, network, finished


def test_the_ledger_holds_every_byte_of_every_link_and_kind(books: Books) -> None:
    _, network, finished = books
    written = total(
        ((sent.sender_id, sent.receiver_id, sent.message.kind), measure(sent))
        for sent in network.sent
        if sent.message.counted
    )
    assert billed(finished.records) == written


def test_totals_by_link_and_by_kind_are_those_of_the_codec(books: Books) -> None:
    recipe, network, finished = books
    topology = build_topology(recipe.topology)
    ledger = settle(finished.records, topology)
    by_link, by_kind = Counter(), Counter()
    for sent in network.sent:
        if sent.message.counted:
            link = topology.link(sent.sender_id, sent.receiver_id)
            by_link[link.link_class if link else None] += len(sent.data)
            by_kind[sent.message.kind] += len(sent.data)
    assert ledger.traffic_by_link() == {link: by_link[link] for link in ("cloud_edge", "edge_end", "d2d")}
    assert ledger.unlinked_bytes == by_link[None] == 0
    kinds = ("backbone", "tunables", "activations", "gradients", "samples", "scores", "control")
    assert ledger.traffic_by_kind() == {kind: by_kind[kind] for kind in kinds}
    assert all(by_kind.values())


def test_what_is_not_counted_is_only_watching_and_the_books_themselves(books: Books) -> None:
    _, network, _ = books
    uncounted = {sent.method for sent in network.sent if not sent.message.counted}
    assert uncounted <= {"watch", "record", "progress", "end", "result", "status", "books", "publish"}
    after_closing = [sent for sent in network.sent if sent.method == "publish" and not sent.message.counted]
    assert len(after_closing) == 2 * 2 * 2  # two edges, two closing records each, and their receipts
    assert all(OPERATOR in (s.sender_id, s.receiver_id) for s in network.sent if s.method in ("watch", "record"))


def test_energy_and_emissions_agree_by_node_by_site_and_by_tier(books: Books) -> None:
    recipe, _, finished = books
    ledger = settle(finished.records, build_topology(recipe.topology))
    for groups in (ledger.by_node(), ledger.by_site(), ledger.by_tier(), ledger.by_phase()):
        for figure in ("energy_j", "emissions_g"):
            for bound in ("low", "mid", "high"):
                parts = sum(getattr(getattr(bill, figure), bound) for bill in groups.values())
                assert parts == pytest.approx(getattr(getattr(ledger.total, figure), bound), rel=1e-9)
    assert ledger.total.energy_j.mid > 0
    assert len(ledger.by_node()) == 1 + 2 + 8
    assert len(ledger.by_site()) == 1 + 2 + 2


def test_rounds_and_what_is_outside_of_them_sum_to_all(books: Books) -> None:
    recipe, _, finished = books
    ledger = settle(finished.records, build_topology(recipe.topology))
    inside = sum(bill.energy_j.mid for bill in ledger.by_round().values())
    assert inside + ledger.outside_rounds.energy_j.mid == pytest.approx(ledger.total.energy_j.mid)
    assert list(ledger.by_round()) == [0, 1]


def test_wall_time_of_a_node_is_billed_once(books: Books) -> None:
    """Windows follow each other, so no node is billed longer than the run took."""
    recipe, _, finished = books
    ledger = settle(finished.records, build_topology(recipe.topology))
    longest = max(sum(e.wall_s for e in ledger.entries if e.node_id == node) for node in ledger.by_node())
    cloud = sum(entry.wall_s for entry in ledger.entries if entry.node_id == "cloud")
    assert longest <= cloud * 1.5 + 0.5
