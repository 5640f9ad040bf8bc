"""Who is who: a federation's authority, and certificates that name a node and its tier, not its host.

A certificate carries `ecogen://<federation>/<tier>/<node-id>` as its URI, and `<node-id>.ecogen` as the host name by
which TLS checks that a caller reached that very node. Revocation is a standard CRL, signed by the authority; an entry
also names the node, as long as the node has no newer certificate, so that others stop calling it.

    authority/   authority.pem  authority.key  revoked.pem  issued.jsonl       stays with the operator
    <node>/      node.pem  node.key  authority.pem                             goes to the node, with revoked.pem

Keys are EC P-256, unencrypted, readable by their owner only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ecogen.errors import AuthenticationError
from ecogen.storage import write_atomically

TIERS = ("cloud", "edge", "end", "operator")

AUTHORITY_CERTIFICATE = "authority.pem"
AUTHORITY_KEY = "authority.key"
REVOKED = "revoked.pem"
NODE_CERTIFICATE = "node.pem"
NODE_KEY = "node.key"
_ISSUED = "issued.jsonl"

# Both become parts of a URI, and a node id labels of a host name: RFC 1123, at most 63 characters each.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?){0,3}")
# Nodes' clocks may differ by this much.
_CLOCK_SKEW = timedelta(minutes=5)
# CRL entry extension with the node id; an OID of our own, from a UUID (ITU-T X.667).
_NODE_ID_OID = x509.ObjectIdentifier("2.25.139265122419705339399712542181265488282")


@dataclass(frozen=True, slots=True)
class Identity:
    """What a certificate says about its owner."""

    federation: str
    tier: str
    node_id: str
    serial: int

    @property
    def uri(self) -> str:
        return f"ecogen://{self.federation}/{self.tier}/{self.node_id}"


@dataclass(frozen=True, slots=True)
class Authority:
    """The one who may issue and revoke certificates, loaded from its directory."""

    directory: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def federation(self) -> str:
        return _common_name(self.certificate)

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a node shows to others, checked when loaded."""

    identity: Identity
    not_after: datetime
    certificate_pem: bytes
    authority_pem: bytes
    key_pem: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Revocations:
    """Serials that are no longer accepted, and the nodes that have no other certificate."""

    serials: frozenset[int] = frozenset()
    node_ids: frozenset[str] = frozenset()


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
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / AUTHORITY_KEY, _key_pem(key), mode=0o600)
    write_atomically(directory / AUTHORITY_CERTIFICATE, authority.certificate_pem)
    _write_revoked(authority, set())
    return authority


def load_authority(directory: Path) -> Authority:
    """The authority that `create_authority` made.

    Raises:
        AuthenticationError: if a file is missing or damaged, or key and certificate do not match.
    """
    certificate = _load_certificate(directory / AUTHORITY_CERTIFICATE, "run `ecogen certs init` there")
    key = _load_key(directory / AUTHORITY_KEY, "run `ecogen certs init` there or restore the key from its backup")
    _check_key(certificate, key, directory / AUTHORITY_KEY, "restore both files from the same backup")
    return Authority(directory, certificate, key)


