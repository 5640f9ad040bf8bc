"""Certificates for the tests of the transport: one federation's for all of them, and a new one for each that asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from ecogen.transport.authority import Authority, create_authority, issue


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority beside whose directory lie those of nodes edge-1 (edge), end-1 and end-2 (end)."""
    root: Path = tmp_path_factory.mktemp("federation")
    authority = create_authority(root / "authority", "lab")
    for node_id, tier in (("edge-1", "edge"), ("end-1", "end"), ("end-2", "end")):
        issue(authority, node_id, tier, root / node_id)
    return authority


@pytest.fixture(scope="session")
def nodes(authority: Authority) -> Path:
    """The directory with the nodes' directories."""
    return authority.directory.parent


@pytest.fixture
def lab(tmp_path: Path) -> Authority:
    """An authority of this test alone, beside whose directory lies that of node end-1 (end)."""
    authority = create_authority(tmp_path / "authority", "lab")
    issue(authority, "end-1", "end", tmp_path / "end-1")
    return authority
