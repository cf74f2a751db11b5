"""Bringing one mirror to its second server: the token, and the exchange that it opens.

Owns the form of the token, the messages that prove it on both sides, and what they carry:
configuration and key. No sockets: `invitation` has them. Must never: put the secret of a token into
a text, say to the other end why a proof failed, send anything that depends on the mirror to an end
that has not proven the token, or let a length through that was not checked.

    joiner (dials)                        inviter (listens)
      HELLO    nonce                    ->
                                        <-  CHALLENGE  nonce
      PROOF    of the transcript        ->
                                        <-  WELCOME    sealed: proof and name of the mirror
      ACCEPT   sealed: proof, over the name, too  ->
                                        <-  OFFER      sealed: configuration and key
      OUTCOME  sealed: made, or why not ->

Every proof is a keyed hash over all bytes exchanged so far under a label for its sender, so it fits
no other exchange, no other side and no edited message. The joiner proves itself first: whoever
does not have the token gets a random number and nothing else. Sealed is ChaCha20-Poly1305 under a
key for each direction, made from the secret and everything up to PROOF; the transcript is what the
seal vouches for besides. The secret is random and has 128 bits: what a listener overhears is of no
use for guessing it. The keys are as secret as the token: one that leaks later opens a recording.

The two sides are generators: they yield what to send, what to receive and what they found. Whoever
drives them sends the body of each message in, checked with `body_bytes`, and the outcome.
"""

import base64
import binascii
import hmac
import ipaddress
import re
import struct
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, TypeAlias, TypeVar

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nbdmirror.config_fields import NAME, NAME_CHARS_MAX, NODE_NAME, Address
from nbdmirror.errors import AuthenticationError, ConfigError, PeerProtocolError
from nbdmirror.limits import (
    DEVICE_BYTES_MAX,
    DEVICE_BYTES_MIN,
    KEY_BYTES_MAX,
    KEY_BYTES_MIN,
    KIB,
    REASON_BYTES_MAX,
)

TOKEN_VERSION: Final = 1
SECRET_BYTES: Final = 16
CRC_BYTES: Final = 2
CRC_START: Final = 0xFFFF
GROUP_CHARS: Final = 5
TOKEN_CHARS_MAX: Final = 256
ADDRESS_BYTES: Final[Mapping[int, int]] = {4: 4, 6: 16}

MAGIC: Final = b"NBDMINV\x01"
NONCE_BYTES: Final = 32
PROOF_BYTES: Final = 32
TAG_BYTES: Final = 16
CONFIGURATION_CHARS_MAX: Final = 64 * KIB
OFFER_BYTES_MAX: Final = 512 * KIB

_CONTEXT_PROOF: Final = "nbdmirror 2026 invitation v1 proof"
_CONTEXT_KEYS: Final = "nbdmirror 2026 invitation v1 keys"
_JOINER: Final = b"joiner"
_INVITER: Final = b"inviter"
_ACCEPTS: Final = b"joiner accepts"
_HEADER: Final = struct.Struct(">BI")
HEADER_BYTES: Final = _HEADER.size
_T = TypeVar("_T")


# --- the token -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Token:
    """Where the inviter listens, and the secret of this one exchange (16 bytes, never shown)."""

    address: Address
    secret: bytes = field(repr=False)

    def text(self) -> str:
        """The form that `parse_token` takes: groups of five characters."""
        ip = ipaddress.ip_address(self.address.host)
        head = bytes([TOKEN_VERSION << 4 | ip.version])
        body = head + ip.packed + struct.pack(">H", self.address.port) + self.secret
        text = _base32(body + _crc(body))
        return "-".join(text[at : at + GROUP_CHARS] for at in range(0, len(text), GROUP_CHARS))


def _crc(body: bytes) -> bytes:
    # A wrong character is a burst of at most 5 bits, two neighbours exchanged one of at most 10:
    # a CRC of 16 bits finds every burst of up to 16, not only most of them.
    return struct.pack(">H", binascii.crc_hqx(body, CRC_START))


