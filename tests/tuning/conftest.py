"""An edge and its devices, for the tests of its rounds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.tuning.edges import Edge


@pytest.fixture
async def alone(tmp_path: Path) -> AsyncIterator[Edge]:
    """An edge before its devices come."""
    edge = Edge(tmp_path)
    yield edge
    edge.worker.close()


@pytest.fixture
async def edge(alone: Edge) -> Edge:
    """An edge whose devices are all here."""
    await alone.arrive(*alone.devices)
    return alone
