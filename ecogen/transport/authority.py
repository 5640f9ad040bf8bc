"""A federation's authority: what its operator does to issue certificates and to revoke them.

    authority/   authority.pem  authority.key  revoked.pem  issued.jsonl       stays with the operator
    <node>/      node.pem  node.key  authority.pem                             goes to the node, with revoked.pem

What a certificate and an entry of the revocation list say is told in `credentials`, which reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ecogen.errors import AuthenticationError
from ecogen.storage import make_folder, write_atomically
from ecogen.transport.credentials import (
    AUTHORITY_CERTIFICATE,
    NODE_CERTIFICATE,
    NODE_ID_OID,
    NODE_KEY,
    REVOKED,
    TIERS,
    Identity,
    check_key,
    common_name,
    host_name,
    identity_of,
    key_pem,
    load_certificate,
    load_key,
    load_revocations,
)

AUTHORITY_KEY = "authority.key"
_ISSUED = "issued.jsonl"

# Both become parts of a URI, and a node id labels of a host name: RFC 1123, at most 63 characters each.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?){0,3}")
# Nodes' clocks may differ by this much.
_CLOCK_SKEW = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Authority:
    """The one who may issue and revoke certificates, loaded from its directory."""

    directory: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def federation(self) -> str:
        return common_name(self.certificate)

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


class Issued(msgspec.Struct, frozen=True):
    """One certificate as the authority's book has it."""

    serial: str
    node_id: str
    tier: str
    not_after: datetime

    @property
    def serial_number(self) -> int:
        return int(self.serial, 16)


