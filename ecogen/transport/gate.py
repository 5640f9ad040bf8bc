"""Who may come in: the certificate at the other end of a call names this federation, a tier and a node, not revoked."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from cryptography import x509

from ecogen.errors import AuthenticationError
from ecogen.transport.base import Peer
from ecogen.transport.credentials import TIERS, Credentials, Identity, Revocations, identity_of, load_revocations

logger = logging.getLogger(__name__)

# Only where there are no certificates: who the caller says it is.
CLAIMED_NODE = "ecogen-node"
CLAIMED_TIER = "ecogen-tier"

_MAX_KNOWN = 1024


class Context(Protocol):
    """What is used here of `grpc.aio.ServicerContext`, which has no types."""

    def auth_context(self) -> Mapping[str, Sequence[bytes]]: ...
    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...
    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None: ...
    async def abort(self, code: object, details: str) -> None: ...


class Gate:
    """Admits callers by certificate, and forgets none of the revocations it has read.

    Args:
        credentials: this node's own; None admits everybody as who they claim to be.
        revoked: the revocation list, read again whenever the file changes; None for none.

    Raises:
        AuthenticationError: if the revocation list cannot be read or is not the authority's.
    """

    def __init__(self, credentials: Credentials | None, revoked: Path | None) -> None:
        self._credentials = credentials
        self._path = revoked if credentials is not None else None
        self._known: dict[bytes, Identity] = {}
        self._stamp: tuple[int, int, int] | None = None
        self.revocations = Revocations()
        if self._path is not None and credentials is not None:
            self._stamp = _stamp(self._path)
            self.revocations = load_revocations(self._path, credentials.authority_pem)

    def admit(self, context: Context) -> tuple[Peer, int | None]:
        """Who is calling, and the serial of its certificate.

        Raises:
            AuthenticationError: if it may not come in.
        """
        if self._credentials is None:
            return _claimed(context), None
        identity = self._identify(context, self._credentials.identity.federation)
        self.refresh()
        if identity.serial in self.revocations.serials:
            raise AuthenticationError(
                f"the certificate {identity.serial:x} of node {identity.node_id!r} is revoked; issue a new one"
            )
        return Peer(identity.node_id, identity.tier), identity.serial

    def check_callee(self, node_id: str) -> None:
        """Nothing, unless all certificates of the node to be called are revoked.

        gRPC for Python does not show a caller the certificate it accepted, so here the name decides, not the serial.

        Raises:
            AuthenticationError: if they are.
        """
        self.refresh()
        if node_id in self.revocations.node_ids:
            raise AuthenticationError(f"node {node_id!r} is revoked; issue a new certificate for it or leave it out")

    @property
    def watches(self) -> bool:
        """Whether there is a revocation list that can change."""
        return self._path is not None

    def refresh(self) -> bool:
        """Read the revocation list again if its file has changed; whether it did.

        A list that cannot be read leaves the last one in force.
        """
        if self._path is None or self._credentials is None:
            return False
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            self.revocations = load_revocations(self._path, self._credentials.authority_pem)
        except AuthenticationError as error:
            logger.error("the last revocation list stays in force: %s", error)
            return False
        return True

    def _identify(self, context: Context, federation: str) -> Identity:
        pem = context.auth_context().get("x509_pem_cert", [b""])[0]
        if pem not in self._known:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[pem] = _checked(pem, federation)
        return self._known[pem]


def _checked(pem: bytes, federation: str) -> Identity:
    try:
        identity = identity_of(x509.load_pem_x509_certificate(pem))
    except ValueError as problem:
        raise AuthenticationError("the caller shows no certificate; issue one with `ecogen certs issue`") from problem
    if identity.federation != federation:
        raise AuthenticationError(
            f"node {identity.node_id!r} is of federation {identity.federation!r}, not {federation!r}"
        )
    if identity.tier not in TIERS:
        raise AuthenticationError(f"node {identity.node_id!r} is of an unknown tier, {identity.tier!r}")
    return identity


def _claimed(context: Context) -> Peer:
    claims = {str(key): str(value) for key, value in context.invocation_metadata() or ()}
    if CLAIMED_NODE not in claims or CLAIMED_TIER not in claims:
        raise AuthenticationError("the caller does not say who it is; is it an EcoGen node?")
    return Peer(claims[CLAIMED_NODE], claims[CLAIMED_TIER])


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
