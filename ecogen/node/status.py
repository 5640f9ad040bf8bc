"""How a federation is, as its cloud tells an operator who asks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec

from ecogen import config as recipes
from ecogen.node.context import HEARD, ProgressReport
from ecogen.node.presence import Presence, presences
from ecogen.records import Record
from ecogen.reports.served import ServedSummary, summarise_served
from ecogen.runtime.membership import Members
from ecogen.transport.base import Message, Peer, Transport

_ANSWER_S = 2.0


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


class Heard(msgspec.Struct, frozen=True):
    """Edge to cloud: seconds since each of its devices gave a sign of life."""

    heard_s: dict[str, float]


def tell_heard(members: Members) -> Callable[[Peer, Message], Awaitable[Message]]:
    """The method by which an edge tells its cloud when it heard of its devices."""

    async def tell(_: Peer, __: Message) -> Message:
        return Message.of(HEARD, Heard(members.heard_s), counted=False)

    return tell


async def ask_heard(transport: Transport, members: Members) -> dict[str, float]:
    """Seconds since each node below the cloud was heard of: edges by the cloud itself, devices by those that answer."""
    ask = Message.of(HEARD, counted=False)
    calls = [transport.call(edge_id, ask, timeout_s=_ANSWER_S) for edge_id in members.ready_ids]
    heard_s = members.heard_s
    for reply in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(reply, Message):
            heard_s |= reply.read(Heard).heard_s
    return heard_s


def status_of(
    recipe: recipes.Recipe,
    progress: ProgressReport,
    records: Sequence[Record],
    addresses: dict[str, str],
    heard_s: Mapping[str, float],
    *,
    finished: bool,
) -> Status:
    """How it is now, as its cloud tells.

    Args:
        addresses: of the edges that are here.
        heard_s: seconds since a node was heard of, where that is known better than records tell.
    """
    now_s = time.time()
    topology = recipes.build_topology(recipe.topology)
    nodes = presences(records, list(topology.nodes))
    for node in nodes:
        node.time_s = max(node.time_s, now_s - heard_s.get(node.node_id, now_s))
        if node.node_id == topology.cloud_id:  # it tells
            node.time_s, node.state = now_s, "finished" if node.state == "finished" else "ready"
    served = summarise_served(records, topology) if recipe.task == "serve" else None
    table = recipes.to_table(recipe)
    return Status(table, progress, len(records), now_s, nodes, addresses, finished, served)
