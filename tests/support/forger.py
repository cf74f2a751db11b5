"""Somebody between the two nodes who changes frames and repairs their checks, without any key.

A CRC is linear: for two texts of one length the difference of their checks depends on the
difference of the texts only, whatever seed both continue from. So a forger who knows no seed
changes payload and checks together. Owns the cutting of one direction of a connection into
handshake messages and frames; holds a frame back only until the rest of it is there.
"""

from nbdmirror.core.checks import crc32c
from nbdmirror.core.handshake import PREFIX_BYTES, HandshakeType
from nbdmirror.core.wire import HEADER_BYTES, HEADER_CHECKED_BYTES, MAC_BYTES, FrameType
from tests.support.proxy import Editor

TYPE_AT = 2
LENGTH_AT = 4
SEQ_LAST_AT = 23
AUX_LAST_AT = 39
PAYLOAD_CRC_AT = 40
LAST_MESSAGES = (HandshakeType.REPLY, HandshakeType.CONFIRM)


def difference(change: bytes) -> int:
    """What a change (the XOR of two texts) does to their check, whatever the seed."""
    return crc32c(change) ^ crc32c(bytes(len(change)))


def forged(frame: bytes, before_payload: int, *, payload_change: bytes, at: int) -> bytes:
    """The frame with changes in its payload, or else in that byte of its header; its checks fit."""
    header, between = frame[:HEADER_BYTES], frame[HEADER_BYTES:before_payload]
    payload = xor(frame[before_payload:], payload_change)
    change = bytearray(HEADER_CHECKED_BYTES)
    if payload:
        change[PAYLOAD_CRC_AT:] = difference(payload_change).to_bytes(4, "big")
    else:
        change[at] = 1
    check = difference(bytes(change)).to_bytes(4, "big")
    return xor(header, bytes(change) + check) + between + payload


def xor(one: bytes, other: bytes) -> bytes:
    """Byte by byte."""
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


class Forger:
    """One direction of one connection."""

    def __init__(self, campaign: "Campaign") -> None:
        self._campaign = campaign
        self._handshaking = True
        self._held = b""

    def edit(self, piece: bytes) -> bytes:
        """What goes on to the other end instead of `piece`."""
        self._held += piece
        out = b""
        while taken := self._next_bytes():
            part, self._held = self._held[:taken], self._held[taken:]
            out += part if self._handshaking else self._campaign.pass_on(part)
            if self._handshaking and part[TYPE_AT] in LAST_MESSAGES:
                self._handshaking = False
        return out

    def _next_bytes(self) -> int:
        """How long the next message or frame is; 0 as long as it is not there."""
        held = self._held
        if self._handshaking:
            head, length = PREFIX_BYTES, int.from_bytes(held[:2], "big") - 1
        else:
            head = self._campaign.before_payload
            length = int.from_bytes(held[LENGTH_AT : LENGTH_AT + 4], "big")
        return head + length if len(held) >= head and len(held) >= head + length else 0


class Campaign:
    """What is forged, once: the next frame of `kind` after `arm`, in any connection."""

    def __init__(self, kind: FrameType, *, macs: bool) -> None:
        self.before_payload = HEADER_BYTES + (MAC_BYTES if macs else 0)
        self.count = 0
        self._kind = kind
        self._armed = False

    def arm(self) -> None:
        """Forge the next one."""
        self._armed = True

    def editors(self) -> tuple[Editor, Editor]:
        """For the two directions of a new connection."""
        return Forger(self).edit, Forger(self).edit

    def pass_on(self, frame: bytes) -> bytes:
        """A whole frame, as it is or forged."""
        if not self._armed or frame[TYPE_AT] != self._kind:
            return frame
        self._armed = False
        self.count += 1
        size = len(frame) - self.before_payload
        # A FLUSH whose sequence was changed is found by it.
        at = AUX_LAST_AT if self._kind is FrameType.FLUSH else SEQ_LAST_AT
        return forged(frame, self.before_payload, payload_change=b"\x20" * size, at=at)
