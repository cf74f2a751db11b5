"""Mutual authentication of two nodes by the mirror's key, before any frame is read.

Owns the four handshake messages, the proofs and the keys of a session. Sans I/O: bytes in, bytes
out. Must never say to the other end why a proof failed, let an unchecked length reserve memory, or
reach `done` without a proof from the other end over this very transcript.

    dialer                                listener
      HELLO  versions, identity, nonce  ->
                                        <-  REPLY  version, identity, nonce, proof
      CONFIRM  proof                    ->
    either may send REFUSE instead and close

Both proofs are keyed hashes over all bytes exchanged so far, under a label for the sender's side,
so a proof fits no other exchange, no other side and no edited message. What a HELLO claims is
unproven when the listener answers it: nothing but the answer depends on it before CONFIRM.

Inside TLS both proofs cover the `binding` besides: what tells this TLS channel from every other, as
each end sees it. Somebody in the middle has two channels, so neither proof fits at its other end.
"""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any, Final, NoReturn

from blake3 import blake3
from construct import Bytes, Const, ConstructError, Int8ub, Int16ub, Int64ub, Struct

from nbdmirror.core.messages import printable, text_bytes
from nbdmirror.errors import (
    AuthenticationError,
    ConfigError,
    NbdMirrorError,
    PeerProtocolError,
    PeerRefusedError,
)
from nbdmirror.limits import HANDSHAKE_BYTES_MAX, KEY_BYTES_MAX, KEY_BYTES_MIN, REASON_BYTES_MAX

PROTOCOL_VERSION: Final = 2
MAGIC: Final = b"NBDMIRR\x01"
NONCE_BYTES: Final = 32
MAC_BYTES: Final = 32
ID_BYTES: Final = 16
CHANNEL_DATA: Final = 0
PREFIX_BYTES: Final = 3
BINDING_BYTES: Final = 32
# How a TLS record begins that opens or refuses a connection: its type, and the version's first byte
# (RFC 8446, 5.1). As the length of one of our messages either is larger than any.
TLS_BEGINS: Final = (b"\x16\x03", b"\x15\x03")
TLS_DIFFERS: Final = (
    "engine.tls differs: one node speaks TLS and the other one does not; set it to the same on both"
)

# blake3's key derivation keeps keys of different contexts apart (BLAKE3 paper, section 6.2).
_CONTEXT_PROOF: Final = "nbdmirror 2026 peer channel v1 handshake proof"
_CONTEXT_SESSION: Final = "nbdmirror 2026 peer channel v1 session keys"
_LABEL_DIALER: Final = b"dialer"
_LABEL_LISTENER: Final = b"listener"


class HandshakeType(IntEnum):
    """The type byte of a handshake message."""

    HELLO = 1
    REPLY = 2
    CONFIRM = 3
    REFUSE = 4


class RefusalCode(IntEnum):
    """Why a node refuses; sent without a proof, so it is a hint for the operator and no more."""

    AUTHENTICATION = 1
    PROTOCOL = 2
    MIRROR = 3
    NODE = 4
    VERSION = 5
    FEATURES = 6
    BUSY = 7
    TLS = 8


class Feature(IntFlag):
    """Bits of what an end offers. Both proofs cover both offers."""

    FRAME_MACS = 1
    """Can put a keyed code on every frame."""
    ASKS_FRAME_MACS = 2
    """Its configuration wants that: it is done if one end asks and both can."""


_SEALED: Final = Feature.FRAME_MACS | Feature.ASKS_FRAME_MACS


def offers(*, macs: bool) -> tuple[int, int]:
    """What an end offers and what it requires. Every one can do MACs; one that asks for them goes
    on with nothing less.
    """
    return (int(_SEALED), int(Feature.FRAME_MACS)) if macs else (int(Feature.FRAME_MACS), 0)


def agreed(mine: int, theirs: int) -> int:
    """What a session uses: what both offer. Of two wishes for integrity the stronger one counts."""
    features = mine & theirs
    if features & Feature.FRAME_MACS:
        features |= (mine | theirs) & Feature.ASKS_FRAME_MACS
    return features


