"""Certificates of the peer channel: the one that a node makes for itself, and what any one says.

Owns the file `tls.pem` (certificate and key together, so that no crash leaves two that do not fit)
and the reading of certificates for human eyes. Must never: put a byte of a key into a message, or
decide who is the peer; that is proven by the mirror's key (core/handshake.py).
"""

import contextlib
import os
import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from nbdmirror.config_files import read_certificate
from nbdmirror.core.messages import printable
from nbdmirror.errors import ConfigError, RefusedError
from nbdmirror.files import FILE_MODE, path_error, sync_directory
from nbdmirror.limits import TLS_CERTIFICATE_DAYS, TLS_CERTIFICATE_WARN_DAYS

NAME_CHARS_MAX: Final = 64  # of an attribute (RFC 5280, appendix A.1)
CLOCK_DIFFERENCE: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a certificate says. `fingerprint`: SHA-256 over its DER. Dates: UTC, ISO 8601."""

    path: str
    fingerprint: str
    subject: str
    issuer: str
    not_before: str
    not_after: str
    days_left: int

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return self.days_left < 0

    @property
    def expires_soon(self) -> bool:
        """Whether it has to be renewed."""
        return self.days_left < TLS_CERTIFICATE_WARN_DAYS

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def make(path: Path, mirror: str, node: str, *, replace: bool) -> Certificate:
    """A new key (ECDSA P-256) and a certificate for it, durably under `path`, or nothing.

    Raises:
        RefusedError: the file is there, and `replace` is false.
        ConfigError: it cannot be written there; OutOfSpaceError: no room.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        # Made with the mode: nobody else can open it in between.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(draft, flags, FILE_MODE)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_signed_by_itself(mirror, node))
                file.flush()
                os.fchmod(file.fileno(), FILE_MODE)  # whatever the umask is
                os.fsync(file.fileno())
            if replace:
                draft.replace(path)
            else:
                os.link(draft, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                draft.unlink()
        sync_directory(path.parent)
    except FileExistsError as error:
        raise RefusedError(
            f"{path} exists and is not overwritten; `nbdmirror tls create --force` replaces it"
        ) from error
    except OSError as error:
        remedy = (
            "this node's files come first (`nbdmirror metadata create`); run this as their user"
        )
        raise path_error(error, f"write {path}", remedy) from error
    return read(path)


def make_if_missing(path: Path, mirror: str, node: str) -> bool:
    """Make this node's own certificate unless it is there; True when it was made.

    Raises:
        ConfigError, OutOfSpaceError: as make().
    """
    if os.path.lexists(path):
        return False
    try:
        make(path, mirror, node, replace=False)
    except RefusedError:
        return False  # somebody was quicker
    return True


def _signed_by_itself(mirror: str, node: str) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, mirror[:NAME_CHARS_MAX]),
            x509.NameAttribute(NameOID.COMMON_NAME, node[:NAME_CHARS_MAX]),
        ]
    )
    begins = _now() - CLOCK_DIFFERENCE
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(begins + timedelta(days=TLS_CERTIFICATE_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return secret + certificate.public_bytes(Encoding.PEM)


def _now() -> datetime:
    # Dates of certificates are of the wall clock; nothing of the mirror hangs on this one.
    return datetime.now(UTC)  # noqa: TID251 - as above


def first(text: bytes, path: Path) -> x509.Certificate:
    """The first certificate of a file, which is the node's own.

    Raises:
        ConfigError: there is none.
    """
    try:
        return x509.load_pem_x509_certificates(text)[0]
    except ValueError as error:
        raise ConfigError(f"{path}: holds no certificate; expected one in PEM") from error


def described(text: bytes, path: Path) -> Certificate:
    """What the first certificate of a file says. Raises ConfigError."""
    found = first(text, path)
    left = found.not_valid_after_utc - _now()
    return Certificate(
        path=str(path),
        fingerprint=found.fingerprint(hashes.SHA256()).hex(),
        subject=printable(found.subject.rfc4514_string()),
        issuer=printable(found.issuer.rfc4514_string()),
        not_before=found.not_valid_before_utc.isoformat(),
        not_after=found.not_valid_after_utc.isoformat(),
        days_left=left.days,
    )


def read(path: Path) -> Certificate:
    """What the certificate in a file says. Raises ConfigError."""
    return described(read_certificate(path), path)


def remark(found: Certificate, *, own: bool, believed_by_ca: bool) -> str:
    """What an operator has to know of its dates, "" for nothing. See docs/user-guide.md."""
    if not found.expires_soon:
        return ""
    ends = "expired" if found.expired else f"expires in {found.days_left} days,"
    if believed_by_ca:
        meaning = (
            "the peer refuses it, and no session begins"
            if found.expired
            else "then the peer refuses it, and no session begins"
        )
    else:
        meaning = "the mirror goes on: the key of the mirror is what the nodes prove themselves by"
    remedy = (
        "renew it with `nbdmirror tls create --force`, then restart the node"
        if own
        else "put another one there, then restart the node"
    )
    return f"the certificate {found.path} {ends} on {found.not_after}: {meaning}; {remedy}"
