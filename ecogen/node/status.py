"""How a federation is, as its cloud tells an operator who asks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from ecogen import config as recipes
from ecogen.node.context import ProgressReport
from ecogen.node.presence import Presence, presences
from ecogen.records import Record
from ecogen.reports.served import ServedSummary, summarise_served
from ecogen.runtime.membership import Members


class Status(msgspec.Struct, frozen=True):
    """How the federation is.

    Attributes:
        recipe: the resolved recipe, as a table.
        time_s: the cloud's clock, to which the presences' times are compared.
        addresses: of the edges that are here.
        served: what was served so far, where the federation serves.
    """

    recipe: dict[str, Any]
    progress: ProgressReport
    num_records: int
    time_s: float
    presences: list[Presence]
    addresses: dict[str, str]
    finished: bool
    served: ServedSummary | None = None


def status_of(
    recipe: recipes.Recipe,
    progress: ProgressReport,
    records: Sequence[Record],
    members: Members,
    cloud_id: str,
    *,
    finished: bool,
) -> Status:
    """How it is now, by its records and by when edges were heard of last."""
    now_s = time.time()
    topology = recipes.build_topology(recipe.topology)
    nodes = presences(records, list(topology.nodes))
    heard_s = members.heard_s | {cloud_id: 0.0}
    for node in nodes:
        node.time_s = max(node.time_s, now_s - heard_s.get(node.node_id, now_s))
    served = summarise_served(records, topology) if recipe.task == "serve" else None
    table = recipes.to_table(recipe)
    return Status(table, progress, len(records), now_s, nodes, members.addresses, finished, served)
