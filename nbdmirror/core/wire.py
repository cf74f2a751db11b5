"""The frames of the peer channel: the header, and the reader that believes nothing unchecked.

Owns the 48-byte header in both forms (a construct schema as the record of the format, a `struct`
twin for the path of every write), the table of what each frame type may carry, and `FrameReader`,
which turns received bytes into frames that were checked once and completely. Must never do I/O,
decide what a frame means, hand out a byte of a frame whose checks failed, or take memory for a
length that was not checked.
"""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Any, Final, NamedTuple, NoReturn, TypeAlias

from construct import Const, Int8ub, Int16ub, Int32ub, Int64ub
from construct import Struct as Schema

from nbdmirror.core.checks import crc32c, keyed_hash
from nbdmirror.core.messages import Message, decode
from nbdmirror.errors import PeerProtocolError
from nbdmirror.limits import (
    CONTROL_BYTES_MAX,
    FRAME_PAYLOAD_BYTES_MAX,
    FRAME_SPAN_BYTES_MAX,
    HASH_BLOCK_BYTES,
    HASH_BYTES,
    KIB,
)

HEADER_MAGIC: Final = 0x4E4D
HEADER_BYTES: Final = 48
HEADER_CHECKED_BYTES: Final = 44
MAC_BYTES: Final = 16
HASH_REPLY_BYTES_MAX: Final = FRAME_SPAN_BYTES_MAX // HASH_BLOCK_BYTES // 8
READ_BYTES_MIN: Final = 64 * KIB
BUFFER_BYTES_MIN: Final = 256 * KIB
BUFFER_BYTES_MAX: Final = (
    2 * (HEADER_BYTES + MAC_BYTES + FRAME_PAYLOAD_BYTES_MAX) + 3 * READ_BYTES_MIN
)
SPARE_BUFFERS_MAX: Final = 3

assert FRAME_SPAN_BYTES_MAX // HASH_BLOCK_BYTES * HASH_BYTES <= FRAME_PAYLOAD_BYTES_MAX

HEADER_SCHEMA: Final = Schema(
    "magic" / Const(HEADER_MAGIC, Int16ub),
    "type" / Int8ub,
    "flags" / Int8ub,
    "length" / Int32ub,
    "session" / Int64ub,
    "seq" / Int64ub,
    "offset" / Int64ub,
    "aux" / Int64ub,
    "payload_crc" / Int32ub,
    "header_crc" / Int32ub,
)
"""The format of record. `HEADER` is its twin; tests hold the two against each other."""

HEADER: Final = Struct(">HBBIQQQQII")
_CHECKED: Final = Struct(">HBBIQQQQI")
_CRC: Final = Struct(">I")

_pack_checked: Final = _CHECKED.pack
_pack_crc: Final = _CRC.pack
_unpack_from: Final = HEADER.unpack_from


class FrameType(IntEnum):
    """What a frame is. 1 to 15 carry data-plane work, 16 to 31 its answers."""

    WRITE = 1
    ZERO = 2
    TRIM = 3
    FLUSH = 4
    RESYNC_DATA = 5
    RESYNC_ZERO = 6
    HASH = 7
    ACK = 16
    FLUSHED = 17
    NACK = 18
    HASH_REPLY = 19
    ECHO_REQUEST = 32
    ECHO_REPLY = 33
    CONTROL = 48


class FrameFlag(IntFlag):
    """Flags of a frame; which type may carry which is in the rules below."""

    FUA = 1
    MAY_TRIM = 2


class _Rule(NamedTuple):
    type: FrameType
    flags_refused: int
    length_min: int
    length_max: int
    sequenced: bool
    aux_used: bool


def _rule(
    type_: FrameType,
    lengths: tuple[int, int] = (0, 0),
    *,
    flags: int = 0,
    sequenced: bool = False,
    aux: bool = False,
) -> tuple[int, _Rule]:
    # Not `~flags`: the inverse of an IntFlag holds its known members only.
    return int(type_), _Rule(type_, 0xFF ^ int(flags), *lengths, sequenced, aux)


_T, _F = FrameType, FrameFlag
_DATA = (1, FRAME_PAYLOAD_BYTES_MAX)
_HASHES = (HASH_BYTES, FRAME_PAYLOAD_BYTES_MAX)

_SESSION_RULES: Final[Mapping[int, _Rule]] = dict(
    (
        _rule(_T.ECHO_REQUEST, aux=True),
        _rule(_T.ECHO_REPLY, aux=True),
        _rule(_T.CONTROL, (1 + MAC_BYTES, CONTROL_BYTES_MAX)),
    )
)
"""What is accepted from the first authenticated byte on. A field without a use must be 0."""

