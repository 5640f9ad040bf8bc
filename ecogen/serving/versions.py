"""Which version of an adapter a name means, published in two phases.

A version is given to all edges first, and by them to all stages that there are; those that come later hold it before
they serve. Only then does the name mean it, for requests that come from then on. Those before it end on theirs, and
what nobody uses any more is dropped everywhere.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count

from ecogen.errors import (
    CheckpointError,
    NodeLostError,
    ServingError,
    TransportError,
    UnavailableError,
    UnknownModelError,
)
from ecogen.models.mixed_lora import Adapter
from ecogen.serving.generation import ServedModel
from ecogen.serving.loading import DROP, HOLDS, Drop, Held, Holds, parts_of
from ecogen.transport.base import Message, Transport

_PAUSE_S = 0.2

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Version:
    """What a name means, or meant: an adapter, or the backbone alone."""

    served: ServedModel
    adapter_id: str = ""
    adapter: Adapter | None = None
    num_users: int = 0


class Versions:
    """The models that may be asked for by name, and what edges hold of them.

    Args:
        transport: the operator's, which knows where the edges are.
        model: the backbone.
        patience_s: how long who brings an adapter waits for devices that hold the model.
    """

    def __init__(self, transport: Transport, edge_ids: Sequence[str], model: ServedModel, patience_s: float) -> None:
        self._transport, self._edge_ids, self._patience_s = transport, edge_ids, patience_s
        self._backbone = Version(model)
        self._meant: dict[tuple[str | None, str], Version] = {(None, model.name): self._backbone}
        self._coming: set[Version] = set()
        self._retired: set[Version] = set()
        self._publishing: defaultdict[str | None, asyncio.Lock] = defaultdict(asyncio.Lock)  # of each tenant
        self._giving = {edge_id: asyncio.Lock() for edge_id in edge_ids}  # an adapter's parts follow one another
        self._drops: set[asyncio.Task[None]] = set()
        self._name, self._numbers = secrets.token_hex(4), count()

    def models(self, tenant: str | None = None) -> Sequence[ServedModel]:
        """Those that a tenant may ask for, the backbone first."""
        return [version.served for version in self._meant.values() if version.served.tenant in (None, tenant)]

    def find(self, name: str, tenant: str | None) -> Version:
        """A tenant's own of that name, or else the one for all.

        Raises:
            UnknownModelError: if there is none.
        """
        version = self._meant.get((tenant, name)) or self._meant.get((None, name))
        if version is None:
            raise UnknownModelError(f"there is no model {name!r}; GET /v1/models lists those there are")
        return version

    @contextmanager
    def using(self, version: Version) -> Iterator[None]:
        """Keep a version until the block ends."""
        version.num_users += 1
        try:
            yield
        finally:
            version.num_users -= 1
            self._drop_unused(version)

    async def put_adapter(self, name: str, adapter: Adapter, tenant: str | None = None) -> None:
        """Add an adapter under a name, or replace the one that has it.

        An edge that is lost gets it when it is back, and one whose devices are away keeps it for them.

        Args:
            tenant: who alone may ask for it; None for all.

        Raises:
            ServingError: if the name is the backbone's.
            CheckpointError: if it does not fit the model; then all is as it was.
            NodeLostError: if no edge is here; then too.
            UnavailableError: if none has devices that hold the model, so that nobody sees whether it fits; then too.
        """
        async with self._publishing[tenant]:
            backbone = self._backbone.served
            if name == backbone.name:
                raise ServingError(f"the name {name!r} is the backbone's; choose another")
            served = ServedModel(name, time.time(), backbone.max_tokens, backbone.name, tenant, adapter.nbytes)
            version = Version(served, f"{self._name}-{next(self._numbers)}", adapter)
            self._coming.add(version)
            try:
                await self._give_all(version)
            except BaseException:  # whoever brought it may have left
                self._coming.discard(version)
                await asyncio.shield(self._start_drop(version))
                raise
            finally:
                self._coming.discard(version)
            old = self._meant.get((tenant, name))
            self._meant[tenant, name] = version
            if old is not None:
                self._retire(old)

    async def remove_adapter(self, name: str, tenant: str | None = None) -> None:
        """No request may name it any more; those that did end on it.

        Raises:
            UnknownModelError: if the tenant has no such adapter.
        """
        async with self._publishing[tenant]:
            version = self._meant.get((tenant, name))
            if version is None or version is self._backbone:
                raise UnknownModelError(f"there is no adapter {name!r}")
            self._retire(self._meant.pop((tenant, name)))

    async def give_known(self, edge_id: str) -> None:
        """Bring an edge what it may be asked for now, and soon; whether the latter fits, whoever brings it is told.

        What it cannot hold it says again to those who ask for it, and others do not wait for that.
        """
        known, coming = [*self._meant.values(), *self._retired], [*self._coming]
        for version in known:
            if version.adapter is not None:
                try:
                    await self._give(edge_id, version)
                except CheckpointError as problem:
                    logger.warning("%s cannot hold %s: %s", edge_id, version.served.name, problem)
        for version in coming:
            with suppress(CheckpointError):
                await self._give(edge_id, version)

    def close(self) -> None:
        """Ask the edges nothing more; what they hold goes with the last gateway."""
        for task in self._drops:
            task.cancel()

    async def _give_all(self, version: Version) -> None:
        """Bring an adapter to all edges that are here; devices of one at least must hold it, to see that it fits."""
        deadline_s = time.monotonic() + self._patience_s
        are_held = await self._ask_all(lambda edge_id: self._give(edge_id, version))
        while not any(are_held):
            if time.monotonic() > deadline_s:
                raise UnavailableError("no devices hold the model now, to see whether the adapter fits; try again")
            await asyncio.sleep(_PAUSE_S)
            are_held = await self._ask_all(lambda edge_id: self._has(edge_id, version))

    async def _ask_all(self, ask: Callable[[str], Awaitable[bool]]) -> list[bool]:
        """What the edges say that are here, one at least."""
        told = await asyncio.gather(*map(ask, self._edge_ids), return_exceptions=True)
        problems = [one for one in told if isinstance(one, BaseException)]
        others = [problem for problem in problems if not isinstance(problem, NodeLostError)]
        if others or len(problems) == len(self._edge_ids):
            raise (others or problems)[0]
        return [one for one in told if not isinstance(one, BaseException)]

    async def _give(self, edge_id: str, version: Version) -> bool:
        """Bring an adapter to an edge, which keeps it and brings it to its stages; whether some hold it."""
        assert version.adapter is not None
        is_held = False
        async with self._giving[edge_id]:
            if not self._is_wanted(version):
                return False
            for message in parts_of(version.adapter_id, version.adapter):
                is_held = (await self._transport.call(edge_id, message)).read(Held).is_held
        return is_held

    def _is_wanted(self, version: Version) -> bool:
        """Whether edges are to hold it; one that was taken away meanwhile has been dropped already."""
        return version in self._coming or version in self._retired or version in self._meant.values()

    async def _has(self, edge_id: str, version: Version) -> bool:
        """Whether devices of an edge that was given an adapter hold it by now."""
        reply = await self._transport.call(edge_id, Message.of(HOLDS, Holds(version.adapter_id)))
        return reply.read(Held).is_held

    def _retire(self, version: Version) -> None:
        """No request may begin with it; it is dropped when none uses it."""
        self._retired.add(version)
        self._drop_unused(version)

    def _drop_unused(self, version: Version) -> None:
        if version in self._retired and not version.num_users:
            self._retired.discard(version)
            self._start_drop(version)

    def _start_drop(self, version: Version) -> asyncio.Task[None]:
        task = asyncio.create_task(self._drop(version))
        self._drops.add(task)
        task.add_done_callback(self._drops.discard)
        return task

    async def _drop(self, version: Version) -> None:
        drops = (self._drop_at(edge_id, version) for edge_id in self._edge_ids)
        for problem in await asyncio.gather(*drops, return_exceptions=True):
            if isinstance(problem, TransportError):
                logger.warning("%s", problem)  # what it is when it comes back holds nothing

    async def _drop_at(self, edge_id: str, version: Version) -> None:
        async with self._giving[edge_id]:  # not before what is being given
            await self._transport.call(edge_id, Message.of(DROP, Drop(version.adapter_id)))
