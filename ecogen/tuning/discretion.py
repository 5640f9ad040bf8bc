"""Records of a private run, without what the accountant counts on nobody knowing: who took part, and what it had.

Seconds, FLOPs and bytes are billed in full, but spread evenly over an edge's clusters. Their sums still say how much
work a round was; that is a side channel of the machines, of which no accountant knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from ecogen.records import Kind, RoundRecord, Traffic, Usage

Routes = Sequence[Sequence[str]]
"""The node ids of each cluster, in the order of its route."""

_COUNTS = ("messages", "payload_bytes", "header_bytes", "framing_bytes")


def conceal(record: RoundRecord, routes: Routes, epsilon: float) -> RoundRecord:
    """A round's record without what comes from the clusters' data or says whose it was, and with what it cost."""
    usages = spread(record.usages, routes)
    return msgspec.structs.replace(
        record, loss=None, confident=None, num_examples=0, members=(), missing=(), usages=usages, epsilon=epsilon
    )


def spread(usages: Iterable[Usage], routes: Routes) -> tuple[Usage, ...]:
    """The same in all, an equal share on every cluster: on the devices at the same place of their routes.

    What others sent to devices is spread alike. What does not divide goes to the first ones.
    """
    places = {node_id: place for route in routes for place, node_id in enumerate(route)}
    at_place: dict[int, list[Usage]] = {}
    others: list[Usage] = []
    for usage in usages:
        if usage.node_id in places:
            at_place.setdefault(places[usage.node_id], []).append(usage)
        else:
            sums = _sums([usage], places)
            traffic = [line for key, numbers in sums.items() for _, line in _divide(*key, numbers, routes)]
            others.append(msgspec.structs.replace(usage, traffic=tuple(traffic)))
    spread_out = [usage for place, own in sorted(at_place.items()) for usage in _evenly(own, place, routes, places)]
    return (*spread_out, *others)


def _evenly(usages: Sequence[Usage], place: int, routes: Routes, places: Mapping[str, int]) -> list[Usage]:
    """The usage of devices at one place, divided among all that stand there."""
    standing = [route for route in routes if place < len(route)]
    wall_s, cpu_s, flops = (
        sum(getattr(u, name) for u in usages) / len(standing) for name in ("wall_s", "cpu_s", "flops")
    )
    traffic: dict[str, list[Traffic]] = {route[place]: [] for route in standing}
    for key, numbers in _sums(usages, places).items():
        for route, line in _divide(*key, numbers, standing):
            traffic[route[place]].append(line)
    memory_bytes = max(usage.memory_bytes for usage in usages)
    first = usages[0]
    return [
        Usage(node_id, first.phase, wall_s, cpu_s, flops, memory_bytes, tuple(lines), first.method)
        for node_id, lines in traffic.items()
    ]


def _sums(usages: Iterable[Usage], places: Mapping[str, int]) -> dict[tuple[str | int, Kind], list[int]]:
    """Counts by receiver and kind; of a receiver that is a device, only its place counts."""
    sums: dict[tuple[str | int, Kind], list[int]] = {}
    for usage in usages:
        for line in usage.traffic:
            key = (places.get(line.receiver_id, line.receiver_id), line.kind)
            before = sums.get(key, [0] * len(_COUNTS))
            sums[key] = [count + getattr(line, name) for count, name in zip(before, _COUNTS, strict=True)]
    return sums


def _divide(
    receiver: str | int, kind: Kind, numbers: Sequence[int], routes: Routes
) -> list[tuple[Sequence[str], Traffic]]:
    """Counts divided over the routes that have the receiver's place; undivided where it is no device."""
    if isinstance(receiver, str):
        able, names = routes, [receiver] * len(routes)
    else:
        able = [route for route in routes if receiver < len(route)]
        names = [route[receiver] for route in able]
    parts = [[(number + len(able) - 1 - index) // len(able) for number in numbers] for index in range(len(able))]
    return [(route, Traffic(name, kind, *part)) for route, name, part in zip(able, names, parts, strict=True)]
