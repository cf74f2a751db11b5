"""Heartbeats: what two controllers send each other, and what of it proves that the other lives.

Owns the datagram, the judgement of what arrives on one network, the choice of the newest word over
all networks, and the count of silence. Pure: bytes and milliseconds in, decisions out. Must never
parse a byte before the length and the MAC are checked, take one datagram twice, or count silence
while this process was not running.

Each life of a controller has a random nonce, and numbers its datagrams over all networks. Each
datagram echoes the nonce and the highest number heard from the other end on this network. One
that does not echo the nonce of *this* life proves nothing: it may be a recording of years ago. It
is a hello, and the only answer is that its nonce is echoed. One that does is *fresh* if it also
moves forward:

| its nonce | its number | the number of ours that it echoes |
|---|---|---|
| is live here | above the highest accepted | not below the highest echoed |
| is another one | above its highest hello | above the highest echoed |

The last cell says: it heard a later word of ours than the live one had. Each acceptance raises the
number that was echoed, or raises the peer's number in the same life. So no datagram is accepted
twice, whatever is recorded, held back, replayed or mixed, and no list of former lives is needed. A
live nonce stays until another one is fresh: until then hellos change nothing, and nothing is lost
by that, because the new life echoes ours as soon as it hears us. While nothing is live, the nonces
of a few hellos are echoed in turn, so that a recorded one cannot keep the real one out.

Two questions have two answers. *Is the peer alive?* A fresh datagram says so, even when nothing
of ours arrives there: nobody may take over while it hears a primary. *Is the network up?* Only
while our own numbers come back in time (rule 18 of docs/safety.md).
"""

import hmac
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NewType

from blake3 import blake3
from construct import Bytes, Const, Int8ub, Int16ub, Int32ub, Int64ub, Struct, this

from nbdmirror.core.checks import keyed_hash
from nbdmirror.errors import (
    AuthenticationError,
    ConfigError,
    PeerProtocolError,
    PeerRefusedError,
)
from nbdmirror.limits import HASH_BYTES, KEY_BYTES_MAX, KEY_BYTES_MIN

MAGIC: Final = b"NBDMBEAT"
VERSION: Final = 1
NONCE_BYTES: Final = 16
MAC_BYTES: Final = 16
# With the headers of IPv6 and UDP the whole fits one frame of Ethernet (1500 bytes).
BODY_BYTES_MAX: Final = 1200
NO_NONCE: Final = bytes(NONCE_BYTES)
EXTRA_LINK: Final = 255  # the index of what travels over the peer channel
HELLOS_MAX: Final = 4
SENT_MAX: Final = 256
_HELD_US_MAX: Final = 2**32 - 1
# blake3's key derivation keeps keys of different contexts apart, as in core/handshake.py.
_CONTEXT: Final = "nbdmirror 2026 heartbeat v1 mac"

SCHEMA: Final = Struct(
    "magic" / Const(MAGIC),
    "version" / Const(VERSION, Int8ub),
    "mirror_id" / Bytes(16),
    "node_id" / Int8ub,
    "link" / Int8ub,
    "nonce" / Bytes(NONCE_BYTES),
    "seq" / Int64ub,
    "echo_nonce" / Bytes(NONCE_BYTES),
    "echo_seq" / Int64ub,
    "echo_held_us" / Int32ub,
    "body_bytes" / Int16ub,
    "body" / Bytes(this.body_bytes),
)
"""The format of record, without the MAC: keyed BLAKE3 over all of this, 16 bytes, at the end."""

_HEADER_BYTES: Final = 81
_VERSION_AT: Final = len(MAGIC)
_BODY_BYTES_AT: Final = _HEADER_BYTES - 2
DATAGRAM_BYTES_MIN: Final = _HEADER_BYTES + MAC_BYTES
DATAGRAM_BYTES_MAX: Final = DATAGRAM_BYTES_MIN + BODY_BYTES_MAX

assert DATAGRAM_BYTES_MAX + 40 + 8 <= 1500
assert MAC_BYTES == HASH_BYTES

MacKey = NewType("MacKey", bytes)


def derive_mac_key(psk: bytes) -> MacKey:
    """The key of the heartbeats' MAC from the mirror's key, 32 to 4096 bytes.

    Raises:
        ConfigError: the key is too short or too long.
    """
    if not KEY_BYTES_MIN <= len(psk) <= KEY_BYTES_MAX:
        raise ConfigError(
            f"the mirror's key has {len(psk)} bytes, it needs {KEY_BYTES_MIN} to {KEY_BYTES_MAX}"
        )
    return MacKey(blake3(psk, derive_key_context=_CONTEXT).digest())


