"""Who may call and stream: tier and id, both as the certificate says, and only neighbours on a route."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from ecogen.config import Recipe
from ecogen.engines.inproc import InprocEngine
from ecogen.errors import AuthenticationError, EcoGenError
from ecogen.node.context import BOOKS, STATUS, Caller
from ecogen.transport.base import Message, Peer
from ecogen.transport.memory import MemoryNetwork, MemoryTransport
from ecogen.tuning.messages import FINISH, AttemptKey, Flow


@pytest.mark.parametrize(
    ("peer", "admitted"),
    [
        (Peer("edge-0", "edge"), True),
        (Peer("edge-0", "end"), False),
        (Peer("edge-1", "edge"), False),
        (Peer("edge", "end"), False),
    ],
)
def test_a_caller_is_a_tier_and_a_node(peer: Peer, admitted: bool) -> None:
    assert Caller("edge", "edge-0").admits(peer) is admitted


def test_a_node_that_is_called_like_a_tier_has_no_more_rights() -> None:
    assert not Caller("operator").admits(Peer("operator", "end"))
    assert Caller("operator").admits(Peer("operator", "operator"))


async def test_strangers_can_neither_call_nor_stream(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    network = MemoryNetwork()
    engine = InprocEngine(recipe_of(), tmp_path, network, None)
    device_id = "edge-0.cluster-0.device-0"
    try:
        await engine.start()
        stranger = network.join(Peer("edge-7.cluster-0.device-0", "end"))
        for node_id, method in (("cloud", STATUS), (device_id, BOOKS)):
            with pytest.raises(AuthenticationError, match="may not call"):
                await stranger.call(node_id, Message.of(method))
        with pytest.raises(EcoGenError):
            await _stream_to(stranger, device_id)
    finally:
        await engine.stop()


async def _stream_to(stranger: MemoryTransport, node_id: str) -> None:
    """Say that a cluster has finished; raises what the node thinks of that, or that it closed the stream."""
    async with asyncio.timeout(5):
        stream = await stranger.open(node_id)
        await stream.send(Message.of(FINISH, Flow(AttemptKey(0, 1_000_001), 0)))
        if await stream.receive() is None:
            raise AuthenticationError("closed")