_IDENTITY = (
    "mirror_id" / Bytes(ID_BYTES),
    "node_id" / Int8ub,
    "node_uuid" / Bytes(ID_BYTES),
    "instance" / Bytes(ID_BYTES),
    "nonce" / Bytes(NONCE_BYTES),
    "features" / Int64ub,
)
HELLO_SCHEMA: Final = Struct(
    "magic" / Const(MAGIC),
    "min_version" / Int16ub,
    "max_version" / Int16ub,
    "channel" / Int8ub,
    *_IDENTITY,
)
REPLY_SCHEMA: Final = Struct(
    "magic" / Const(MAGIC),
    "version" / Int16ub,
    "channel" / Int8ub,
    *_IDENTITY,
    "mac" / Bytes(MAC_BYTES),
)
CONFIRM_SCHEMA: Final = Struct("mac" / Bytes(MAC_BYTES))
_KEYS = Struct(
    "session" / Int64ub,
    "dialer_seed" / Bytes(4),
    "seed_distance" / Bytes(4),
    "dialer_mac_key" / Bytes(32),
    "listener_mac_key" / Bytes(32),
    "hash_key" / Bytes(32),
    "dialer_frame_key" / Bytes(32),
    "listener_frame_key" / Bytes(32),
)

# Body bytes of each type, smallest and largest.
_BODY_BYTES: Final[Mapping[int, tuple[int, int]]] = {
    HandshakeType.HELLO: (HELLO_SCHEMA.sizeof(), HELLO_SCHEMA.sizeof()),
    HandshakeType.REPLY: (REPLY_SCHEMA.sizeof(), REPLY_SCHEMA.sizeof()),
    HandshakeType.CONFIRM: (MAC_BYTES, MAC_BYTES),
    HandshakeType.REFUSE: (1, 1 + REASON_BYTES_MAX),
}
assert all(1 + largest <= HANDSHAKE_BYTES_MAX for _, largest in _BODY_BYTES.values())


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a node is: mirror, number (1 to 255), uuid, life of its engine; 16 bytes each."""

    mirror_id: bytes
    node_id: int
    node_uuid: bytes
    instance: bytes


@dataclass(frozen=True, slots=True)
class Established:
    """What both ends agreed on. `session` is a fresh number, never 0. Seeds, MAC keys (of CONTROL
    frames) and frame keys (of every frame) are per direction; `hash_key`, for comparing blocks, is
    the same at both ends.

    `leftover` holds the bytes received behind the handshake: the first of the frames.
    """

    peer: Identity
    version: int
    features: int
    session: int
    send_seed: int
    receive_seed: int
    send_mac_key: bytes
    receive_mac_key: bytes
    hash_key: bytes
    send_frame_key: bytes
    receive_frame_key: bytes
    leftover: bytes

    @property
    def frame_macs(self) -> bool:
        """Whether every frame of this session carries a keyed code."""
        return self.features & _SEALED == _SEALED

    def __repr__(self) -> str:
        """Without keys: this ends up in logs and tracebacks."""
        return f"Established(session={self.session:016x}, peer={self.peer!r})"


class Handshake:
    """One end of one handshake.

    Args:
        dialer: whether this end opened the connection.
        psk: the mirror's key, 32 to 4096 bytes.
        me: this node.
        nonce: 32 unpredictable bytes, used for this handshake only.
        versions: lowest and highest protocol version this end speaks.
        features: bits of what this end offers; see `agreed`.
        required: bits without which this end does not want a session.
        binding: 32 bytes that name the TLS channel around this handshake; none without TLS.

    Raises:
        ConfigError: the key is too short or too long.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the settings of one end, named at every call
        self,
        dialer: bool,  # noqa: FBT001 - the two ends of a handshake
        psk: bytes,
        me: Identity,
        nonce: bytes,
        versions: tuple[int, int] = (PROTOCOL_VERSION, PROTOCOL_VERSION),
        features: int = 0,
        required: int = 0,
        binding: bytes = b"",
    ) -> None:
        if not KEY_BYTES_MIN <= len(psk) <= KEY_BYTES_MAX:
            raise ConfigError(
                f"the mirror's key has {len(psk)} bytes, "
                f"it needs {KEY_BYTES_MIN} to {KEY_BYTES_MAX}"
            )
        assert len(nonce) == NONCE_BYTES, "a nonce has 32 bytes"
        assert 1 <= me.node_id <= 255, "a node id is 1 to 255"
        assert len(binding) in {0, BINDING_BYTES}, "a binding is a hash, or none"
        self.done: Established | None = None
        self.refusal = b""
        self._dialer = dialer
        self._me = me
        self._nonce = nonce
        self._versions = versions
        self._features = features
        self._required = required
        self._binding = binding
        self._proof_key = _derive(psk, _CONTEXT_PROOF)
        self._session_key = _derive(psk, _CONTEXT_SESSION)
        self._transcript = b""
        self._received = b""
        self._peer: Identity | None = None
        self._agreed = (0, 0)
        self._failure: NbdMirrorError | None = None
        self._expected = HandshakeType.REPLY if dialer else HandshakeType.HELLO

    def start(self) -> bytes:
        """The first bytes to send; none for a listener."""
        if not self._dialer:
            return b""
        assert not self._transcript, "a handshake starts once"
        body = HELLO_SCHEMA.build(
            {
                "min_version": self._versions[0],
                "max_version": self._versions[1],
                "channel": CHANNEL_DATA,
                **self._introduction(),
            }
        )
        self._transcript = _message(HandshakeType.HELLO, body)
        return self._transcript

    def receive(self, data: bytes) -> bytes:
        """Take received bytes, return the bytes to send (perhaps none). See `done` afterwards.

        Raises:
            AuthenticationError: the other end does not hold the key, or somebody edits or replays.
            PeerRefusedError: the two do not fit together, or the other end says so.
            PeerProtocolError: this is not our handshake, or more after an earlier error.

        After an error send `refusal` (it may be empty) and close.
        """
        if self._failure is not None:
            raise PeerProtocolError(f"the handshake ended with: {self._failure}")
        assert self.done is None, "the handshake is over: these bytes belong to the frames"
        self._received += data
        try:
            return self._advance()
        except NbdMirrorError as error:
            self._failure = error
            self._received = b""
            raise

    def _advance(self) -> bytes:
        """Handle every complete message; what follows the last one belongs to the frames."""
        outgoing = b""
        while self.done is None and len(self._received) >= PREFIX_BYTES:
            kind, body_bytes = self._check_prefix(self._received)
            end = PREFIX_BYTES + body_bytes
            if len(self._received) < end:
                break
            message, self._received = self._received[:end], self._received[end:]
            outgoing += self._handle(kind, message)
        return outgoing

    def _handle(self, kind: int, message: bytes) -> bytes:
        if kind == HandshakeType.HELLO:
            return self._on_hello(message)
        if kind == HandshakeType.REPLY:
            return self._on_reply(message)
        if kind == HandshakeType.CONFIRM:
            return self._on_confirm(message)
        text = _sanitized(message[PREFIX_BYTES + 1 :])
        raise PeerRefusedError(f"peer says (unauthenticated): {text}")

    def _check_prefix(self, buffered: bytes) -> tuple[int, int]:
        """Type and length are judged before the body is waited for."""
        if buffered[:2] in TLS_BEGINS:
            self._refuse(RefusalCode.TLS, TLS_DIFFERS)
        length = int.from_bytes(buffered[:2], "big")
        kind = buffered[2]
        if kind not in (self._expected, HandshakeType.REFUSE):
            self._refuse(
                RefusalCode.PROTOCOL, f"handshake message of type {kind}, not {self._expected}"
            )
        smallest, largest = _BODY_BYTES[kind]
        if not smallest <= length - 1 <= largest:
            self._refuse(RefusalCode.PROTOCOL, f"handshake message of {length} bytes, type {kind}")
        return kind, length - 1

    # --- the three messages -----------------------------------------------------------------

    def _on_hello(self, message: bytes) -> bytes:
        hello = self._parse(HELLO_SCHEMA, message)
        low = max(hello["min_version"], self._versions[0])
        version = min(hello["max_version"], self._versions[1])
        if version < low:
            self._refuse(
                RefusalCode.VERSION,
                f"peer speaks versions {hello['min_version']} to {hello['max_version']}, "
                f"this node {self._versions[0]} to {self._versions[1]}: upgrade the older node",
            )
        self._check_introduction(hello, version)
        body = REPLY_SCHEMA.build(
            {
                "version": version,
                "channel": CHANNEL_DATA,
                **self._introduction(),
                "mac": bytes(MAC_BYTES),
            }
        )
        unproven = _message(HandshakeType.REPLY, body)[:-MAC_BYTES]
        transcript = message + unproven
        reply = unproven + self._proof(_LABEL_LISTENER, transcript)
        self._transcript = message + reply
        self._expected = HandshakeType.CONFIRM
        return reply

    def _on_reply(self, message: bytes) -> bytes:
        assert self._transcript, "start() comes first"
        self._check_proof(
            _LABEL_LISTENER, self._transcript + message[:-MAC_BYTES], message[-MAC_BYTES:]
        )
        reply = self._parse(REPLY_SCHEMA, message)
        version = reply["version"]
        if not self._versions[0] <= version <= self._versions[1]:
            self._refuse(
                RefusalCode.VERSION, f"peer chose version {version}, which was not offered"
            )
        self._check_introduction(reply, version)
        self._transcript += message
        confirm = _message(
            HandshakeType.CONFIRM,
            CONFIRM_SCHEMA.build({"mac": self._proof(_LABEL_DIALER, self._transcript)}),
        )
        self._finish(confirm)
        return confirm

    def _on_confirm(self, message: bytes) -> bytes:
        self._check_proof(_LABEL_DIALER, self._transcript, message[-MAC_BYTES:])
        self._finish(message)
        return b""

    # --- parts ------------------------------------------------------------------------------

    def _introduction(self) -> dict[str, Any]:
        return {
            "mirror_id": self._me.mirror_id,
            "node_id": self._me.node_id,
            "node_uuid": self._me.node_uuid,
            "instance": self._me.instance,
            "nonce": self._nonce,
            "features": self._features,
        }

    def _parse(self, schema: Any, message: bytes) -> Any:
        try:
            return schema.parse(message[PREFIX_BYTES:])
        except ConstructError as error:
            text = printable(str(error).replace("\n", " "))
            self._refuse(RefusalCode.PROTOCOL, f"handshake message: {text}")

    def _check_introduction(self, fields: Any, version: int) -> None:
        """Whether the other end may be our peer at all."""
        me = self._me
        peer = Identity(
            fields["mirror_id"], fields["node_id"], fields["node_uuid"], fields["instance"]
        )
        if fields["channel"] != CHANNEL_DATA:
            self._refuse(RefusalCode.PROTOCOL, f"channel {fields['channel']} is not known")
        if peer.mirror_id != me.mirror_id:
            self._refuse(
                RefusalCode.MIRROR,
                f"peer belongs to mirror {peer.mirror_id.hex()}, "
                f"this node to {me.mirror_id.hex()}: check the peer's address and port",
            )
        if fields["nonce"] == self._nonce or peer.instance == me.instance:
            self._refuse(
                RefusalCode.NODE,
                "this node is connected to itself: check the peer's address and port",
            )
        if peer.node_id == me.node_id:
            self._refuse(
                RefusalCode.NODE,
                f"peer claims my node id {me.node_id}: check the peer's address and both configs",
            )
        if not peer.node_id or peer.node_uuid == me.node_uuid:
            self._refuse(
                RefusalCode.NODE,
                f"peer claims node id {peer.node_id} with uuid {peer.node_uuid.hex()}: "
                "its metadata was not created for it",
            )
        features = agreed(self._features, fields["features"])
        if missing := self._required & ~features:
            why = "which this node requires"
            if missing & Feature.FRAME_MACS:
                why = 'which engine.integrity = "mac" requires: update the program of the peer'
            self._refuse(RefusalCode.FEATURES, f"peer lacks features {missing:#x}, {why}")
        self._peer = peer
        self._agreed = version, features

    def _proof(self, label: bytes, transcript: bytes) -> bytes:
        # Each of the three has one length under a label, so no two of them make the same bytes.
        return blake3(label + transcript + self._binding, key=self._proof_key).digest()

    def _check_proof(self, label: bytes, transcript: bytes, proof: bytes) -> None:
        if not hmac.compare_digest(self._proof(label, transcript), proof):
            self.refusal = encode_refusal(RefusalCode.AUTHENTICATION, "authentication failed")
            raise AuthenticationError(NOT_PROVEN_IN_TLS if self._binding else NOT_PROVEN)

    def _finish(self, confirm: bytes) -> None:
        """Both proofs are there (or sent): derive the session from all that was said."""
        assert self._peer is not None
        digest = blake3(self._transcript + confirm, key=self._session_key)
        keys = _KEYS.parse(digest.digest(length=_KEYS.sizeof()))
        dialer_seed = int.from_bytes(keys["dialer_seed"], "big")
        # Never equal: a frame sent back to where it came from must not pass its checks.
        listener_seed = dialer_seed ^ (int.from_bytes(keys["seed_distance"], "big") | 1)
        seeds = (dialer_seed, listener_seed)
        mac_keys = (keys["dialer_mac_key"], keys["listener_mac_key"])
        frame_keys = (keys["dialer_frame_key"], keys["listener_frame_key"])
        mine, theirs = (0, 1) if self._dialer else (1, 0)
        self.done = Established(
            peer=self._peer,
            version=self._agreed[0],
            features=self._agreed[1],
            session=keys["session"] or 1,
            send_seed=seeds[mine],
            receive_seed=seeds[theirs],
            send_mac_key=mac_keys[mine],
            receive_mac_key=mac_keys[theirs],
            hash_key=keys["hash_key"],
            send_frame_key=frame_keys[mine],
            receive_frame_key=frame_keys[theirs],
            leftover=self._received,
        )
        self._received = b""

    def _refuse(self, code: RefusalCode, text: str) -> NoReturn:
        """Tell the other end the kind of problem, and this end's operator all of it."""
        self.refusal = encode_refusal(code, _TOLD[code])
        if code is RefusalCode.PROTOCOL:
            raise PeerProtocolError(text)
        raise PeerRefusedError(text)