@dataclass(frozen=True, slots=True)
class Packet:
    """One heartbeat. `echo_held_us`: how long the sender had what it echoes before it sent this."""

    mirror_id: bytes
    node_id: int
    link: int
    nonce: bytes
    seq: int
    echo_nonce: bytes
    echo_seq: int
    echo_held_us: int
    body: bytes


def encode(key: MacKey, packet: Packet) -> bytes:
    """The datagram: 97 bytes and the body, which has at most 1200."""
    assert len(packet.body) <= BODY_BYTES_MAX, "the body of a heartbeat has a bound"
    assert packet.nonce != NO_NONCE, "a nonce of zeros means none"
    fields = {name: getattr(packet, name) for name in Packet.__slots__}
    signed: bytes = SCHEMA.build({**fields, "body_bytes": len(packet.body)})
    return signed + keyed_hash(key, signed)


def decode(key: MacKey, datagram: bytes) -> Packet:
    """A datagram of any origin and length, checked; whose it is remains to be judged.

    Raises:
        AuthenticationError: the MAC is not of this key.
        PeerRefusedError: another version.
        PeerProtocolError: no heartbeat, or its length is wrong.
    """
    count = len(datagram)
    if not DATAGRAM_BYTES_MIN <= count <= DATAGRAM_BYTES_MAX or not datagram.startswith(MAGIC):
        raise PeerProtocolError(
            f"{count} bytes that are no heartbeat: see what else sends to this port"
        )
    if datagram[_VERSION_AT] != VERSION:
        raise PeerRefusedError(
            f"a heartbeat of version {datagram[_VERSION_AT]}, this node speaks {VERSION}: "
            "upgrade the older node"
        )
    body_bytes = int.from_bytes(datagram[_BODY_BYTES_AT:_HEADER_BYTES], "big")
    if count != DATAGRAM_BYTES_MIN + body_bytes:
        raise PeerProtocolError(f"a heartbeat of {count} bytes that says it has {body_bytes} more")
    signed, mac = datagram[:-MAC_BYTES], datagram[-MAC_BYTES:]
    if not hmac.compare_digest(keyed_hash(key, signed), mac):
        raise AuthenticationError(
            "a heartbeat that was not made with this mirror's key: install the same key on both "
            "nodes"
        )
    fields: Any = SCHEMA.parse(signed)
    packet = Packet(**{name: fields[name] for name in Packet.__slots__})
    if packet.nonce == NO_NONCE:
        raise PeerProtocolError("a heartbeat with a nonce of zeros, which means none")
    return packet


class Refusal(Enum):
    """Why a datagram does not count, in the words of `status`."""

    STRANGER = "it came from an address that is not the peer's"
    FORMAT = "it is no heartbeat"
    VERSION = "it is of another version: upgrade the older node"
    KEY = "it was made with another key: install the same key on both nodes"
    MIRROR = "it is of another mirror: check addresses and ports in both configs"
    OWN = "it is this node's own: check addresses and ports in both configs"
    NODE = "it is of a node that is not the peer: check the ids in both configs"
    LINK = "it is of another network: list the heartbeat addresses in one order in both configs"
    OLD = "it is older than what was heard before"
    ECHO = "it answers what this node did not say in this life"


class Silence:
    """How long nothing was heard, counted while this process was awake only.

    Args:
        gap_ms: rounds of the loop that lie further apart mean that it was not running.
        least_ms: what each round after such a gap counts for all the same: a process that is
            paused again and again would else never lose a peer that is gone.
    """

    def __init__(self, gap_ms: int, least_ms: int) -> None:
        assert 0 < least_ms < gap_ms, "a gap counts for less than it is"
        self._gap_ms = gap_ms
        self._least_ms = least_ms
        self._since_ms: float | None = None
        self._round_ms = 0.0

    def tick(self, now_ms: float) -> bool:
        """Every round of the loop. True after a gap: first take what waits in the sockets."""
        if self._since_ms is None:
            self._since_ms = self._round_ms = now_ms
        pause_ms = self._pause_ms(now_ms)
        # Not beyond now: something may have been heard in this very gap.
        self._since_ms = min(self._since_ms + pause_ms, now_ms)
        self._round_ms = now_ms
        return pause_ms > 0

    def heard(self, now_ms: float) -> None:
        """Something was heard."""
        self._since_ms = now_ms

    def silent_ms(self, now_ms: float) -> int:
        """Milliseconds of silence, from the first round on; a gap since the last one left out."""
        if self._since_ms is None:
            return 0
        return max(0, int(now_ms - self._since_ms - self._pause_ms(now_ms)))

    def _pause_ms(self, now_ms: float) -> float:
        """How much of the time since the last round is not counted."""
        gap_ms = now_ms - self._round_ms
        return gap_ms - self._least_ms if gap_ms > self._gap_ms else 0.0