_ANSWER_RULES: Final[Mapping[int, _Rule]] = {
    **_SESSION_RULES,
    **dict(
        (
            _rule(_T.ACK),
            _rule(_T.FLUSHED),
            _rule(_T.NACK, aux=True),
            _rule(_T.HASH_REPLY, (1, HASH_REPLY_BYTES_MAX)),
        )
    ),
}
"""What is accepted by a node that sends data frames, once it said so with `expect_answers`."""

_DATA_RULES: Final[Mapping[int, _Rule]] = {
    **_ANSWER_RULES,
    **dict(
        (
            _rule(_T.WRITE, _DATA, sequenced=True, flags=_F.FUA),
            _rule(_T.ZERO, sequenced=True, flags=_F.FUA | _F.MAY_TRIM, aux=True),
            _rule(_T.TRIM, sequenced=True, flags=_F.FUA, aux=True),
            _rule(_T.FLUSH, sequenced=True, aux=True),
            _rule(_T.RESYNC_DATA, _DATA, sequenced=True),
            _rule(_T.RESYNC_ZERO, sequenced=True, flags=_F.MAY_TRIM, aux=True),
            _rule(_T.HASH, _HASHES, sequenced=True, aux=True),
        )
    ),
}
"""What is accepted once `expect` named the first data sequence."""

_SPANNED: Final = frozenset({_T.ZERO, _T.TRIM, _T.RESYNC_ZERO, _T.HASH})
"""Frames whose range is `aux` bytes long and not as long as their payload."""

_Header: TypeAlias = tuple[FrameType, int, int, int, int, int, int]
"""A checked header: type, flags, length, seq, offset, aux, payload check."""


@dataclass(slots=True)
class Frame:
    """One checked frame.

    `payload` of CONTROL is the decoded Message. Of all others it is a memoryview into the reader's
    buffer: keep it as long as needed (the reader does not write there while it exists), drop it
    soon (it keeps the whole buffer alive).
    """

    type: FrameType
    flags: int
    seq: int
    offset: int
    aux: int
    payload: Any


_NO_PAYLOAD: Final = memoryview(b"")
_CONTROL: Final = FrameType.CONTROL
_TYPE_AT: Final = 2


def encode_header(  # noqa: PLR0913, PLR0917 - the fields of the header, in their order
    type_: int,
    flags: int,
    length: int,
    session: int,
    seq: int,
    offset: int,
    aux: int,
    payload_crc: int,
    seed: int,
) -> bytes:
    """The 48 bytes of a header.

    `payload_crc` is crc32c(payload, seed), or 0 without a payload; `seed` is that of this session
    and direction. Raises struct.error when a value does not fit its field: a bug of the caller.
    """
    head = _pack_checked(HEADER_MAGIC, type_, flags, length, session, seq, offset, aux, payload_crc)
    return head + _pack_crc(crc32c(head, seed))


def encode_control(message_bytes: bytes, session: int, seq: int, seed: int, key: bytes) -> bytes:
    """A whole CONTROL frame: header, message, MAC.

    The payload check covers the message alone: it is part of the header that the MAC covers, so it
    cannot cover the MAC.
    """
    header = encode_header(
        FrameType.CONTROL,
        0,
        len(message_bytes) + MAC_BYTES,
        session,
        seq,
        0,
        0,
        crc32c(message_bytes, seed),
        seed,
    )
    return header + message_bytes + control_mac(key, header, message_bytes)


def control_mac(key: bytes, header: bytes, message_bytes: bytes) -> bytes:
    """The 16 bytes that end a CONTROL frame: keyed hash of checked header bytes and message."""
    return keyed_hash(key, header[:HEADER_CHECKED_BYTES] + message_bytes)