def _base32(body: bytes) -> str:
    return base64.b32encode(body).decode("ascii").rstrip("=")


def parse_token(text: str) -> Token:
    """The token from what was pasted: any case, with or without dashes and spaces.

    Raises:
        ConfigError: it is no token, or has a typing error. The text never holds the token.
    """
    plain = re.sub(r"[-\s]", "", text[: TOKEN_CHARS_MAX + 1]).upper()
    if not plain or len(text) > TOKEN_CHARS_MAX or not re.fullmatch(r"[A-Z2-7]+", plain):
        raise ConfigError(
            "this is no token: expected groups of 5 of A-Z and 2-7 with dashes between them, as "
            "`nbdmirror invite` prints them"
        )
    wrong = ConfigError("the token has a typing error, or a part of it is missing: paste it again")
    try:
        raw = base64.b32decode(plain + "=" * (-len(plain) % 8))
    except binascii.Error as error:
        raise wrong from error
    body, crc = raw[:-CRC_BYTES], raw[-CRC_BYTES:]
    # Padding bits are not in the CRC: only the one right spelling is taken.
    if len(raw) <= CRC_BYTES or crc != _crc(body) or _base32(raw) != plain:
        raise wrong
    version, family = body[0] >> 4, body[0] & 0x0F
    if version != TOKEN_VERSION:
        raise ConfigError(
            f"the token has version {version}, this program knows version {TOKEN_VERSION}: install "
            "the same version on both servers"
        )
    length = ADDRESS_BYTES.get(family, 0)
    if not length or len(body) != 1 + length + 2 + SECRET_BYTES:
        raise wrong
    host = str(ipaddress.ip_address(body[1 : 1 + length]))
    (port,) = struct.unpack_from(">H", body, 1 + length)
    if not port:
        raise wrong
    return Token(Address(host, port), body[-SECRET_BYTES:])


# --- what is handed over -------------------------------------------------------------------------


class _Sealed(BaseModel):
    """What only the two ends see. A strange field or type ends the exchange."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class Offer(_Sealed):
    """The mirror: the text of its configuration, its key in hex, and what the device is.

    `inviter` is the name of the inviting node. `configuration` has no line of the key in it.
    """

    mirror: str = Field(pattern=f"^{NAME.pattern}$", max_length=NAME_CHARS_MAX)
    inviter: str = Field(pattern=f"^{NODE_NAME.pattern}$", max_length=NAME_CHARS_MAX)
    configuration: str = Field(max_length=CONFIGURATION_CHARS_MAX)
    key: str = Field(
        repr=False,
        pattern=r"^([0-9a-f]{2})+$",
        min_length=2 * KEY_BYTES_MIN,
        max_length=2 * KEY_BYTES_MAX,
    )
    size_bytes: int = Field(ge=DEVICE_BYTES_MIN, le=DEVICE_BYTES_MAX)
    sparse: bool


class Outcome(_Sealed):
    """What became of it: the joining node's name, or the reason why nothing was made."""

    node: str = Field(default="", max_length=NAME_CHARS_MAX)
    reason: str = Field(default="", max_length=REASON_BYTES_MAX)


_Model = TypeVar("_Model", Offer, Outcome)


def _read(model: type[_Model], body: bytes) -> _Model:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise PeerProtocolError(
            f"the {model.__name__.lower()} of the other server is malformed: are both of the same "
            "version?"
        ) from error


# --- the exchange, without sockets ---------------------------------------------------------------


