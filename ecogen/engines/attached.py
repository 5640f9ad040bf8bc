"""A federation that somebody else started, seen with an operator's certificate: `ecogen watch`."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from torch import Tensor

from ecogen import config as recipes
from ecogen.engines.federation import Federation
from ecogen.errors import NodeLostError, RunError
from ecogen.models.checkpoint import Foundation
from ecogen.models.family import family_of, whole_segment
from ecogen.models.tunables import is_head
from ecogen.node.context import DESCRIBE, OPERATOR, STATUS, Welcome
from ecogen.node.status import Status
from ecogen.transport.base import Message, Peer, Transport
from ecogen.transport.codec import Limits
from ecogen.transport.credentials import load_credentials
from ecogen.transport.wire import GrpcTransport
from ecogen.tuning.foundation import fetch_foundation

_ANY_BYTES = 2**31 - 1  # gRPC's own largest message: the nodes' limit is not known here


class _Elsewhere:
    """In the place of an engine: the nodes are somebody else's, and where they are the cloud says.

    Args:
        addresses: of the nodes, as far as they are known.
    """

    def __init__(self, transport: Transport, addresses: dict[str, str]) -> None:
        self.transport, self._addresses = transport, addresses

    def check(self) -> None:
        """Nothing: whoever started the nodes looks after them."""

    def is_given_up(self, node_id: str) -> bool:
        """Never, for the same reason."""
        return False

    def address(self, node_id: str) -> str:
        """Where a node said that it is.

        Raises:
            NodeLostError: if it was not there.
        """
        if node_id not in self._addresses:
            raise NodeLostError(node_id, "the cloud does not know where it is; start it again")
        self.transport.learn(node_id, self._addresses[node_id])
        return self._addresses[node_id]

    def update(self, addresses: dict[str, str]) -> None:
        """Learn where nodes are now."""
        self._addresses |= addresses


class AttachedFederation(Federation):
    """Watches and saves; the foundation model is fetched from the cloud, and the time is that of the records."""

    async def tunables(self) -> dict[str, Tensor]:
        reply = await self._call(self.topology.cloud_id, Message.of(STATUS, counted=False))
        assert isinstance(self._engine, _Elsewhere)
        self._engine.update(reply.read(Status).addresses)  # edges may have come, or moved, since
        return await super().tunables()

    async def foundation(self) -> Foundation:
        reply = await self._call(self.topology.cloud_id, Message.of(DESCRIBE, counted=False))
        welcome = reply.read(Welcome)
        family = family_of(welcome.model["model_type"])
        config = family.config(welcome.model)
        names = welcome.offered or family.names(config, [whole_segment(config)], ())
        names = [name for name in names if not (self.recipe.tunables.head and is_head(name))]  # it is the task's
        transport, cloud_id = self._engine.transport, self.topology.cloud_id
        return await fetch_foundation(transport, cloud_id, config, names, self.folder, asyncio.to_thread, counted=False)

    @property
    def engine(self) -> str:
        return "by hand"

    @property
    def wall_s(self) -> float:
        began_s = [record.time_s - getattr(record, "wall_s", 0.0) for record in self.records]
        return max(record.time_s for record in self.records) - min(began_s)


@asynccontextmanager
async def attach(cloud_id: str, address: str, certificates: Path) -> AsyncIterator[AttachedFederation]:
    """The federation of a cloud that is running; leaving stops nothing.

    Raises:
        RunError: if it serves.
        AuthenticationError, NodeLostError: as `operator_of`.
    """
    async with operator_of(cloud_id, address, certificates) as (transport, status):
        recipe = recipes.from_table(status.recipe, f"the recipe of {cloud_id}")
        if recipe.task == "serve":
            raise RunError(
                f"{cloud_id} serves and has no end to wait for; use `ecogen serve --join` or `ecogen status`"
            )
        engine = _Elsewhere(transport, status.addresses | {cloud_id: address})
        with tempfile.TemporaryDirectory(prefix="ecogen-") as folder:
            yield AttachedFederation(recipe, engine, Path(folder))


@asynccontextmanager
async def operator_of(cloud_id: str, address: str, certificates: Path) -> AsyncIterator[tuple[GrpcTransport, Status]]:
    """An operator's way to the nodes of a cloud that is running, and how these are.

    Raises:
        AuthenticationError: if the certificate is no operator's, or the cloud refuses it.
        NodeLostError: if the cloud does not answer.
    """
    credentials = load_credentials(certificates, tier=OPERATOR)
    own = Peer(credentials.identity.node_id, credentials.identity.tier)
    transport = GrpcTransport(own, credentials=credentials, limits=Limits(message_bytes=_ANY_BYTES))
    transport.learn(cloud_id, address)
    try:
        reply = await transport.call(cloud_id, Message.of(STATUS, counted=False), timeout_s=10)
        yield transport, reply.read(Status)
    finally:
        await transport.close()