def issue(authority: Authority, node_id: str, tier: str, directory: Path, *, valid_days: int = 365) -> Identity:
    """Write a new key and certificate for a node, and the authority's certificate, into `directory`.

    Raises:
        AuthenticationError: as `sign`.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    certificate_pem = sign(authority, key.public_key(), node_id, tier, valid_days=valid_days)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / NODE_KEY, _key_pem(key), mode=0o600)
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


def load_credentials(directory: Path, *, node_id: str | None = None, tier: str | None = None) -> Credentials:
    """A node's key and certificates from its directory, checked against each other and the clock.

    Args:
        node_id, tier: what the certificate must say, where given.

    Raises:
        AuthenticationError: naming the file and the next step.
    """
    path = directory / NODE_CERTIFICATE
    again = f"issue it again with `ecogen certs issue` and copy it to {directory}"
    certificate = _load_certificate(path, again)
    authority = _load_certificate(directory / AUTHORITY_CERTIFICATE, again)
    key = _load_key(directory / NODE_KEY, again)
    _check_key(certificate, key, directory / NODE_KEY, again)
    _check_issuer(certificate, authority, path, again)
    _check_validity(certificate, path, again)
    identity = identity_of(certificate)
    for what, wanted, found in (("node", node_id, identity.node_id), ("tier", tier, identity.tier)):
        if wanted is not None and wanted != found:
            raise AuthenticationError(f"{path} is of {what} {found!r}, not {wanted!r}; use that one's or {again}")
    return Credentials(identity, certificate.not_valid_after_utc, _pem(certificate), _pem(authority), _key_pem(key))


def load_revocations(path: Path, authority_pem: bytes) -> Revocations:
    """The revocation list, if the authority signed it.

    Raises:
        AuthenticationError: if it is missing, damaged or of another authority.
    """
    again = f"copy {REVOKED} from the authority's directory again"
    try:
        crl = x509.load_pem_x509_crl(_read(path, again))
    except ValueError as problem:
        raise AuthenticationError(f"{path} is not a revocation list; {again}") from problem
    key = x509.load_pem_x509_certificate(authority_pem).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not crl.is_signature_valid(key):
        raise AuthenticationError(f"{path} is not signed by this federation's authority; {again}")
    named = (_revoked_node_id(entry) for entry in crl)
    return Revocations(
        frozenset(entry.serial_number for entry in crl), frozenset(name for name in named if name is not None)
    )


def identity_of(certificate: x509.Certificate) -> Identity:
    """What the certificate's URI says.

    Raises:
        AuthenticationError: if it has no such URI.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    for uri in uris:
        parts = uri.removeprefix("ecogen://").split("/")
        if uri.startswith("ecogen://") and len(parts) == 3:
            return Identity(parts[0], parts[1], parts[2], certificate.serial_number)
    raise AuthenticationError(f"a certificate names no EcoGen node (its URIs: {uris}); issue one with `ecogen certs`")


def host_name(node_id: str) -> str:
    """The name under which TLS checks a node, wherever it runs."""
    return f"{node_id}.ecogen"


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise AuthenticationError(
            f"{what} {name!r} cannot be in a certificate; use a-z, 0-9 and '-', not at either end, "
            "at most 63 in a row, and up to four such parts with '.' between"
        )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _common_name(certificate: x509.Certificate) -> str:
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


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
    return x509.UnrecognizedExtension(_NODE_ID_OID, bytes([0x0C, len(name)]) + name)  # DER UTF8String


def _revoked_node_id(entry: x509.RevokedCertificate) -> str | None:
    for extension in entry.extensions:
        if extension.oid == _NODE_ID_OID and isinstance(extension.value, x509.UnrecognizedExtension):
            return extension.value.value[2:].decode()
    return None


def _check_key(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, path: Path, next_step: str) -> None:
    if certificate.public_key() != key.public_key():
        raise AuthenticationError(f"{path} does not match the certificate beside it; {next_step}")


def _check_issuer(certificate: x509.Certificate, authority: x509.Certificate, path: Path, next_step: str) -> None:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as problem:
        raise AuthenticationError(
            f"{path} was not issued by the authority {_common_name(authority)!r} beside it; {next_step}"
        ) from problem


def _check_validity(certificate: x509.Certificate, path: Path, next_step: str) -> None:
    now = datetime.now(UTC)
    start, stop = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > stop:
        raise AuthenticationError(f"{path} expired on {stop:%Y-%m-%d %H:%M} UTC; {next_step}")
    if now < start:
        raise AuthenticationError(f"{path} is valid only from {start:%Y-%m-%d %H:%M} UTC; check this node's clock")


def _load_certificate(path: Path, next_step: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path, next_step))
    except ValueError as problem:
        raise AuthenticationError(f"{path} is not a certificate; {next_step}") from problem


def _load_key(path: Path, next_step: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(_read(path, next_step), password=None)
    except (ValueError, TypeError) as problem:
        raise AuthenticationError(f"{path} is not a private key; {next_step}") from problem
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise AuthenticationError(f"{path} is not an EC key; {next_step}")
    return key


def _read(path: Path, next_step: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        reason = "is missing" if isinstance(problem, FileNotFoundError) else f"cannot be read ({problem.strerror})"
        raise AuthenticationError(f"{path} {reason}; {next_step}") from problem


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
