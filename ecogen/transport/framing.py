"""How many bytes gRPC, HTTP/2 and TLS add to ours: a model, so that the books say what a network carries.

Sizes of frames: HTTP/2, RFC 9113, section 4.1 and 6; of a header field in its table: HPACK, RFC 7541, section 6; of a
message's prefix: gRPC over HTTP/2, https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md; of a TLS record: TLS
1.3, RFC 8446, section 5.2. What follows from gRPC's code rather than from a standard (when it opens a window, how
long a record it writes, its handshake) was measured with a byte-counting proxy: grpcio 1.85, 2026-11-21; a test repeats
it and allows 1 %. The bytes that a message makes its receiver send (WINDOW_UPDATE) count with the message.

Not in the model: keepalive (78 bytes per ping and answer, on idle connections), connections that gRPC makes again by
itself, what a cancelled call leaves unsent, and TCP's and IP's own headers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MAX_FRAME_BYTES = 2**20
"""The largest HTTP/2 DATA frame, as `wire` sets it."""

_FRAME = 9
_PREFIX = 5
_WINDOW_UPDATES = 2 * (_FRAME + 4)  # of the stream and of the connection
_REQUEST_FIELDS = 8  # one byte each: method, scheme, path, authority, te, content-type, user-agent, accept-encoding
_REPLY_FIELDS = 3 + 3  # status, content-type, accept-encoding; then the trailers

_RECORD = 22  # header 5, content type 1, authentication tag 16
_RECORD_TEXT = 16_384 - 100  # gRPC's largest record less its TSI_SSL_MAX_PROTECTION_OVERHEAD

# Both ways together: preface, SETTINGS and the first, not yet indexed header fields; hellos, certificates and tickets.
_PREFACE = 292 + 144
_HANDSHAKE = 2126 + 3282
# Open and close of a stream, both ways together, and in how many records.
_STREAM = (43 + 38 + 6) + (49 + 39)
_STREAM_RECORDS = 2 + 4


@dataclass(frozen=True, slots=True)
class Framing:
    """What the protocols below add to messages of `num_bytes`.

    Attributes:
        tls: whether there is TLS.
        claims_bytes: of the metadata sent with each call and stream, as `metadata_bytes` says.
    """

    tls: bool
    claims_bytes: int = 0

    @property
    def connection_bytes(self) -> int:
        """Of a new connection, both ways."""
        return _PREFACE + (_HANDSHAKE if self.tls else 0)

    @property
    def stream_bytes(self) -> int:
        """Of opening and closing a stream, both ways."""
        return _STREAM + self.claims_bytes + (_STREAM_RECORDS * _RECORD if self.tls else 0)

    def request(self, num_bytes: int) -> int:
        """Of a call's message."""
        return self._framed(num_bytes, _FRAME + _REQUEST_FIELDS + self.claims_bytes)

    def reply(self, num_bytes: int) -> int:
        """Of the answer to a call."""
        return self._framed(num_bytes, 2 * _FRAME + _REPLY_FIELDS)

    def streamed(self, num_bytes: int) -> int:
        """Of a message on an open stream."""
        return self._framed(num_bytes, 0)

    def _framed(self, num_bytes: int, headers: int) -> int:
        frames = _parts(num_bytes + _PREFIX, MAX_FRAME_BYTES)
        plain = headers + _PREFIX + frames * _FRAME + _WINDOW_UPDATES
        return plain + (_parts(num_bytes + plain, _RECORD_TEXT) * _RECORD if self.tls else 0)


def metadata_bytes(metadata: Iterable[tuple[str, str]]) -> int:
    """Of header fields that are not in HPACK's table: a byte, and name and value with their lengths."""
    return sum(3 + len(name) + len(value) for name, value in metadata)


def _parts(num_bytes: int, part_bytes: int) -> int:
    return -(-num_bytes // part_bytes)
