"""What the cloud gathers from its edges, one thing of each for every round; waits for those that are here."""

from __future__ import annotations

from collections.abc import Collection
from typing import Generic, TypeVar

from ecogen.runtime.membership import Members

T = TypeVar("T")


class Gathering(Generic[T]):
    """Things by round and edge.

    Args:
        patience_s: how long a lost edge is waited for.
    """

    def __init__(self, members: Members, patience_s: float) -> None:
        self._members, self._patience_s = members, patience_s
        self._pending: dict[int, dict[str, T]] = {}
        self._skipped: dict[str, int] = {}  # the round to which an edge has gone on
        self._finished: set[str] = set()

    async def put(self, round_index: int, edge_id: str, thing: T) -> None:
        """An edge has sent its own."""
        self._pending.setdefault(round_index, {})[edge_id] = thing
        await self._members.wake()

    async def skip(self, edge_id: str, round_index: int) -> None:
        """An edge has gone on to a round, and sends no more for those before it."""
        self._skipped[edge_id] = max(self._skipped.get(edge_id, 0), round_index)
        await self._members.wake()

    def drop(self, round_index: int) -> None:
        """Forget what was sent for a round and for those before it."""
        self._pending = {index: things for index, things in self._pending.items() if index > round_index}

    async def take(self, round_index: int, of: Collection[str] | None = None) -> dict[str, T]:
        """What the edges sent for a round, once every one has, or the missing ones are lost for too long.

        Args:
            of: those that are waited for; None for all.
        """
        await self._wait_for_all(round_index, set(self._members.expected if of is None else of))
        return self._pending.pop(round_index, {})

    async def set_finished(self, edge_ids: set[str]) -> None:
        """These edges have done their last round; nobody waits for them any more."""
        self._finished = set(edge_ids)
        await self._members.wake()

    async def _wait_for_all(self, round_index: int, of: set[str]) -> None:
        def missing() -> set[str]:
            return of - self._told(round_index) - self._finished

        def are_gone() -> bool:
            return not missing() & set(self._members.ready_ids)

        while missing():
            gone = are_gone()
            news = await self._members.wait_for(
                lambda gone=gone: not missing() or are_gone() != gone,  # type: ignore[misc]
                self._patience_s if gone else None,
            )
            if not news:
                return

    def _told(self, round_index: int) -> set[str]:
        """The edges that have sent their own, or have gone on alone to a later round."""
        sent = {edge_id for index, things in self._pending.items() if index >= round_index for edge_id in things}
        return sent | {edge_id for edge_id, index in self._skipped.items() if index > round_index}
