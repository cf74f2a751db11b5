"""Certificates for one test: an authority, and what it signs.

Must never: be taken for a way to make certificates that somebody relies on.
"""

import ipaddress
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

BEGIN, PAST = datetime(2000, 1, 1, tzinfo=UTC), datetime(2001, 1, 1, tzinfo=UTC)
END = datetime(2100, 1, 1, tzinfo=UTC)
_USES = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, as files."""

    cert_file: str
    key_file: str

    def replace(self, other: "Issued") -> None:
        """Take the place of these files."""
        Path(self.key_file).replace(other.key_file)
        Path(self.cert_file).replace(other.cert_file)


class Authority:
    """Signs certificates for 127.0.0.1."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(f"authority {directory.name}")
        whole = x509.BasicConstraints(ca=True, path_length=None)
        made = self._builder(self._name, self._key, END).add_extension(whole, critical=True)
        self.ca_file = str(directory / "ca.pem")
        Path(self.ca_file).write_bytes(self._signed(made))

    def issue(self, name: str, *, expired: bool = False) -> Issued:
        """A certificate that can be used by both ends."""
        key = ec.generate_private_key(ec.SECP256R1())
        here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        made = (
            self._builder(_name(name), key, PAST if expired else END)
            .add_extension(here, critical=False)
            .add_extension(x509.ExtendedKeyUsage(_USES), critical=False)
        )
        base = self._directory / f"{name}-{secrets.token_hex(4)}"
        cert_file, key_file = base.with_suffix(".pem"), base.with_suffix(".key")
        cert_file.write_bytes(self._signed(made))
        key_file.touch(0o600)
        key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return Issued(str(cert_file), str(key_file))

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, end: datetime
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(BEGIN)
            .not_valid_after(end)
        )

    def _signed(self, builder: x509.CertificateBuilder) -> bytes:
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
