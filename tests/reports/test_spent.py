"""What privacy cost, in the summary, the report and the terminal; and a warning where it is next to no privacy."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from ecogen.accounting.ledger import Ledger
from ecogen.config import Privacy, Recipe
from ecogen.records import Record, RoundRecord
from ecogen.reports.console import round_line, show_summary
from ecogen.reports.html import render_report
from ecogen.reports.summary import RunFacts, Summary, accuracy, summarise
from ecogen.reports.wording import format_epsilon
from ecogen.topology import Topology
from tests.reports.test_console import shown


def spending(records: list[Record], topology: Topology, most: float) -> list[Record]:
    """The same rounds, of private edges: the last round of the second edge has spent most."""
    factor = {topology.edge_ids[0]: 0.5 * most, topology.edge_ids[1]: most}
    return [
        msgspec.structs.replace(r, epsilon=factor[r.node_id] * (r.round_index + 1) / 8, loss=None)
        if isinstance(r, RoundRecord) and r.node_id in factor
        else r
        for r in records
    ]


@pytest.fixture
def private(recipe: Recipe) -> Recipe:
    return replace(recipe, privacy=Privacy(1.5, 0.5, 1e-3))


def summary_of(
    most: float, records: list[Record], ledger: Ledger, recipe: Recipe, topology: Topology, facts: RunFacts
) -> Summary:
    return summarise(spending(records, topology, most), ledger, recipe, topology, facts)


def test_epsilon_is_that_of_the_edge_that_spent_most(
    records: list[Record], ledger: Ledger, private: Recipe, topology: Topology, facts: RunFacts
) -> None:
    spent = summary_of(8.0, records, ledger, private, topology, facts)["privacy"]
    assert spent is not None
    assert spent["epsilon"] == 8.0
    assert spent["per_round"] == [float(number) for number in range(1, 9)]
    assert (spent["delta"], spent["noise_multiplier"], spent["clip_norm"], spent["clusters"]) == (1e-3, 1.5, 0.5, 3)


def test_of_examples_each_edge_has_its_own(
    records: list[Record], ledger: Ledger, recipe: Recipe, topology: Topology, facts: RunFacts
) -> None:
    private = replace(recipe, privacy=Privacy(1.5, 0.5, 1e-3, "example"))
    given = (spending(records, topology, 8.0), ledger, private, topology, facts)
    spent = summarise(*given)["privacy"]
    assert spent is not None
    assert (spent["unit"], spent["edges"]) == ("example", dict(zip(topology.edge_ids, (4.0, 8.0), strict=True)))
    page, told = render_report(*given), shown(show_summary(summarise(*given)), width=250)
    for edge, epsilon in zip(topology.edge_ids, ("4.00", "8.00"), strict=True):
        assert f"Epsilon {epsilon} of {edge}" in page
        assert f"epsilon {edge}" in told
        assert epsilon in told
    assert "Differential privacy of examples" in page


def test_without_noise_there_is_nothing_to_tell(
    records: list[Record], ledger: Ledger, recipe: Recipe, topology: Topology, facts: RunFacts
) -> None:
    assert summarise(records, ledger, recipe, topology, facts)["privacy"] is None


@pytest.mark.parametrize(("most", "warns"), [(10.0, False), (10.1, True)])
def test_above_ten_report_and_terminal_warn(
    records: list[Record],
    ledger: Ledger,
    private: Recipe,
    topology: Topology,
    facts: RunFacts,
    most: float,
    warns: bool,
) -> None:
    page = render_report(spending(records, topology, most), ledger, private, topology, facts)
    assert f"Epsilon {format_epsilon(most)} at delta 0.001" in page
    assert ("epsilon is above 10: hardly a promise" in page) == warns
    told = shown(show_summary(summary_of(most, records, ledger, private, topology, facts)), width=250)
    assert f"{format_epsilon(most)}" in told
    assert ("epsilon is above 10: hardly a promise" in told) == warns


def test_a_private_round_is_a_line_with_epsilon_and_no_members() -> None:
    record = RoundRecord("edge-0", 3, 0.9, None, 0, (), (), 2.0, (), epsilon=1.234)
    line = shown(round_line(record, 8))
    assert "epsilon 1.24" in line
    assert "member" not in line


def test_epsilon_is_never_rounded_down() -> None:
    assert [format_epsilon(value) for value in (7.9, 7.901, 10.0, 10.0001)] == ["7.90", "7.91", "10.00", "10.01"]


def test_edges_of_different_labels_weigh_as_much_as_they_have_examples(
    records: list[Record], topology: Topology
) -> None:
    of_edges = [r for r in records if not (isinstance(r, RoundRecord) and r.node_id == topology.cloud_id)]
    one, other = topology.edge_ids
    found = accuracy(of_edges, topology, {one: 30, other: 10})
    for index, share in enumerate(found["per_round"]):
        first, second = found["per_edge"][one][index], found["per_edge"][other][index]
        assert first is not None
        assert second is not None
        assert share == pytest.approx((3 * first + second) / 4)