def hash_blocks_count(span: int) -> int:
    """How many hashes a HASH frame over `span` bytes carries; the last block may be short."""
    return -(-span // HASH_BLOCK_BYTES)


class FrameReader:
    """Received bytes in, checked frames out, for one direction of one session.

    Use: read into `buffer_for_read()`, tell `received(count)`, take `frames()`, again and again.
    Payloads are not copied. The first violation kills the reader: it raises then and at every later
    call. Good frames before the bad one in the same call are dropped with it; none of them was
    answered, so the peer takes none of them for done.
    """

    _before_payload_bytes = HEADER_BYTES

    def __init__(
        self, session: int, seed: int, device_bytes: int | None, control_key: bytes
    ) -> None:
        self._session = session
        self._seed = seed
        self._device_bytes = device_bytes or 0
        self._control_key = control_key
        self._rules = _SESSION_RULES
        self._next_seq = 0
        self._next_control_seq = 1
        self._failure: str | None = None
        self._waiting: _Header | None = None
        self._buffer_bytes = BUFFER_BYTES_MIN
        self._spares: list[bytearray] = []
        self._buffer = bytearray(self._buffer_bytes)
        self._view = memoryview(self._buffer)
        self._lent = False
        self._head = 0
        self._tail = 0

    def expect(self, seq: int, device_bytes: int | None = None) -> None:
        """From now on data-plane frames are accepted, the first one with sequence number `seq`.

        Call it again when the direction of the data changes inside the session. Then call
        `frames()`: data frames right behind the message that led here were held back for it.
        """
        if device_bytes is not None:
            self._device_bytes = device_bytes
        self._next_seq = seq
        self._rules = _DATA_RULES

    def expect_answers(self) -> None:
        """From now on ACK, FLUSHED, NACK and HASH_REPLY are accepted; data frames as before."""
        if self._rules is _SESSION_RULES:
            self._rules = _ANSWER_RULES

    # --- buffer -----------------------------------------------------------------------------

    def buffer_for_read(self) -> memoryview:
        """Where the next bytes go: at least 64 KiB, valid until the next call of this reader."""
        self._raise_if_dead()
        needed = READ_BYTES_MIN
        if self._waiting is not None:
            needed = max(needed, self._head + self._waiting[2] - self._tail)
        if len(self._buffer) - self._tail < needed:
            self._make_room(needed)
        return self._view[self._tail :]

    def received(self, count: int) -> None:
        """`count` bytes were put at the start of what `buffer_for_read` returned."""
        self._raise_if_dead()
        assert 0 <= count <= len(self._buffer) - self._tail, f"{count} bytes were never asked for"
        self._tail += count

    def _make_room(self, needed: int) -> None:
        """Move the unparsed bytes to the front: of this buffer if no payload points into it."""
        # A MAC covers the header, too, which was read before the payload was there.
        kept = self._before_payload_bytes if self._waiting is not None else 0
        unparsed = self._view[self._head - kept : self._tail]
        carried = len(unparsed)
        if self._lent or len(self._buffer) < carried + needed:
            # Room for two such frames and a short read: then a frame is moved only when little of
            # it is there.
            wanted = 2 * (carried + needed) + READ_BYTES_MIN
            self._buffer_bytes = max(self._buffer_bytes, wanted)
            assert self._buffer_bytes <= BUFFER_BYTES_MAX, "received() without frames()"
            self._spares.append(self._buffer)
            del self._spares[:-SPARE_BUFFERS_MAX]
            self._buffer = self._take_spare() or bytearray(self._buffer_bytes)
            self._view = memoryview(self._buffer)
            self._view[:carried] = unparsed
            self._lent = False
        else:
            self._view[:carried] = bytes(unparsed)
        self._head, self._tail = kept, carried

    def _take_spare(self) -> bytearray | None:
        """An earlier buffer of this size that no payload points into any more.

        Used again it saves the page faults of fresh memory, a good part of what large writes cost.
        """
        for index, buffer in enumerate(self._spares):
            if len(buffer) == self._buffer_bytes and _is_unreferenced(buffer):
                return self._spares.pop(index)
        return None

    # --- frames -----------------------------------------------------------------------------

    def frames(self) -> list[Frame]:
        """Every frame that is complete by now, in order, each checked once.

        Raises:
            PeerProtocolError: the first violation, with field and value. A header that is wrong is
                refused before its payload is waited for.
        """
        self._raise_if_dead()
        try:
            return self._parse()
        except PeerProtocolError as error:
            self._failure = str(error)
            raise

    def _raise_if_dead(self) -> None:
        if self._failure is not None:
            raise PeerProtocolError(f"the session ended with: {self._failure}")

    def _parse(self) -> list[Frame]:
        frames: list[Frame] = []
        tail = self._tail
        after_control = False
        while True:
            header = self._waiting
            if header is None:
                start = self._head + HEADER_BYTES
                if start > tail or (after_control and self._is_held_back()):
                    break
                header = self._check_header(self._head)
                self._head = start
            kind, flags, length, seq, offset, aux, payload_crc = header
            if not length:
                frames.append(Frame(kind, flags, seq, offset, aux, _NO_PAYLOAD))
                continue
            end = self._head + length
            if end > tail:
                self._waiting = header
                break
            payload: Any = self._view[self._head : end]
            if kind is _CONTROL:
                after_control = True
                payload = self._check_control(payload, payload_crc, seq)
            else:
                self._check_payload(kind, payload, payload_crc)
                self._lent = True
            self._waiting = None
            self._head = end
            frames.append(Frame(kind, flags, seq, offset, aux, payload))
        return frames

    def _is_held_back(self) -> bool:
        """Whether a frame behind a message waits for the next call: its type is not accepted yet.

        A peer may send the message that opens the data plane and the first data frame in one go;
        the caller has to see the first before the second can be judged.
        """
        kind = self._view[self._head + _TYPE_AT]
        return kind in _DATA_RULES and kind not in self._rules

    def _check_header(self, at: int) -> _Header:
        view = self._view
        magic, number, flags, length, session, seq, offset, aux, payload_crc, crc = _unpack_from(
            view, at
        )
        if crc != crc32c(view[at : at + HEADER_CHECKED_BYTES], self._seed):
            # Nothing of it is believed, so nothing of it is told either.
            raise PeerProtocolError(f"header check {crc:#010x} does not fit the header")
        rule = self._rules.get(number)
        if rule is None or magic != HEADER_MAGIC or session != self._session:
            self._refuse_foreign(magic, number, session)
        kind, flags_refused, length_min, length_max, sequenced, aux_used = rule
        if flags & flags_refused:
            _refuse(kind, "flags", f"{flags:#04x}")
        if not length_min <= length <= length_max:
            _refuse(kind, "length", f"{length}, allowed {length_min} to {length_max}")
        if payload_crc and not length:
            _refuse(kind, "payload check", f"{payload_crc:#010x} without a payload")
        if aux and not aux_used:
            _refuse(kind, "aux", f"{aux}, not 0")
        if sequenced:
            self._check_sequenced(kind, length, seq, offset, aux)
        elif offset:
            _refuse(kind, "offset", f"{offset}, not 0")
        return kind, flags, length, seq, offset, aux, payload_crc

    def _refuse_foreign(self, magic: int, number: int, session: int) -> NoReturn:
        if magic != HEADER_MAGIC:
            raise PeerProtocolError(f"frame magic {magic:#06x}, not {HEADER_MAGIC:#06x}")
        if number in _DATA_RULES and number not in self._rules:
            _refuse(FrameType(number), "type", f"{number} before the data plane was opened")
        if number not in _DATA_RULES:
            raise PeerProtocolError(f"frame type {number} is not known")
        _refuse(FrameType(number), "session", f"{session:016x}, not {self._session:016x}")

    def _check_sequenced(
        self, kind: FrameType, length: int, seq: int, offset: int, aux: int
    ) -> None:
        """A data-plane frame: the next one, and inside the device."""
        if seq != self._next_seq:
            _refuse(kind, "seq", f"{seq}, not {self._next_seq}")
        self._next_seq = seq + 1
        if kind is FrameType.FLUSH:
            if offset:
                _refuse(kind, "offset", f"{offset}, not 0")
            return
        end = offset + length
        if kind in _SPANNED:
            if not 1 <= aux <= FRAME_SPAN_BYTES_MAX:
                _refuse(kind, "aux", f"{aux} bytes of span, allowed 1 to {FRAME_SPAN_BYTES_MAX}")
            if kind is FrameType.HASH and length != hash_blocks_count(aux) * HASH_BYTES:
                _refuse(kind, "length", f"{length}, wrong for a span of {aux} bytes")
            end = offset + aux
        if end > self._device_bytes:
            _refuse(kind, "offset", f"{offset}, which ends outside {self._device_bytes} bytes")

    def _check_payload(self, kind: FrameType, payload: memoryview, payload_crc: int) -> None:
        actual = crc32c(payload, self._seed)
        if actual != payload_crc:
            _refuse(kind, "payload check", f"{payload_crc:#010x}, the payload has {actual:#010x}")

    def _check_control(self, payload: memoryview, payload_crc: int, seq: int) -> Message:
        """MAC first, then sequence, then content; returns the message."""
        message_bytes = bytes(payload[:-MAC_BYTES])
        at = self._head - self._before_payload_bytes
        header = bytes(self._view[at : at + HEADER_BYTES])
        if not hmac.compare_digest(
            control_mac(self._control_key, header, message_bytes), bytes(payload[-MAC_BYTES:])
        ):
            _refuse(_CONTROL, "MAC", "does not fit header and message")
        self._check_payload(_CONTROL, memoryview(message_bytes), payload_crc)
        if seq != self._next_control_seq:
            _refuse(_CONTROL, "seq", f"{seq}, not {self._next_control_seq}")
        self._next_control_seq = seq + 1
        return decode(message_bytes)


def _refuse(kind: FrameType, field: str, problem: str) -> NoReturn:
    raise PeerProtocolError(f"{kind.name} frame: {field} {problem}")


def _is_unreferenced(buffer: bytearray) -> bool:
    """Whether no view of the buffer exists: Python refuses to resize it while there is one."""
    try:
        last = buffer.pop()
    except BufferError:
        return False
    buffer.append(last)
    return True
