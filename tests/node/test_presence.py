"""Who is here and doing what, as the records tell."""

from __future__ import annotations

from ecogen.node.presence import Presence, presences
from ecogen.records import EventKind, EventRecord, PhaseRecord, Record, RoundRecord, Usage


def usage(node_id: str) -> Usage:
    return Usage(node_id, "tuning", 1.0, 1.0)


def event(kind: EventKind, node_id: str, time_s: float) -> EventRecord:
    return EventRecord(kind, node_id, time_s=time_s)


def of_device(*records: Record) -> Presence:
    (device,) = presences(records, ["device"])
    return device


def test_nobody_is_here_before_anything_is_heard() -> None:
    assert presences([], ["cloud", "edge"]) == [Presence("cloud"), Presence("edge")]


def test_a_node_arrives_is_lost_and_comes_back() -> None:
    joined = event("joined", "device", 1.0)
    ready = PhaseRecord("device", "delivery", 1.0, (usage("device"),), time_s=2.0)
    lost, back = event("lost", "device", 9.0), event("rejoined", "device", 11.0)
    assert of_device(joined) == Presence("device", "preparing", None, 1.0)
    assert of_device(joined, ready) == Presence("device", "ready", None, 2.0)
    assert of_device(joined, ready, lost) == Presence("device", "lost", None, 2.0)
    assert of_device(joined, ready, lost, back) == Presence("device", "preparing", None, 11.0)
    assert of_device(joined, ready, lost, back, ready).state == "ready"


def test_a_round_tells_of_all_who_took_part() -> None:
    record = RoundRecord("edge", 4, 0.9, 0.1, 10, ("c",), (), 1.0, (usage("edge"), usage("device")), 5.0)
    assert presences([record], ["edge", "device", "other"]) == [
        Presence("edge", "ready", 4, 5.0),
        Presence("device", "ready", 4, 5.0),
        Presence("other"),
    ]


def test_who_has_finished_stays_so() -> None:
    record = RoundRecord("device", 4, 0.9, 0.1, 10, (), (), 1.0, (), 6.0)
    assert of_device(event("joined", "device", 1.0), event("finished", "device", 5.0), record).state == "finished"


def test_an_event_of_a_cluster_is_of_no_node() -> None:
    assert of_device(event("cluster_failed", "edge.cluster-0", 3.0)) == Presence("device")