NOT_PROVEN: Final = (
    "the other end does not hold this mirror's key (or the connection was tampered with): install "
    "the same key on both nodes"
)
NOT_PROVEN_IN_TLS: Final = (
    "the other end does not hold this mirror's key, or its TLS ends at somebody in the middle who "
    "has a certificate of his own: install the same key on both nodes, and look at what stands "
    "between them"
)
_TOLD: Final[Mapping[RefusalCode, str]] = {
    RefusalCode.PROTOCOL: "this is not the handshake of a mirror's peer",
    RefusalCode.MIRROR: "this is another mirror",
    RefusalCode.NODE: "your node identity is mine, or none",
    RefusalCode.VERSION: "no protocol version in common",
    RefusalCode.FEATURES: "a required feature is missing",
    RefusalCode.TLS: TLS_DIFFERS,
}
"""What an end that has proven nothing is told: no identities, no versions."""


def encode_refusal(code: RefusalCode, text: str) -> bytes:
    """A REFUSE message; `text` is cut at 1024 bytes. Send it, then close."""
    return _message(HandshakeType.REFUSE, bytes((code,)) + text_bytes(text))


def _derive(psk: bytes, context: str) -> bytes:
    return blake3(psk, derive_key_context=context).digest()


def _message(kind: HandshakeType, body: bytes) -> bytes:
    return (1 + len(body)).to_bytes(2, "big") + bytes((kind,)) + body


def _sanitized(text: bytes) -> str:
    return printable(text.decode("utf-8", "replace").replace("\N{REPLACEMENT CHARACTER}", "?"))