def create_authority(directory: Path, federation: str, *, valid_days: int = 3650) -> Authority:
    """A new authority in `directory`, which has none yet.

    Raises:
        AuthenticationError: if there is one already, or the federation's name cannot be part of a URI.
        StorageError: if the directory cannot be made.
    """
    _check_name("federation", federation)
    if (directory / AUTHORITY_KEY).exists():
        raise AuthenticationError(f"{directory} already holds an authority; issue with it or choose another directory")
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(federation)
    builder = _builder(name, name, key.public_key(), key.public_key(), valid_days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
    authority = Authority(directory, builder.sign(key, hashes.SHA256()), key)
    make_folder(directory)
    write_atomically(directory / AUTHORITY_KEY, key_pem(key), mode=0o600)
    write_atomically(directory / AUTHORITY_CERTIFICATE, authority.certificate_pem)
    _write_revoked(authority, set())
    return authority


def load_authority(directory: Path) -> Authority:
    """The authority that `create_authority` made.

    Raises:
        AuthenticationError: if a file is missing or damaged, or key and certificate do not match.
    """
    certificate = load_certificate(directory / AUTHORITY_CERTIFICATE, "run `ecogen certs init` there")
    key = load_key(directory / AUTHORITY_KEY, "run `ecogen certs init` there or restore the key from its backup")
    check_key(certificate, key, directory / AUTHORITY_KEY, "restore both files from the same backup")
    return Authority(directory, certificate, key)


def issue(authority: Authority, node_id: str, tier: str, directory: Path, *, valid_days: int = 365) -> Identity:
    """Write a new key and certificate for a node, and the authority's certificate, into `directory`.

    Raises:
        AuthenticationError: as `sign`.
        StorageError: if the directory cannot be made; then nothing is issued.
    """
    make_folder(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate_pem = sign(authority, key.public_key(), node_id, tier, valid_days=valid_days)
    write_atomically(directory / NODE_KEY, key_pem(key), mode=0o600)
    write_atomically(directory / NODE_CERTIFICATE, certificate_pem)
    write_atomically(directory / AUTHORITY_CERTIFICATE, authority.certificate_pem)
    return identity_of(x509.load_pem_x509_certificate(certificate_pem))


def sign(
    authority: Authority, public_key: ec.EllipticCurvePublicKey, node_id: str, tier: str, *, valid_days: int = 365
) -> bytes:
    """A certificate for a key that the node keeps to itself, as PEM; it is entered in the authority's book.

    Raises:
        AuthenticationError: if the node id cannot be a host name, the tier is unknown, or the authority expires first.
    """
    _check_name("node id", node_id)
    if tier not in TIERS:
        raise AuthenticationError(f"tier {tier!r} of node {node_id!r} is unknown; choose one of {', '.join(TIERS)}")
    if node_id in TIERS and node_id != tier:
        raise AuthenticationError(
            f"node id {node_id!r} is kept for its own tier, not {tier!r}; choose another id, or that tier"
        )
    builder = _builder(
        _name(node_id), authority.certificate.subject, public_key, authority.key.public_key(), valid_days
    )
    builder = builder.add_extension(_alternative_names(authority.federation, tier, node_id), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
    usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    certificate = builder.add_extension(usages, critical=False).sign(authority.key, hashes.SHA256())
    if certificate.not_valid_after_utc > authority.certificate.not_valid_after_utc:
        raise AuthenticationError(
            f"{valid_days} days for node {node_id!r} are beyond the authority's own end, "
            f"{authority.certificate.not_valid_after_utc:%Y-%m-%d}; choose fewer days"
        )
    _book(authority, certificate, node_id, tier)
    return certificate.public_bytes(serialization.Encoding.PEM)


def revoke(authority: Authority, node_id: str) -> list[Issued]:
    """Revoke every certificate that the node has, and rewrite the revocation list.

    Raises:
        AuthenticationError: if it has none that is not revoked already.
    """
    serials = _revoked_serials(authority)
    revoked = [entry for entry in issued(authority) if entry.node_id == node_id and entry.serial_number not in serials]
    if not revoked:
        known = ", ".join(sorted({entry.node_id for entry in issued(authority)})) or "none"
        raise AuthenticationError(f"node {node_id!r} has no certificate to revoke; nodes with certificates: {known}")
    _write_revoked(authority, serials | {entry.serial_number for entry in revoked})
    return revoked


def issued(authority: Authority) -> list[Issued]:
    """Every certificate that the authority has issued, oldest first."""
    path = authority.directory / _ISSUED
    if not path.exists():
        return []
    return [msgspec.json.decode(line, type=Issued) for line in path.read_bytes().splitlines()]


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise AuthenticationError(
            f"{what} {name!r} cannot be in a certificate; use a-z, 0-9 and '-', not at either end, "
            "at most 63 in a row, and up to four such parts with '.' between"
        )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    valid_days: int,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(issuer, subject, public_key, x509.random_serial_number())
    builder = builder.not_valid_before(now - _CLOCK_SKEW).not_valid_after(now + timedelta(days=valid_days))
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    return builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names(federation: str, tier: str, node_id: str) -> x509.SubjectAlternativeName:
    uri = x509.UniformResourceIdentifier(f"ecogen://{federation}/{tier}/{node_id}")
    return x509.SubjectAlternativeName([uri, x509.DNSName(host_name(node_id))])


def _book(authority: Authority, certificate: x509.Certificate, node_id: str, tier: str) -> None:
    entry = Issued(f"{certificate.serial_number:x}", node_id, tier, certificate.not_valid_after_utc)
    with open(authority.directory / _ISSUED, "ab") as file:
        file.write(msgspec.json.encode(entry) + b"\n")
    _write_revoked(authority, _revoked_serials(authority))


def _revoked_serials(authority: Authority) -> set[int]:
    return set(load_revocations(authority.directory / REVOKED, authority.certificate_pem).serials)


def _write_revoked(authority: Authority, serials: set[int]) -> None:
    now = datetime.now(UTC)
    entries = issued(authority)
    current = {entry.node_id for entry in entries if entry.serial_number not in serials and entry.not_after > now}
    builder = x509.CertificateRevocationListBuilder(authority.certificate.subject)
    builder = builder.last_update(now).next_update(authority.certificate.not_valid_after_utc)
    for entry in _revoked_entries(entries, serials, current, now):
        builder = builder.add_revoked_certificate(entry)
    crl = builder.sign(authority.key, hashes.SHA256())
    write_atomically(authority.directory / REVOKED, crl.public_bytes(serialization.Encoding.PEM))


def _revoked_entries(
    entries: Iterable[Issued], serials: set[int], current: set[str], now: datetime
) -> Iterable[x509.RevokedCertificate]:
    for entry in entries:
        if entry.serial_number in serials:
            builder = x509.RevokedCertificateBuilder(entry.serial_number).revocation_date(now)
            if entry.node_id not in current:
                builder = builder.add_extension(_node_id_extension(entry.node_id), critical=False)
            yield builder.build()


def _node_id_extension(node_id: str) -> x509.UnrecognizedExtension:
    name = node_id.encode()
    return x509.UnrecognizedExtension(NODE_ID_OID, bytes([0x0C, len(name)]) + name)  # DER UTF8String
