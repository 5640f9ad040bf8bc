"""The authority: what it issues is accepted, what it cannot issue, revoke or load is named."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from ecogen.errors import AuthenticationError, StorageError
from ecogen.transport.authority import Authority, create_authority, issue, issued, load_authority, revoke, sign
from ecogen.transport.credentials import Revocations, identity_of, load_credentials, load_revocations


def test_a_certificate_names_federation_tier_and_node(lab: Authority, tmp_path: Path) -> None:
    identity = load_credentials(tmp_path / "end-1", node_id="end-1", tier="end").identity
    assert identity.uri == "ecogen://lab/end/end-1"
    assert f"{identity.serial:x}" == issued(lab)[0].serial
    assert load_authority(tmp_path / "authority").federation == "lab"


def test_keys_are_readable_by_their_owner_only(lab: Authority, tmp_path: Path) -> None:
    for key in (tmp_path / "authority" / "authority.key", tmp_path / "end-1" / "node.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert not list(tmp_path.rglob(".*")), "no temporary file may stay"


def test_keys_are_not_in_what_is_logged(lab: Authority, tmp_path: Path) -> None:
    credentials = load_credentials(tmp_path / "end-1")
    assert "PRIVATE" not in repr(credentials)
    assert "PrivateKey" not in repr(lab)


def test_an_authority_is_not_overwritten(lab: Authority) -> None:
    with pytest.raises(AuthenticationError, match="already holds an authority"):
        create_authority(lab.directory, "lab")


def test_where_no_folder_can_be_nothing_is_made_or_issued(lab: Authority, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = issued(lab)
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(StorageError, match="cannot make the folder"):
            create_authority(folder, "lab")
        with pytest.raises(StorageError, match="cannot make the folder"):
            issue(lab, "end-2", "end", folder)
    assert issued(lab) == before


@pytest.mark.parametrize("name", ["", "Edge", "a..b", "a.-b", "-a", "a" * 64, "a/b"])
def test_names_that_cannot_be_hosts_are_refused(lab: Authority, tmp_path: Path, name: str) -> None:
    with pytest.raises(AuthenticationError, match="cannot be in a certificate"):
        issue(lab, name, "end", tmp_path / "new")


def test_unknown_tiers_and_lives_beyond_the_authority_are_refused(lab: Authority, tmp_path: Path) -> None:
    with pytest.raises(AuthenticationError, match=r"tier 'fog'.*cloud, edge, end"):
        issue(lab, "end-2", "fog", tmp_path / "new")
    with pytest.raises(AuthenticationError, match="beyond the authority's own end"):
        issue(lab, "end-2", "end", tmp_path / "new", valid_days=4000)


def test_a_node_may_keep_its_key(lab: Authority) -> None:
    from cryptography import x509

    key = ec.generate_private_key(ec.SECP256R1())
    certificate = x509.load_pem_x509_certificate(sign(lab, key.public_key(), "end-3", "end"))
    assert certificate.public_key() == key.public_key()
    assert identity_of(certificate).node_id == "end-3"


def test_revocation_names_serials_and_nodes_without_another_certificate(lab: Authority, tmp_path: Path) -> None:
    path = lab.directory / "revoked.pem"
    assert not load_revocations(path, lab.certificate_pem).serials
    serial = load_credentials(tmp_path / "end-1").identity.serial
    revoke(lab, "end-1")
    revocations = load_revocations(path, lab.certificate_pem)
    assert revocations == Revocations(frozenset({serial}), frozenset({"end-1"}))
    issue(lab, "end-1", "end", tmp_path / "end-1")
    revocations = load_revocations(path, lab.certificate_pem)
    assert revocations == Revocations(frozenset({serial}))


def test_revoking_twice_or_nobody_is_an_error(lab: Authority) -> None:
    revoke(lab, "end-1")
    for node_id in ("end-1", "end-7"):
        with pytest.raises(AuthenticationError, match=f"'{node_id}' has no certificate to revoke.*end-1"):
            revoke(lab, node_id)


def test_an_authority_whose_key_is_another_is_refused(lab: Authority, tmp_path: Path) -> None:
    other = create_authority(tmp_path / "other", "lab")
    (lab.directory / "authority.key").write_bytes((other.directory / "authority.key").read_bytes())
    with pytest.raises(AuthenticationError, match=r"authority\.key does not match"):
        load_authority(replace(lab).directory)
