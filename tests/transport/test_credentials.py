"""A node's certificates: what is wrong is named with its file and the next step."""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from pathlib import Path

import pytest

from ecogen.errors import AuthenticationError
from ecogen.transport import credentials
from ecogen.transport.authority import Authority, create_authority, issue
from ecogen.transport.credentials import load_credentials, load_revocations


def test_wrong_authority(lab: Authority, tmp_path: Path) -> None:
    other = create_authority(tmp_path / "other", "lab")
    (tmp_path / "end-1" / "authority.pem").write_bytes(other.certificate_pem)
    with pytest.raises(AuthenticationError, match=r"node\.pem was not issued by the authority 'lab'.*certs issue"):
        load_credentials(tmp_path / "end-1")


def test_expired_and_not_yet_valid(lab: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Later:
            return cls.fromtimestamp(datetime.now(UTC).timestamp() + days * 86400, tz)

    monkeypatch.setattr(credentials, "datetime", Later)
    days = 366
    with pytest.raises(AuthenticationError, match=r"node\.pem expired on .* UTC; issue it again"):
        load_credentials(tmp_path / "end-1")
    days = -1
    with pytest.raises(AuthenticationError, match=r"valid only from .*check this node's clock"):
        load_credentials(tmp_path / "end-1")


def test_key_of_another_node(lab: Authority, tmp_path: Path) -> None:
    issue(lab, "end-2", "end", tmp_path / "end-2")
    (tmp_path / "end-1" / "node.key").write_bytes((tmp_path / "end-2" / "node.key").read_bytes())
    with pytest.raises(AuthenticationError, match=r"node\.key does not match the certificate"):
        load_credentials(tmp_path / "end-1")


@pytest.mark.parametrize(
    ("wanted", "says"), [({"tier": "edge"}, "of tier 'end', not 'edge'"), ({"node_id": "end-9"}, "of node 'end-1'")]
)
def test_wrong_tier_or_node(lab: Authority, tmp_path: Path, wanted: dict[str, str], says: str) -> None:
    with pytest.raises(AuthenticationError, match=says):
        load_credentials(tmp_path / "end-1", **wanted)


@pytest.mark.parametrize("name", ["node.pem", "node.key", "authority.pem"])
def test_missing_and_damaged_files(lab: Authority, tmp_path: Path, name: str) -> None:
    path = tmp_path / "end-1" / name
    path.write_bytes(b"nonsense")
    with pytest.raises(AuthenticationError, match=f"{name} is not a .*issue it again"):
        load_credentials(tmp_path / "end-1")
    path.unlink()
    with pytest.raises(AuthenticationError, match=f"{name} is missing; issue it again"):
        load_credentials(tmp_path / "end-1")


def test_a_revocation_list_must_be_the_authoritys(lab: Authority, tmp_path: Path) -> None:
    other = create_authority(tmp_path / "other", "lab")
    with pytest.raises(AuthenticationError, match="not signed by"):
        load_revocations(other.directory / "revoked.pem", lab.certificate_pem)
    with pytest.raises(AuthenticationError, match=r"nowhere\.pem is missing; copy revoked\.pem"):
        load_revocations(tmp_path / "nowhere.pem", lab.certificate_pem)
