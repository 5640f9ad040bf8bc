"""Records of a private run: the sums are right, and two runs with other participants cannot be told apart."""

from __future__ import annotations

from collections import Counter

from ecogen.records import RoundRecord, Traffic, Usage
from ecogen.tuning.discretion import conceal, spread

ROUTES = [(f"c{number}-a", f"c{number}-b") for number in range(3)] + [("alone",)]


def usages(*clusters: int) -> list[Usage]:
    """Of a round in which those clusters took part; each does the same."""
    edge = Usage(
        "edge", "tuning", 2.0, 1.0, traffic=tuple(Traffic(ROUTES[c][0], "tunables", 1, 100, 7) for c in clusters)
    )
    devices = []
    for cluster in clusters:
        first, second = ROUTES[cluster]
        lines = (Traffic(second, "activations", 4, 400, 40), Traffic("edge", "tunables", 1, 100, 7))
        devices.append(Usage(first, "tuning", 1.5, 0.5, 10.0, 1000, lines))
        devices.append(Usage(second, "tuning", 1.0, 0.25, 20.0, 900, (Traffic(first, "gradients", 4, 401, 40),)))
    return [*devices, edge]


def totals(records: list[Usage] | tuple[Usage, ...]) -> Counter[str]:
    sums: Counter[str] = Counter()
    for usage in records:
        sums.update({"wall_s": usage.wall_s, "cpu_s": usage.cpu_s, "flops": usage.flops})
        for line in usage.traffic:
            sums.update({line.kind: line.total_bytes, f"{line.kind} messages": line.messages})
    return sums


def test_nothing_is_lost_or_added() -> None:
    for clusters in ((0,), (1, 2), (0, 1, 2)):
        before, after = totals(usages(*clusters)), totals(spread(usages(*clusters), ROUTES))
        assert before.keys() == after.keys()
        assert all(abs(before[name] - after[name]) < 1e-9 for name in before)


def test_who_took_part_cannot_be_told() -> None:
    assert spread(usages(0), ROUTES) == spread(usages(1), ROUTES) == spread(usages(2), ROUTES)
    assert spread(usages(0, 1), ROUTES) == spread(usages(1, 2), ROUTES)


def test_bytes_stay_on_links_that_there_are() -> None:
    for usage in spread(usages(1), ROUTES):
        own = next((route for route in ROUTES if usage.node_id in route), None)
        for line in usage.traffic:
            if own is None:
                assert line.receiver_id in {route[0] for route in ROUTES}
            else:
                assert line.receiver_id in {"edge", *own}


def test_a_record_tells_neither_members_nor_loss_but_what_was_spent() -> None:
    record = RoundRecord("edge", 3, 0.9, 0.4, 77, ("c0",), ("c1",), 2.0, tuple(usages(0)), 5.0)
    concealed = conceal(record, ROUTES, 2.5)
    assert (concealed.loss, concealed.num_examples, concealed.members, concealed.missing) == (None, 0, (), ())
    assert (concealed.node_id, concealed.round_index, concealed.accuracy, concealed.epsilon) == ("edge", 3, 0.9, 2.5)
    assert concealed.usages == spread(record.usages, ROUTES)
