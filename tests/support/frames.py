"""The bytes of one connection between two engines, cut at the borders of what they say.

Owns the cutting of both directions into handshake messages and frames, by the lengths in their
headers, and the name of each frame: that of its type, of a CONTROL frame that of its message.
Whether frames carry a MAC it reads from the two offers of the handshake. Pure: bytes in, pieces
out. Must never: need a key, change a byte, or hold more than one frame that is not complete.
"""

from dataclasses import dataclass
from typing import Final

from nbdmirror.core.handshake import HELLO_SCHEMA, PREFIX_BYTES, REPLY_SCHEMA, HandshakeType
from nbdmirror.core.handshake import MAC_BYTES as PROOF_BYTES
from nbdmirror.core.messages import MESSAGE_TYPES
from nbdmirror.core.wire import HEADER, HEADER_BYTES, HEADER_MAGIC, MAC_BYTES, FrameType
from nbdmirror.limits import FRAME_PAYLOAD_BYTES_MAX, HANDSHAKE_BYTES_MAX

# Who sends: the two directions of a connection.
DIALER: Final = "dialer"
LISTENER: Final = "listener"
SENDERS: Final = (DIALER, LISTENER)
MACS: Final = 1
ASKS_MACS: Final = 2
FEATURES_BYTES: Final = 8
MESSAGES: Final = {kind.KIND: kind.__name__ for kind in MESSAGE_TYPES}
KINDS: Final = (
    *(kind.name for kind in FrameType if kind is not FrameType.CONTROL), *MESSAGES.values()
)  # fmt: skip
# Of these each has its place in a row: one that is missing, or comes twice, is found by that.
SEQUENCED: Final = frozenset(
    {kind.name for kind in FrameType if kind <= FrameType.HASH} | set(MESSAGES.values())
)


@dataclass(frozen=True)
class Piece:
    """A whole message or frame. `kind` is "" for one of the handshake."""

    kind: str
    data: bytes
    head_bytes: int = 0

    @property
    def payload_bytes(self) -> int:
        """What follows header and MAC."""
        return len(self.data) - self.head_bytes


class Offers:
    """What both ends of a connection offered, as far as it was said."""

    def __init__(self) -> None:
        self._features: dict[int, int] = {}

    def heard(self, message: bytes) -> None:
        """Take the features of a HELLO or REPLY: the last field of one, and the one before the
        proof in the other.
        """
        number = message[PREFIX_BYTES - 1]
        if number == HandshakeType.HELLO:
            end = PREFIX_BYTES + HELLO_SCHEMA.sizeof()
        elif number == HandshakeType.REPLY:
            end = PREFIX_BYTES + REPLY_SCHEMA.sizeof() - PROOF_BYTES
        else:
            return
        self._features[number] = int.from_bytes(message[end - FEATURES_BYTES : end], "big")

    @property
    def macs(self) -> bool:
        """Whether every frame carries a MAC: both can, and at least one asks for it."""
        one, other = (
            self._features.get(each, 0) for each in (HandshakeType.HELLO, HandshakeType.REPLY)
        )
        return bool(one & other & MACS and (one | other) & ASKS_MACS)


class Cutter:
    """One direction of one connection. `sender`: who dialed, or who listens."""

    def __init__(self, sender: str, offers: Offers) -> None:
        self.sender = sender
        self._offers = offers
        self._held = bytearray()
        self._handshaking = True
        self._foreign = False

    def feed(self, data: bytes) -> list[Piece]:
        """What is complete now. What is no frame of ours passes as it is, to the end."""
        self._held += data
        pieces = []
        while piece := self._next():
            del self._held[: len(piece.data)]
            pieces.append(piece)
        return pieces

    def _next(self) -> Piece | None:
        if self._foreign:
            return Piece("", bytes(self._held)) if self._held else None
        return self._message() if self._handshaking else self._frame()

    def _message(self) -> Piece | None:
        held = self._held
        if len(held) < PREFIX_BYTES:
            return None
        number = held[PREFIX_BYTES - 1]
        end = PREFIX_BYTES - 1 + int.from_bytes(held[:2], "big")
        if number > max(HandshakeType) or not PREFIX_BYTES <= end <= HANDSHAKE_BYTES_MAX:
            self._foreign = True
            return self._next()
        if len(held) < end:
            return None
        message = bytes(held[:end])
        self._offers.heard(message)
        last = HandshakeType.CONFIRM if self.sender == DIALER else HandshakeType.REPLY
        self._handshaking = number != last
        return Piece("", message)

    def _frame(self) -> Piece | None:
        head = HEADER_BYTES + (MAC_BYTES if self._offers.macs else 0)
        held = self._held
        if len(held) < head:
            return None
        magic, number, _, length, *_ = HEADER.unpack_from(held)
        if magic != HEADER_MAGIC or length > FRAME_PAYLOAD_BYTES_MAX:
            self._foreign = True
            return self._next()
        if len(held) < head + length:
            return None
        data = bytes(held[: head + length])
        return Piece(name_of(number, data[head:]), data, head)


def name_of(number: int, payload: bytes) -> str:
    """The name of a frame by its type, of a CONTROL frame by the first byte of its message."""
    if number == FrameType.CONTROL and payload:
        return MESSAGES.get(payload[0], f"message {payload[0]}")
    return FrameType(number).name if number in set(FrameType) else f"type {number}"
