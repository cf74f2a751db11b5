"""TLS 1.3 around the peer channel, as bytes: contexts, and one connection without its socket.

TLS hides what the nodes send and shows every change of it. It does not say who the other end is,
unless `engine.tls_ca` is set: that is proven by the mirror's key, in the handshake inside, which is
bound to this very channel (`binding`). So certificates need no authority, and their dates decide
nothing.

Owns the settings of TLS, the words for its failures, and what is kept of a connection: two buffers
and OpenSSL's state. Must never: touch a socket, let a failure of OpenSSL out as an OSError (its
numbers are not the system's), or be used by two threads at once.
"""

import contextlib
import hashlib
import os
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding

from nbdmirror import certificate
from nbdmirror.config import Config
from nbdmirror.config_files import TlsFiles, read_tls_files
from nbdmirror.core.handshake import TLS_DIFFERS, RefusalCode, encode_refusal
from nbdmirror.core.ports import ReadBuffer
from nbdmirror.errors import ConfigError, PeerProtocolError, PeerRefusedError
from nbdmirror.limits import HANDSHAKE_BYTES_MAX, TLS_HANDSHAKE_BYTES_MAX

# The first byte of a record that opens or refuses a connection (RFC 8446, 5.1).
RECORDS: Final = (0x15, 0x16)
ALERT: Final = "ALERT_"
# Alerts by which one end says what it thinks of the other's certificate (RFC 8446, 6.2).
ABOUT_CERTIFICATES: Final = frozenset(
    {
        "bad certificate", "unsupported certificate", "certificate revoked", "certificate expired",
        "certificate unknown", "unknown ca", "access denied", "certificate required",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TlsSetup:
    """What this node needs for its connections. `binding`: what names its own certificate."""

    dialing: ssl.SSLContext
    listening: ssl.SSLContext
    binding: bytes


@dataclass(frozen=True, slots=True)
class Prepared:
    """The setup of a node's TLS, and what its operator has to know."""

    setup: TlsSetup
    notes: tuple[str, ...]


def prepare(config: Config) -> Prepared | None:
    """Everything for `engine.tls = "on"`, None for "off"; an own certificate is made if missing.

    Raises:
        ConfigError: a file is missing, is none, or does not belong to the others.
        OutOfSpaceError: there is no room for the certificate.
    """
    if config.engine.tls == "off":
        return None
    path, own = config.tls_certificate, config.engine.tls_certificate is None
    made = own and certificate.make_if_missing(path, config.mirror, config.me.name)
    paths = (path, config.tls_key, config.engine.tls_ca)
    files = config.tls_files or read_tls_files(*paths)
    found = certificate.described(files.certificate, path)
    by_ca = config.engine.tls_ca is not None
    news = f"made {path}, fingerprint {found.fingerprint}" if made else ""
    notes = (news, certificate.remark(found, own=own, believed_by_ca=by_ca))
    return Prepared(_setup(files, paths), tuple(filter(None, notes)))


def load(certificate_file: Path, key_file: Path, ca_file: Path | None) -> TlsSetup:
    """Read the files, as a node has them. Raises ConfigError."""
    paths = (certificate_file, key_file, ca_file)
    return _setup(read_tls_files(*paths), paths)


def _setup(files: TlsFiles, paths: tuple[Path, Path, Path | None]) -> TlsSetup:
    contexts = []
    for protocol in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER):
        context = ssl.SSLContext(protocol)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE if files.ca is None else ssl.CERT_REQUIRED
        try:
            # A password is not asked for: at a terminal it would stop the start.
            with _in_memory(files.certificate) as mine, _in_memory(files.key) as key:
                context.load_cert_chain(mine, key, password="")
            if files.ca is not None:
                with _in_memory(files.ca) as authority:
                    context.load_verify_locations(authority)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ConfigError(_why_not_loaded(error, *paths)) from error
        contexts.append(context)
    dialing, listening = contexts
    # A session that is taken up again would carry no certificate, and the binding is made of it.
    listening.num_tickets = 0
    der = certificate.first(files.certificate, paths[0]).public_bytes(Encoding.DER)
    return TlsSetup(dialing, listening, binding(der))


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """A name for it, because OpenSSL takes only such: that of a nameless file in memory."""
    with os.fdopen(os.memfd_create("nbdmirror", os.MFD_CLOEXEC), "wb", buffering=0) as file:
        file.write(content)
        yield f"/proc/self/fd/{file.fileno()}"


def _why_not_loaded(error: Exception, mine: Path, key: Path, ca: Path | None) -> str:
    reason = in_words(error) if isinstance(error, ssl.SSLError) else str(error)
    authority = f", engine.tls_ca = {ca}" if ca is not None else ""
    return (
        f"TLS: {reason.removeprefix('TLS: ')}; look at engine.tls_certificate = {mine}, "
        f"engine.tls_key = {key}{authority} (PEM, the key without a password and that of the "
        "certificate)"
    )


def binding(der: bytes) -> bytes:
    """tls-server-end-point (RFC 5929), always with SHA-256: what names a listener's certificate."""
    return hashlib.sha256(der).digest()


class TlsStream:
    """One connection: what the socket brings goes into `incoming`, what it has to take comes from
    `outgoing`.
    """

    def __init__(self, setup: TlsSetup, *, dialer: bool) -> None:
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        context = setup.dialing if dialer else setup.listening
        self.object = context.wrap_bio(self.incoming, self.outgoing, server_side=not dialer)
        self._binding = b"" if dialer else setup.binding
        self._fed_bytes = 0
        self._farewell = b""

    # --- before the proof -----------------------------------------------------------------------

    def shake(self) -> bool:
        """Go on with TLS's own handshake as far as it goes; True when it is done.

        Raises:
            PeerProtocolError: it failed; send `farewell()` and close.
        """
        try:
            self.object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise PeerProtocolError(in_words(error)) from error
        return True

    def feed(self, piece: bytes) -> None:
        """What the socket brought, until the other end has proven itself.

        Raises:
            PeerProtocolError: it is no TLS, or more than somebody unproven may send.
        """
        if not self._fed_bytes and piece[0] not in RECORDS:
            self._farewell = encode_refusal(RefusalCode.TLS, TLS_DIFFERS)
            if piece[0] <= HANDSHAKE_BYTES_MAX >> 8:  # the length of a message of ours
                raise PeerRefusedError(TLS_DIFFERS)
            raise PeerProtocolError("what came to the port is no TLS, as engine.tls asks for")
        self._fed_bytes += len(piece)
        if self._fed_bytes > TLS_HANDSHAKE_BYTES_MAX:
            raise PeerProtocolError(
                f"TLS: more than {TLS_HANDSHAKE_BYTES_MAX} bytes without a proof of the key"
            )
        self.incoming.write(piece)

    def farewell(self) -> bytes:
        """The last bytes after a failure: in words for who speaks without TLS, else an alert."""
        return self._farewell or self.outgoing.read()

    @property
    def binding(self) -> bytes:
        """What names this channel, when its handshake is done: the listener's certificate."""
        if self._binding:
            return self._binding
        der = self.object.getpeercert(binary_form=True)
        assert der is not None, "a listener of TLS 1.3 shows its certificate"
        return binding(der)

    def describe(self) -> str:
        """Version and cipher."""
        cipher = self.object.cipher()
        return f"{self.object.version()} {cipher[0] if cipher else ''}"

    def write(self, data: ReadBuffer) -> int:
        """Encrypt all of it into `outgoing`; returns in how many steps.

        Raises:
            PeerProtocolError: TLS has failed before, in what came.
        """
        view = memoryview(data)
        steps = 0
        try:
            while view:
                view = view[self.object.write(view) :]
                steps += 1
        except ssl.SSLError as error:
            raise PeerProtocolError(in_words(error)) from error
        return steps

    def read(self, buffer: memoryview) -> int | None:
        """Decrypt into the buffer; None: more is needed first. 0: the other end has ended it.

        Raises:
            PeerProtocolError: what came is not what the other end sent, or it refuses.
        """
        try:
            # With a buffer it says how much (the types of the library know the other form only).
            return int(self.object.read(len(buffer), buffer))
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLError as error:
            raise PeerProtocolError(in_words(error)) from error


def in_words(error: ssl.SSLError) -> str:
    """A failure of OpenSSL as a sentence. All its words are OpenSSL's own, none is the peer's."""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = error.verify_message.rstrip(".")
        return f"TLS: the peer's certificate is refused by engine.tls_ca: {why}"
    reason = error.reason or "unknown"
    head, is_alert, alert = reason.partition(ALERT)
    told = (alert if is_alert else head).lower().replace("_", " ")
    if not is_alert:
        return f"TLS: {told}"
    if told in ABOUT_CERTIFICATES:
        return f"TLS: the peer refuses this node's certificate, by its engine.tls_ca: {told}"
    return f"TLS: the other end refused: {told}"
