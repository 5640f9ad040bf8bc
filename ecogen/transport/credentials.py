"""What a node shows to others, and what it holds theirs to: certificates that name a node and its tier, not its host.

A certificate carries `ecogen://<federation>/<tier>/<node-id>` as its URI, and `<node-id>.ecogen` as the host name by
which TLS checks that a caller reached that very node. Revocation is a standard CRL, signed by the authority; an entry
also names the node, as long as the node has no newer certificate, so that others stop calling it.

    <node>/   node.pem  node.key  authority.pem        and revoked.pem, wherever the operator puts it

Keys are EC P-256, unencrypted, readable by their owner only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ecogen.errors import AuthenticationError

TIERS = ("cloud", "edge", "end", "operator")

AUTHORITY_CERTIFICATE = "authority.pem"
REVOKED = "revoked.pem"
NODE_CERTIFICATE = "node.pem"
NODE_KEY = "node.key"

NODE_ID_OID = x509.ObjectIdentifier("2.25.139265122419705339399712542181265488282")
"""CRL entry extension with the node id; an OID of our own, from a UUID (ITU-T X.667)."""


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


def load_credentials(directory: Path, *, node_id: str | None = None, tier: str | None = None) -> Credentials:
    """A node's key and certificates from its directory, checked against each other and the clock.

    Args:
        node_id, tier: what the certificate must say, where given.

    Raises:
        AuthenticationError: naming the file and the next step.
    """
    path = directory / NODE_CERTIFICATE
    again = f"issue it again with `ecogen certs issue` and copy it to {directory}"
    certificate = load_certificate(path, again)
    authority = load_certificate(directory / AUTHORITY_CERTIFICATE, again)
    key = load_key(directory / NODE_KEY, again)
    check_key(certificate, key, directory / NODE_KEY, again)
    _check_issuer(certificate, authority, path, again)
    _check_validity(certificate, path, again)
    identity = identity_of(certificate)
    for what, wanted, found in (("node", node_id, identity.node_id), ("tier", tier, identity.tier)):
        if wanted is not None and wanted != found:
            raise AuthenticationError(f"{path} is of {what} {found!r}, not {wanted!r}; use that one's or {again}")
    return Credentials(identity, certificate.not_valid_after_utc, _pem(certificate), _pem(authority), key_pem(key))


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


def load_certificate(path: Path, next_step: str) -> x509.Certificate:
    """The certificate in a file.

    Raises:
        AuthenticationError: naming the file and the next step, if it is missing or damaged.
    """
    try:
        return x509.load_pem_x509_certificate(_read(path, next_step))
    except ValueError as problem:
        raise AuthenticationError(f"{path} is not a certificate; {next_step}") from problem


def load_key(path: Path, next_step: str) -> ec.EllipticCurvePrivateKey:
    """The EC key in a file.

    Raises:
        AuthenticationError: naming the file and the next step, if it is missing, damaged or of another kind.
    """
    try:
        key = serialization.load_pem_private_key(_read(path, next_step), password=None)
    except (ValueError, TypeError) as problem:
        raise AuthenticationError(f"{path} is not a private key; {next_step}") from problem
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise AuthenticationError(f"{path} is not an EC key; {next_step}")
    return key


def check_key(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, path: Path, next_step: str) -> None:
    """Make sure that a key is the certificate's own.

    Raises:
        AuthenticationError: naming the key's file and the next step, if it is not.
    """
    if certificate.public_key() != key.public_key():
        raise AuthenticationError(f"{path} does not match the certificate beside it; {next_step}")


def common_name(certificate: x509.Certificate) -> str:
    """Whose certificate it is: of the authority's own, the federation's name."""
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A key as PEM, unencrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _revoked_node_id(entry: x509.RevokedCertificate) -> str | None:
    for extension in entry.extensions:
        if extension.oid == NODE_ID_OID and isinstance(extension.value, x509.UnrecognizedExtension):
            return extension.value.value[2:].decode()
    return None


def _check_issuer(certificate: x509.Certificate, authority: x509.Certificate, path: Path, next_step: str) -> None:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as problem:
        raise AuthenticationError(
            f"{path} was not issued by the authority {common_name(authority)!r} beside it; {next_step}"
        ) from problem


def _check_validity(certificate: x509.Certificate, path: Path, next_step: str) -> None:
    now = datetime.now(UTC)
    start, stop = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > stop:
        raise AuthenticationError(f"{path} expired on {stop:%Y-%m-%d %H:%M} UTC; {next_step}")
    if now < start:
        raise AuthenticationError(f"{path} is valid only from {start:%Y-%m-%d %H:%M} UTC; check this node's clock")


def _read(path: Path, next_step: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        reason = "is missing" if isinstance(problem, FileNotFoundError) else f"cannot be read ({problem.strerror})"
        raise AuthenticationError(f"{path} {reason}; {next_step}") from problem


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
