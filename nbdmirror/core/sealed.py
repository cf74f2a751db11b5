"""How the frames of a session are made, and how those with a keyed code are checked.

Owns the two integrities of a session, which is one for all its frames and both directions:

    crc   header (48 bytes), payload: checks with the session's seeds, which find accidents
    mac   header, keyed code (16 bytes), payload: the same checks, and nobody without the key makes
          or moves a frame

The code is a keyed BLAKE3 over payload, frame number and header. The number is not sent: each side
counts the frames of each direction, of every type, from 1. So a frame that is changed, repeated,
left out, moved, sent back, or of another session is found at the first one that does not fit. The
code stands before the payload, because it is then one buffer with the header, and the payload is
sent from where it lies. Must never: hand out a byte of a frame whose code was not checked.
"""

import hmac
from struct import Struct
from typing import Any, Final

from nbdmirror.core.checks import crc32c, keyed_hash_of_two
from nbdmirror.core.handshake import Established
from nbdmirror.core.messages import Message, encode
from nbdmirror.core.ports import ReadBuffer
from nbdmirror.core.wire import (
    HEADER_BYTES,
    MAC_BYTES,
    Frame,
    FrameReader,
    FrameType,
    encode_control,
    encode_header,
)
from nbdmirror.errors import PeerProtocolError

_pack_number: Final = Struct(">Q").pack
_CONTROL: Final = FrameType.CONTROL


def frame_mac(key: bytes, number: int, header: bytes, payload: ReadBuffer) -> bytes:
    """The 16 bytes behind a header: payload first, because that is twice as fast."""
    return keyed_hash_of_two(key, payload, _pack_number(number) + header)


class FrameSender:
    """Makes the frames of one direction with checks only. They must leave in this order."""

    def __init__(self, established: Established) -> None:
        self._session = established.session
        self._seed = established.send_seed
        self._mac_key = established.send_mac_key
        self._control_seq = 1

    def control(self, message: Message) -> bytes:
        """A whole CONTROL frame."""
        return self.control_of(encode(message))

    def control_of(self, payload: bytes) -> bytes:
        """A whole CONTROL frame of a message that is bytes already."""
        seq = self._control_seq
        self._control_seq = seq + 1
        return encode_control(payload, self._session, seq, self._seed, self._mac_key)

    def encode(
        self, kind: FrameType, flags: int, seq: int, offset: int, aux: int, payload: ReadBuffer
    ) -> bytes:
        """What stands before the payload of any other frame."""
        seed = self._seed
        length = len(payload)
        payload_crc = crc32c(payload, seed) if length else 0
        return encode_header(
            kind, flags, length, self._session, seq, offset, aux, payload_crc, seed
        )


class SealedSender(FrameSender):
    """Makes the frames of one direction with a keyed code on each."""

    def __init__(self, established: Established) -> None:
        super().__init__(established)
        self._frame_key = established.send_frame_key
        self._number = 1

    def control_of(self, payload: bytes) -> bytes:
        """A whole CONTROL frame; its own code stays where it is, at its end."""
        frame = super().control_of(payload)
        body = frame[HEADER_BYTES:]
        return self._sealed(frame[:HEADER_BYTES], body) + body

    def encode(
        self, kind: FrameType, flags: int, seq: int, offset: int, aux: int, payload: ReadBuffer
    ) -> bytes:
        """What stands before the payload of any other frame: header and code."""
        return self._sealed(super().encode(kind, flags, seq, offset, aux, payload), payload)

    def _sealed(self, header: bytes, payload: ReadBuffer) -> bytes:
        number = self._number
        self._number = number + 1
        return header + frame_mac(self._frame_key, number, header, payload)


class SealedReader(FrameReader):
    """The reader of a direction whose frames carry a keyed code.

    A header is believed by its check alone until the payload is there: as far as how many bytes to
    wait for, within the limits of its type. Whoever forges one gains a wait that a deadline ends.
    """

    _before_payload_bytes = HEADER_BYTES + MAC_BYTES

    def __init__(self, established: Established, device_bytes: int | None = None) -> None:
        super().__init__(
            established.session,
            established.receive_seed,
            device_bytes,
            established.receive_mac_key,
        )
        self._frame_key = established.receive_frame_key
        self._number = 1

    def _parse(self) -> list[Frame]:
        frames: list[Frame] = []
        tail = self._tail
        after_control = False
        while True:
            header = self._waiting
            if header is None:
                start = self._head + self._before_payload_bytes
                if start > tail or (after_control and self._is_held_back()):
                    break
                header = self._check_header(self._head)
                self._head = start
            kind, flags, length, seq, offset, aux, payload_crc = header
            end = self._head + length
            if end > tail:
                self._waiting = header
                break
            payload: Any = self._view[self._head : end]
            self._check_mac(kind, payload)
            if kind is _CONTROL:
                after_control = True
                payload = self._check_control(payload, payload_crc, seq)
            elif length:
                self._check_payload(kind, payload, payload_crc)
                self._lent = True
            self._waiting = None
            self._head = end
            frames.append(Frame(kind, flags, seq, offset, aux, payload))
        return frames

    def _check_mac(self, kind: FrameType, payload: memoryview) -> None:
        """Whether this is the frame that the peer sent as this one, by its number."""
        at = self._head
        header = bytes(self._view[at - HEADER_BYTES - MAC_BYTES : at - MAC_BYTES])
        expected = frame_mac(self._frame_key, self._number, header, payload)
        if not hmac.compare_digest(expected, self._view[at - MAC_BYTES : at]):
            raise PeerProtocolError(
                f"{kind.name} frame: its MAC as frame {self._number} does not fit: it was changed, "
                "left out, repeated or moved on the way"
            )
        self._number += 1