class Kind(IntEnum):
    """The type byte of a message. Each is sent by one side only: nothing can be reflected."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    ACCEPT = 5
    OFFER = 6
    OUTCOME = 7


# Body bytes of each message, smallest and largest.
_BODY_BYTES: Final[Mapping[Kind, tuple[int, int]]] = {
    Kind.HELLO: (len(MAGIC) + NONCE_BYTES, len(MAGIC) + NONCE_BYTES),
    Kind.CHALLENGE: (len(MAGIC) + NONCE_BYTES, len(MAGIC) + NONCE_BYTES),
    Kind.PROOF: (PROOF_BYTES, PROOF_BYTES),
    Kind.WELCOME: (PROOF_BYTES + 1 + TAG_BYTES, PROOF_BYTES + NAME_CHARS_MAX + TAG_BYTES),
    Kind.ACCEPT: (PROOF_BYTES + TAG_BYTES, PROOF_BYTES + TAG_BYTES),
    Kind.OFFER: (TAG_BYTES, OFFER_BYTES_MAX),
    Kind.OUTCOME: (TAG_BYTES, 16 * KIB),
}


@dataclass(frozen=True, slots=True)
class Send:
    """Put this on the wire."""

    kind: Kind
    frame: bytes


@dataclass(frozen=True, slots=True)
class Receive:
    """Get the body of a message of this kind."""

    kind: Kind


@dataclass(frozen=True, slots=True)
class Proven:
    """The other end has the token."""


Inviting: TypeAlias = Generator[Send | Receive | Proven | Outcome, bytes | None, None]
Joining: TypeAlias = Generator[Send | Receive | Offer, bytes | Outcome | None, None]


def body_bytes(header: bytes, kind: Kind) -> int:
    """How long the body is that follows these 5 bytes.

    Raises:
        PeerProtocolError: another kind, or a length that this kind does not have.
    """
    got, length = _HEADER.unpack(header)
    low, high = _BODY_BYTES[kind]
    if got != kind or not low <= length <= high:
        raise PeerProtocolError(
            f"no {kind.name} of this exchange: is another program at that address?"
        )
    return int(length)


class _Talk:
    """One side of one exchange: its transcript, proofs and seals."""

    __slots__ = ("_counts", "_keys", "_secret", "_transcript")

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._transcript = blake3()
        self._keys: dict[bytes, ChaCha20Poly1305] = {}
        self._counts: Counter[bytes] = Counter()

    def note(self, kind: Kind, body: bytes) -> bytes:
        """The message as it travels, now part of the transcript."""
        frame = _HEADER.pack(kind, len(body)) + body
        self._transcript.update(frame)
        return frame

    def proof(self, label: bytes, name: bytes = b"") -> bytes:
        """Knowledge of the secret, over everything so far."""
        key = blake3(self._secret, derive_key_context=_CONTEXT_PROOF).digest()
        parts = b"".join(bytes([len(part)]) + part for part in (label, name))
        return blake3(parts + self._transcript.digest(), key=key).digest()

    def require_proof(self, proof: bytes, label: bytes, name: bytes = b"") -> None:
        """Raises AuthenticationError if it is not this one."""
        if not hmac.compare_digest(self.proof(label, name), proof):
            raise AuthenticationError("the other end does not have this token")

    def make_keys(self) -> None:
        """From the secret and both nonces: the transcript has them."""
        material = self._secret + self._transcript.digest()
        keys = blake3(material, derive_key_context=_CONTEXT_KEYS).digest(length=64)
        self._keys = {
            _INVITER: ChaCha20Poly1305(keys[:32]),
            _JOINER: ChaCha20Poly1305(keys[32:]),
        }

    def _nonce(self, sender: bytes) -> bytes:
        # A key is for one direction of one exchange, so a counter never repeats.
        self._counts[sender] += 1
        return self._counts[sender].to_bytes(12, "big")

    def sealed(self, kind: Kind, sender: bytes, plain: bytes) -> Send:
        """A message that only the other end can open."""
        body = self._keys[sender].encrypt(self._nonce(sender), plain, self._transcript.digest())
        if len(body) > _BODY_BYTES[kind][1]:
            raise ConfigError(
                f"{kind.name} has {len(body)} bytes, the bound is {_BODY_BYTES[kind][1]}: copy "
                "configuration and key by hand"
            )
        return Send(kind, self.note(kind, body))

    def opened(self, kind: Kind, sender: bytes, body: bytes) -> bytes:
        """What was sealed. Raises AuthenticationError if anything is not as it was sent."""
        nonce, vouched = self._nonce(sender), self._transcript.digest()
        try:
            return self._keys[sender].decrypt(nonce, body, vouched)
        except InvalidTag as error:
            raise AuthenticationError(f"{kind.name} was not sealed with this token") from error


def _got(value: object, kind: type[_T]) -> _T:
    assert isinstance(value, kind), "the driver answers every step with what it asked for"
    return value


def _greeting(body: bytes) -> bytes:
    """The nonce. Raises PeerProtocolError."""
    if not body.startswith(MAGIC):
        raise PeerProtocolError("another program, or another version of this one")
    return body[len(MAGIC) :]


def inviting(secret: bytes, nonce: bytes, offer: Offer) -> Inviting:
    """The side that has the mirror; ends with what the joining one says became of it.

    Raises:
        AuthenticationError: no proof, or something was changed on the way.
        PeerProtocolError: what no joiner says.
    """
    talk, name = _Talk(secret), offer.mirror.encode("ascii")
    hello = _got((yield Receive(Kind.HELLO)), bytes)
    theirs = _greeting(hello)
    talk.note(Kind.HELLO, hello)
    if hmac.compare_digest(theirs, nonce):
        raise PeerProtocolError("these are our own words")
    yield Send(Kind.CHALLENGE, talk.note(Kind.CHALLENGE, MAGIC + nonce))
    proof = _got((yield Receive(Kind.PROOF)), bytes)
    talk.require_proof(proof, _JOINER)
    talk.note(Kind.PROOF, proof)
    talk.make_keys()
    yield Proven()
    yield talk.sealed(Kind.WELCOME, _INVITER, talk.proof(_INVITER, name) + name)
    accept = _got((yield Receive(Kind.ACCEPT)), bytes)
    talk.require_proof(talk.opened(Kind.ACCEPT, _JOINER, accept), _ACCEPTS, name)
    talk.note(Kind.ACCEPT, accept)
    yield talk.sealed(Kind.OFFER, _INVITER, offer.model_dump_json().encode())
    outcome = _got((yield Receive(Kind.OUTCOME)), bytes)
    yield _read(Outcome, talk.opened(Kind.OUTCOME, _JOINER, outcome))


def joining(secret: bytes, nonce: bytes) -> Joining:
    """The side that gets the mirror: yields the offer, is sent the outcome, and tells it.

    Raises:
        AuthenticationError: no proof, or something was changed on the way.
        PeerProtocolError: what no inviter says.
    """
    talk = _Talk(secret)
    yield Send(Kind.HELLO, talk.note(Kind.HELLO, MAGIC + nonce))
    challenge = _got((yield Receive(Kind.CHALLENGE)), bytes)
    if hmac.compare_digest(_greeting(challenge), nonce):
        raise PeerProtocolError("the other end sends our own words back")
    talk.note(Kind.CHALLENGE, challenge)
    yield Send(Kind.PROOF, talk.note(Kind.PROOF, talk.proof(_JOINER)))
    talk.make_keys()
    body = _got((yield Receive(Kind.WELCOME)), bytes)
    welcome = talk.opened(Kind.WELCOME, _INVITER, body)
    proof, name = welcome[:PROOF_BYTES], welcome[PROOF_BYTES:]
    talk.require_proof(proof, _INVITER, name)
    talk.note(Kind.WELCOME, body)
    yield talk.sealed(Kind.ACCEPT, _JOINER, talk.proof(_ACCEPTS, name))
    body = _got((yield Receive(Kind.OFFER)), bytes)
    offer = _read(Offer, talk.opened(Kind.OFFER, _INVITER, body))
    talk.note(Kind.OFFER, body)
    if offer.mirror.encode("ascii") != name:
        raise AuthenticationError("the other end offers another mirror than the one it proved")
    outcome = _got((yield offer), Outcome)
    yield talk.sealed(Kind.OUTCOME, _JOINER, outcome.model_dump_json().encode())
