"""One process a node that serves: who is given up is missed by nobody whom others can answer."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from ecogen.config import Serving
from ecogen.engines import local
from ecogen.engines.local import LocalEngine, launch_local
from ecogen.engines.served import check_serving
from ecogen.errors import UnavailableError
from ecogen.serving.gateway import Gateway
from tests.models.decoders import save_decoder
from tests.serving.federations import answer, tiny_recipe

EDGE, DEVICE = "edge-0", "edge-0.cluster-0.device-1"
SPEC = Serving(slots=2, max_tokens=64, patience_s=60)


async def test_serving_goes_on_without_who_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A device, and then an edge is lost once; only when the edge is given up too, nobody can answer."""
    monkeypatch.setattr(local, "_PAUSE_S", 0.01)
    save_decoder("llama", tmp_path / "tiny")
    recipe = tiny_recipe(tmp_path / "tiny", devices=2, serving=SPEC)
    async with asyncio.timeout(90), launch_local(recipe, tmp_path / "run") as federation:
        engine = federation._engine
        assert isinstance(engine, LocalEngine)
        gateway = Gateway(federation.transport, [EDGE], check_serving(recipe), SPEC.patience_s, federation.is_given_up)
        wanted = await answer(gateway, [5, 6, 7], 8)
        await give_up(engine, DEVICE)
        assert f"{DEVICE} is given up: {DEVICE} was killed by signal 9, for the 5th time" in caplog.text
        assert "then serve anew" in caplog.text
        assert "--resume" not in caplog.text
        assert await answer(gateway, [5, 6, 7], 8) == wanted
        os.kill(engine.pid(EDGE), signal.SIGKILL)
        assert await answer(gateway, [5, 6, 7], 8) == wanted
        await give_up(engine, EDGE)
        with pytest.raises(UnavailableError, match="no edge is left: edge-0 failed for good"):
            await answer(gateway, [5, 6, 7], 8)
        await gateway.close()


async def give_up(engine: LocalEngine, node_id: str) -> None:
    """Kill a node's process whenever it comes."""
    killed: set[int] = set()
    while not engine.is_given_up(node_id):
        if (pid := engine._children[node_id].process.pid) and pid not in killed:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.02)