@dataclass(frozen=True, slots=True)
class Ends:
    """Who talks with whom: the mirror and this life's nonce (16 bytes each), and two node ids."""

    key: MacKey
    mirror_id: bytes
    node_id: int
    peer_id: int
    nonce: bytes

    def __post_init__(self) -> None:
        assert self.node_id != self.peer_id, "the two nodes have ids of their own"
        assert len(self.nonce) == NONCE_BYTES, "a nonce has 16 bytes"
        assert self.nonce != NO_NONCE, "a nonce of zeros means none"

    def __repr__(self) -> str:
        """Without the key: this ends up in logs and tracebacks."""
        return f"Ends(node_id={self.node_id}, peer_id={self.peer_id})"


@dataclass(slots=True)
class _Heard:
    """The highest number of one nonce of the peer, and when it came."""

    seq: int = 0
    at_ms: float = 0.0


class Link:
    """One network, in both directions. `silence_ms`: after so long without a word it is down.

    `heard_ms`: when the last fresh datagram came, None if none did. `rtt_ms`: of the last round
    trip. `newest`: the last fresh datagram. `refused`: how many did not count, by reason.
    """

    def __init__(self, ends: Ends, index: int, silence_ms: int) -> None:
        self.heard_ms: float | None = None
        self.rtt_ms: float | None = None
        self.newest: Packet | None = None
        self.refused: dict[Refusal, int] = {}
        self.refused_last: Refusal | None = None
        self._ends = ends
        self._index = index
        self._silence_ms = silence_ms
        # Half: a pause that is counted is too short to be taken for the peer's silence, and after
        # it the sockets are read. A fifteenth: a peer that is gone is lost after 15 pauses.
        self._silence, self._deafness = (
            Silence(silence_ms // 2, max(silence_ms // 15, 1)) for _ in range(2)
        )
        self._live = NO_NONCE
        self._live_heard = _Heard()
        self._hellos: dict[bytes, _Heard] = {}
        self._sent_ms: dict[int, float] = {}
        self._sent_seq = 0
        self._echoed_seq = 0

    # --- sending ----------------------------------------------------------------------------

    def packet(self, seq: int, body: bytes, now_ms: float) -> bytes:
        """What to send now. `seq`: one above the last of this life on any network."""
        assert seq > self._sent_seq, "the numbers of a life rise"
        self._sent_seq = seq
        self._sent_ms[seq] = now_ms
        if len(self._sent_ms) > SENT_MAX:
            del self._sent_ms[next(iter(self._sent_ms))]
        nonce, heard = self._to_echo()
        held_us = int((now_ms - heard.at_ms) * 1000) if heard.seq else 0
        ends = self._ends
        return encode(
            ends.key,
            Packet(
                mirror_id=ends.mirror_id,
                node_id=ends.node_id,
                link=self._index,
                nonce=ends.nonce,
                seq=seq,
                echo_nonce=nonce,
                echo_seq=heard.seq,
                echo_held_us=min(max(held_us, 0), _HELD_US_MAX),
                body=body,
            ),
        )

    def _to_echo(self) -> tuple[bytes, _Heard]:
        """The live nonce; while there is none, those of the hellos in turn."""
        if self._live != NO_NONCE or not self._hellos:
            return self._live, self._live_heard
        nonce = next(iter(self._hellos))
        heard = self._hellos[nonce] = self._hellos.pop(nonce)
        return nonce, heard

    # --- receiving --------------------------------------------------------------------------

    def take(self, datagram: bytes, now_ms: float) -> bytes | None:
        """The body if the datagram is the peer's and fresh, else None."""
        packet: Packet | Refusal | None = self._read(datagram)
        if isinstance(packet, Packet) and packet.echo_nonce != self._ends.nonce:
            packet = self._hello(packet, now_ms)
        elif isinstance(packet, Packet):
            packet = self._judge(packet)
        if isinstance(packet, Refusal):
            self.refuse(packet)
        if not isinstance(packet, Packet):
            return None
        self._accept(packet, now_ms)
        return packet.body

    def refuse(self, reason: Refusal) -> None:
        """Count a datagram that does not count."""
        self.refused[reason] = self.refused.get(reason, 0) + 1
        self.refused_last = reason

    def _read(self, datagram: bytes) -> Packet | Refusal:
        """What the peer, and nobody else, sent on this network, if it was not overtaken."""
        try:
            packet = decode(self._ends.key, datagram)
        except AuthenticationError:
            return Refusal.KEY
        except PeerRefusedError:
            return Refusal.VERSION
        except PeerProtocolError:
            return Refusal.FORMAT
        refusal = self._not_meant(packet)
        if refusal is not None:
            return refusal
        return Refusal.OLD if packet.seq <= self._highest(packet.nonce) else packet

    def _not_meant(self, packet: Packet) -> Refusal | None:
        """Whether this is of the peer, for this node, on this network."""
        ends = self._ends
        if packet.mirror_id != ends.mirror_id:
            return Refusal.MIRROR
        if packet.node_id != ends.peer_id:
            return Refusal.OWN if packet.node_id == ends.node_id else Refusal.NODE
        return None if packet.link == self._index else Refusal.LINK

    def _highest(self, nonce: bytes) -> int:
        if nonce == self._live:
            return self._live_heard.seq
        return self._hellos[nonce].seq if nonce in self._hellos else 0

    def _hello(self, packet: Packet, now_ms: float) -> Refusal | None:
        """Remember whom to echo; the live nonce is not disturbed by what proves nothing."""
        if packet.nonce == self._live:
            return Refusal.ECHO
        if self._live == NO_NONCE:
            # In its place, or else instead of the last, which was echoed lately or has just come:
            # all get their turn, whoever speaks how often.
            if packet.nonce not in self._hellos and len(self._hellos) == HELLOS_MAX:
                self._hellos.popitem()
            self._hellos[packet.nonce] = _Heard(packet.seq, now_ms)
        return None

    def _judge(self, packet: Packet) -> Packet | Refusal:
        """The table of this module's head."""
        if packet.echo_seq > self._sent_seq:
            return Refusal.ECHO
        lowest = self._echoed_seq + (packet.nonce != self._live)
        return packet if packet.echo_seq >= lowest else Refusal.OLD

    def _accept(self, packet: Packet, now_ms: float) -> None:
        if packet.echo_seq > self._echoed_seq:
            self._round_trip(packet, now_ms)
        self._live = packet.nonce
        self._live_heard = _Heard(packet.seq, now_ms)
        self._echoed_seq = packet.echo_seq
        self.newest = packet
        self.heard_ms = now_ms
        self._silence.heard(now_ms)

    def _round_trip(self, packet: Packet, now_ms: float) -> None:
        """Our number came back. One that took longer than the silence does not say "up"."""
        sent_ms = self._sent_ms.get(packet.echo_seq)
        if sent_ms is not None and now_ms - sent_ms <= self._silence_ms:
            self.rtt_ms = max(0.0, now_ms - sent_ms - packet.echo_held_us / 1000)
            self._deafness.heard(now_ms)

    # --- time -------------------------------------------------------------------------------

    def tick(self, now_ms: float) -> bool:
        """Every round of the loop. True after a gap: first take what waits in the socket."""
        self._deafness.tick(now_ms)
        return self._silence.tick(now_ms)

    def silent_ms(self, now_ms: float) -> int:
        """Since the last fresh datagram, or the first round, counted while awake."""
        return self._silence.silent_ms(now_ms)

    def down(self, now_ms: float) -> str:
        """Why this network is down, "" if it is up: something is heard, and our word comes back."""
        if self.heard_ms is None:
            return "nothing was heard of the peer since this controller started"
        silent_ms = self.silent_ms(now_ms)
        if silent_ms >= self._silence_ms:
            return f"the peer is silent for {silent_ms} ms"
        if self.rtt_ms is None or self._deafness.silent_ms(now_ms) >= self._silence_ms:
            return "the peer is heard, but what is sent to it does not arrive in time"
        return ""


class Newest:
    """Which body is the peer's last word, over all networks.

    Numbers are compared within one life. Of two lives the later one is known by what it echoes: a
    number of ours, which rise over all networks, above all that the other one echoed.
    """

    def __init__(self) -> None:
        self._nonce = NO_NONCE
        self._seq = 0
        self._echoed_seq = 0

    def take(self, packet: Packet) -> bool:
        """Whether a fresh datagram is newer than all before."""
        if packet.nonce == self._nonce:
            if packet.seq <= self._seq:
                return False
        elif packet.echo_seq <= self._echoed_seq:
            return False
        self._nonce = packet.nonce
        self._seq = packet.seq
        self._echoed_seq = max(self._echoed_seq, packet.echo_seq)
        return True
