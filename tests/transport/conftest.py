"""One federation's certificates for all tests of the transport."""

from __future__ import annotations

from pathlib import Path

import pytest

from ecogen.transport.certs import Authority, create_authority, issue


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
