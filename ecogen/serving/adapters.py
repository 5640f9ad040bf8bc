"""The adapters of a cluster: its edge keeps them, and the devices of its chain hold them, each its own blocks' part."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator

from ecogen.errors import CheckpointError, EcoGenError, NodeLostError, ProtocolError, TransportError
from ecogen.models.mixed_lora import Adapter
from ecogen.placement import Placement
from ecogen.serving.loading import DROP, Drop, parts_of
from ecogen.transport.base import Message, Transport

logger = logging.getLogger(__name__)


class Adapters:
    """Those of one cluster, by id.

    Args:
        refused: called with an adapter's id and the reason, where a chain is to serve without it.
    """

    def __init__(self, transport: Transport, refused: Callable[[str, EcoGenError], None]) -> None:
        self._transport, self._tell_refused = transport, refused
        self._kept: dict[str, Adapter] = {}
        self._refused: dict[str, EcoGenError] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._kept))

    def __contains__(self, adapter_id: object) -> bool:
        """Whether requests may name it."""
        return adapter_id in self._kept and adapter_id not in self._refused

    def keep(self, adapter_id: str, adapter: Adapter) -> None:
        """From now on; every chain that `bring` is called with holds it."""
        self._kept[adapter_id] = adapter

    def forget(self, adapter_id: str) -> None:
        """Keep it no longer; those who hold it still do."""
        self._kept.pop(adapter_id, None)
        self._refused.pop(adapter_id, None)

    def check(self, adapter_id: str) -> None:
        """Raise why a chain is to serve without it, if one is."""
        if problem := self._refused.get(adapter_id):
            raise problem

    async def give(self, adapter_id: str, adapter: Adapter, placement: Placement) -> None:
        """Have each device of a chain hold its part.

        Raises:
            NodeLostError: if one is lost, or holds no model any more.
            CheckpointError: if it does not fit the model.
        """
        _check_blocks(adapter, placement)
        gives = (self._give_to(placement, node_id, adapter_id, adapter) for node_id in placement.node_ids)
        for problem in await asyncio.gather(*gives, return_exceptions=True):
            if problem is not None:
                raise problem

    async def bring(self, placement: Placement) -> None:
        """Have a chain that is to serve hold all of them, those that come meanwhile too.

        Raises:
            NodeLostError: as `give`.
        """
        held: set[str] = set()
        while changed := held ^ (self._kept.keys() - self._refused.keys()):
            for adapter_id in changed:
                if adapter := self._kept.get(adapter_id):
                    held |= await self._given(adapter_id, adapter, placement)
                else:
                    await self.withdraw(adapter_id, placement)
                    held.discard(adapter_id)

    async def withdraw(self, adapter_id: str, placement: Placement) -> None:
        """Have no device of a chain hold it any longer."""
        drop = Message.of(DROP, Drop(adapter_id))
        drops = (self._transport.call(node_id, drop) for node_id in placement.node_ids)
        for problem in await asyncio.gather(*drops, return_exceptions=True):
            if isinstance(problem, TransportError):
                logger.warning("%s", problem)  # what comes after it holds nothing

    async def _given(self, adapter_id: str, adapter: Adapter, placement: Placement) -> set[str]:
        """Its id; none where it is refused. It came while nobody could see whether it fits."""
        try:
            await self.give(adapter_id, adapter, placement)
        except NodeLostError:
            raise
        except EcoGenError as problem:
            logger.warning("adapter %s: %s", adapter_id, problem)
            self._refused[adapter_id] = problem
            self._tell_refused(adapter_id, problem)  # a chain without it would answer as the backbone does
            return set()
        return {adapter_id}

    async def _give_to(self, placement: Placement, node_id: str, adapter_id: str, adapter: Adapter) -> None:
        blocks = [block for segment in placement.segments_of(node_id) for block in segment.blocks]
        try:
            for message in parts_of(adapter_id, adapter.of_blocks(blocks)):
                await self._transport.call(node_id, message)
        except ProtocolError as problem:
            raise NodeLostError(node_id, str(problem)) from problem


def _check_blocks(adapter: Adapter, placement: Placement) -> None:
    """Refuse an adapter of a deeper model: no device would hold what is for blocks that are not here."""
    segments = [segment for node_id in placement.node_ids for segment in placement.segments_of(node_id)]
    here = {block for segment in segments for block in segment.blocks}
    if strange := sorted(adapter.blocks - here):
        said = f"it is for block {strange[0]} too, and the model has {len(here)} blocks"
        raise CheckpointError(f"the adapter does not fit the model: {said}")
