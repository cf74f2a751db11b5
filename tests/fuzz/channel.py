"""Parsers of the peer channel: messages, frames, handshake.

Owns their seeds, their seals and what has to hold of an accepted input. The checks of an accepted
frame are written anew from docs/wire-protocol.md, not taken from the reader.
"""

import hmac
from collections.abc import Sequence
from random import Random
from typing import Final

from nbdmirror.core import handshake as hs
from nbdmirror.core.checks import crc32c
from nbdmirror.core.handshake import Handshake, Identity
from nbdmirror.core.messages import (
    Bye,
    CaughtUp,
    Failed,
    JointTake,
    JointTaken,
    LeaveAnswer,
    LeaveAsk,
    Left,
    MapEnd,
    MapPage,
    Message,
    Relay,
    Role,
    SourceBegin,
    Stable,
    State,
    TargetReady,
    UnionStored,
    Verdict,
    decode,
    encode,
)  # fmt: skip
from nbdmirror.core.superblock import ArbiterKind, DataState, Flags, PendingKind
from nbdmirror.core.wire import (
    BUFFER_BYTES_MAX,
    HEADER,
    HEADER_BYTES,
    MAC_BYTES,
    Frame,
    FrameReader,
    FrameType,
    control_mac,
    encode_control,
    encode_header,
)  # fmt: skip
from nbdmirror.errors import AuthenticationError, PeerProtocolError, PeerRefusedError
from nbdmirror.limits import (
    FRAME_PAYLOAD_BYTES_MAX,
    FRAME_SPAN_BYTES_MAX,
    HASH_BLOCK_BYTES,
    MAP_PAGE_PAYLOAD_BYTES,
    MIB,
)  # fmt: skip
from tests.fuzz.mutate import by_fields, changed_bytes
from tests.fuzz.parser import Parser

SESSION: Final = 0x1122_3344_5566_7788
SEED: Final = 0xCAFE_F00D
KEY: Final = bytes(range(32))
DEVICE_BYTES: Final = 8 * MIB
FIRST_SEQ: Final = 41
LENGTH_AT: Final = 4
HEADER_FIELDS: Final = (
    *((0, 2), (2, 1), (3, 1), (4, 4), (8, 8), (16, 8), (24, 8), (32, 8), (40, 4), (44, 4)),
)
STATE: Final = State(
    device_bytes=2**40, extent_bytes=4096, region_bytes=2**22, generation=b"g" * 16,
    base=(b"b" * 16,), pending=b"p" * 16, pending_kind=PendingKind.JOINT,
    history=(b"h" * 16, b"i" * 16), data_state=DataState.OUTDATED, flags=Flags.CLEAN,
    primary_now=True, cache_survived=False, fell_back=True, own_txn=5, peer_txn=6, dirty_count=7,
    arbiter=ArbiterKind.S3, arbiter_identity=b"a" * 32, arbiter_counter=8, ack_timeout_ms=2000,
    read_lease_ms=1000, term=9, trim_ok=True, fast_zero_ok=False, resume_session=10,
    resume_applied=11, peer_instance=b"e" * 16, claim_unsettled=True, forced_over=b"f" * 16,
)  # fmt: skip
MESSAGES: Final[tuple[Message, ...]] = (
    STATE,
    Verdict(decision=3, text="why"),
    MapPage(index=1, payload=bytes(MAP_PAGE_PAYLOAD_BYTES)),
    MapEnd(pages=2, full=True),
    UnionStored(first_seq=3),
    TargetReady(),
    JointTake(generation=b"g" * 16, last_seq=4),
    JointTaken(generation=b"g" * 16),
    LeaveAsk(generation=b"g" * 16),
    LeaveAnswer(stay=True, generation=b"g" * 16, reason="because"),
    Left(mirror_id=b"m" * 16, generation=b"g" * 16, leaver=1, stayer=2, session=5),
    Role(primary=True, term=6),
    Bye(reason="bye"),
    Stable(seq=7),
    Failed(where="pwrite", errno=5),
    SourceBegin(first_seq=8, resume=True),
    CaughtUp(seq=9),
    Relay(attended=True, payload=b"from one"),
)


# --- messages ----------------------------------------------------------------------------------


def feed_message(data: bytes) -> bool:
    """What is accepted goes out again and comes back as the same."""
    message = decode(data)
    assert decode(encode(message)) == message
    return True


# --- frames ------------------------------------------------------------------------------------


def frame(kind: int, seq: int, payload: bytes = b"", *, offset: int = 0, aux: int = 0) -> bytes:
    """A frame as it should be."""
    crc = crc32c(payload, SEED) if payload else 0
    length = len(payload)
    return encode_header(kind, 0, length, SESSION, seq, offset, aux, crc, SEED) + payload


def control(seq: int, message: Message) -> bytes:
    """A message in its frame."""
    return encode_control(encode(message), SESSION, seq, SEED, KEY)


def wire_seeds() -> Sequence[bytes]:
    """Streams for each of the three sets of rules; the first byte says which, and how chopped."""
    types, hashes = FrameType, bytes(range(48))
    data = b"".join(
        (
            frame(types.WRITE, 41, b"some data", offset=4096),
            frame(types.ZERO, 42, offset=MIB, aux=DEVICE_BYTES - MIB),
            frame(types.TRIM, 43, aux=1),
            frame(types.FLUSH, 44, aux=40),
            frame(types.RESYNC_DATA, 45, b"x" * 700, offset=DEVICE_BYTES - 700),
            frame(types.RESYNC_ZERO, 46, offset=5, aux=6),
            frame(types.HASH, 47, hashes, offset=512, aux=2 * HASH_BLOCK_BYTES + 1),
        )
    )
    answers = b"".join(
        (
            frame(types.ACK, 7),
            frame(types.FLUSHED, 8),
            frame(types.NACK, 9, aux=5),
            frame(types.HASH_REPLY, 10, b"\x05"),
            frame(types.ECHO_REQUEST, 11, aux=3),
            frame(types.ECHO_REPLY, 12, aux=3),
        )
    )
    messages = b"".join(
        control(n, m) for n, m in enumerate(MESSAGES, 1) if not isinstance(m, MapPage)
    )
    return [
        *(bytes((mode,)) + each for mode in (0, 1, 2, 0x56) for each in (data, answers, messages)),
        b"\x02" + control(1, SourceBegin(first_seq=8, resume=True)) + data,
    ]


def frame_starts(stream: bytes, at: int = 1) -> list[int]:
    """Where headers are, by the lengths that they name."""
    starts = []
    while at + HEADER_BYTES <= len(stream):
        starts.append(at)
        at += HEADER_BYTES + int.from_bytes(stream[at + LENGTH_AT : at + LENGTH_AT + 4], "big")
    return starts


def sealed_stream(data: bytes) -> bytes:
    """Checks and MACs of a whole stream, made to fit whatever its headers say."""
    work = bytearray(data)
    for at in frame_starts(data):
        length = int.from_bytes(work[at + LENGTH_AT : at + LENGTH_AT + 4], "big")
        start, end = at + HEADER_BYTES, min(at + HEADER_BYTES + length, len(work))
        is_control = work[at + 2] == FrameType.CONTROL and end - start >= MAC_BYTES
        checked = end - MAC_BYTES if is_control else end
        crc = crc32c(bytes(work[start:checked]), SEED) if length else 0
        work[at + 40 : at + 44] = crc.to_bytes(4, "big")
        header = bytes(work[at : at + 44])
        work[at + 44 : at + 48] = crc32c(header, SEED).to_bytes(4, "big")
        if is_control:
            work[checked:end] = control_mac(KEY, header, bytes(work[start:checked]))
    return bytes(work)


def changed_stream(rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
    """A field of a header, a whole frame left out, twice, elsewhere; or any byte."""
    starts = frame_starts(data)
    if not starts or rng.random() < 0.25:
        return changed_bytes(rng, data, pool)
    which = rng.randrange(len(starts))
    at = starts[which]
    end = starts[which + 1] if which + 1 < len(starts) else len(data)
    what = rng.randrange(5)
    if what == 0:
        return data[:at] + data[end:]
    if what == 1:
        return data[:end] + data[at:end] + data[end:]
    if what == 2:
        other = rng.choice(pool)
        begins = frame_starts(other)
        return data[:at] + (other[rng.choice(begins) :] if begins else b"")
    offset, size = rng.choice(HEADER_FIELDS)
    return changed_header(rng, data, at + offset, size)


def changed_header(rng: Random, data: bytes, at: int, size: int) -> bytes:
    """One field: a value that means something, one more, one less, or any."""
    old = int.from_bytes(data[at : at + size], "big")
    device = (DEVICE_BYTES, DEVICE_BYTES - 1, DEVICE_BYTES + 1, FIRST_SEQ)
    bounds = (FRAME_PAYLOAD_BYTES_MAX, FRAME_SPAN_BYTES_MAX, 64 << 10, (1 << 64) - 1)
    new = rng.choice((old + 1, old - 1, *device, *bounds, 0, 1, 2, 3, 16, 48, rng.getrandbits(64)))
    return data[:at] + (new % (1 << 8 * size)).to_bytes(size, "big") + data[at + size :]


def feed_stream(data: bytes) -> bool:
    """Frames come out checked, in order, inside the device; after a refusal nothing does."""
    mode = data[0] if data else 0
    reader = FrameReader(SESSION, SEED, DEVICE_BYTES, KEY)
    if mode & 3 == 1:
        reader.expect_answers()
    elif mode & 3 > 1:
        reader.expect(FIRST_SEQ)
    chop = Random(mode >> 2)
    at, seq = 1, FIRST_SEQ
    try:
        while at < len(data):
            view = reader.buffer_for_read()
            assert len(view) <= BUFFER_BYTES_MAX
            piece = data[at : at + min(len(view), chop.choice((1 << 20, 7, 100, 48)))]
            view[: len(piece)] = piece
            reader.received(len(piece))
            at += len(piece)
            frames = reader.frames()
            while frames:
                for each in frames:
                    seq = judge(each, seq, opened=mode & 3 > 1)
                frames = reader.frames()
    except PeerProtocolError:
        for call in (reader.frames, reader.buffer_for_read):
            try:
                call()
            except PeerProtocolError:
                continue
            raise AssertionError("a reader went on after a violation") from None
        return False
    return True


def judge(each: Frame, seq: int, *, opened: bool) -> int:
    """One frame, by the words of docs/wire-protocol.md; returns the next number."""
    if not 1 <= each.type <= 15:
        assert not each.offset
        return seq
    assert opened, "a data frame before the data plane was open"
    assert each.seq == seq, "a data frame out of order"
    if each.type is not FrameType.FLUSH:
        spanned = each.type not in (FrameType.WRITE, FrameType.RESYNC_DATA)
        span = each.aux if spanned else len(each.payload)
        assert 1 <= span <= FRAME_SPAN_BYTES_MAX
        assert each.offset + span <= DEVICE_BYTES, "a frame that ends outside the device"
    return seq + 1


# --- handshake ---------------------------------------------------------------------------------

ME: Final = Identity(b"m" * 16, 1, b"u" * 16, b"i" * 16)
PEER: Final = Identity(b"m" * 16, 2, b"v" * 16, b"j" * 16)
PSK: Final = bytes(range(100, 132))


def ends() -> tuple[Handshake, Handshake]:
    """The dialer and the listener, with nonces that never change."""
    return (
        Handshake(True, PSK, PEER, b"d" * 32, features=3),
        Handshake(False, PSK, ME, b"l" * 32, features=1),
    )


def handshake_seeds() -> Sequence[bytes]:
    """For each side what the other one says; the first byte says who hears it."""
    dialer, listener = ends()
    hello = dialer.start()
    reply = listener.receive(hello)
    confirm = dialer.receive(reply)
    refusal = hs.encode_refusal(hs.RefusalCode.VERSION, "no")
    return [
        b"\x00" + hello + confirm, b"\x00" + hello, b"\x00" + refusal,
        b"\x01" + reply, b"\x01" + reply + b"frames follow", b"\x01" + refusal,
    ]  # fmt: skip


def sealed_handshake(data: bytes) -> bytes:
    """The proofs of the side that speaks, over what it says now."""
    dialer, listener = ends()
    if not data:
        return data
    if data[0] & 1:
        hello = dialer.start()
        body = 2 + int.from_bytes(data[1:3], "big")
        said, rest = data[1 : 1 + body], data[1 + body :]
        if len(said) <= hs.MAC_BYTES:
            return data
        unproven = said[: -hs.MAC_BYTES]
        return data[:1] + unproven + listener._proof(b"listener", hello + unproven) + rest
    body = 2 + int.from_bytes(data[1:3], "big")
    hello, rest = data[1 : 1 + body], data[1 + body :]
    try:
        reply = listener.receive(hello)
    except PeerProtocolError:
        return data
    if not reply or len(rest) < hs.PREFIX_BYTES + hs.MAC_BYTES:
        return data
    proof = listener._proof(b"dialer", hello + reply)
    end = hs.PREFIX_BYTES + hs.MAC_BYTES
    return data[:1] + hello + rest[: hs.PREFIX_BYTES] + proof + rest[end:]


def feed_handshake(data: bytes) -> bool:
    """Nothing is agreed on with an end that did not prove the key."""
    side = data[0] if data else 0
    dialer, listener = ends()
    end = dialer if side & 1 else listener
    end.start()
    at, chop = 1, Random(side >> 1)
    try:
        while at < len(data) and end.done is None:
            piece = data[at : at + chop.choice((1 << 12, 3, 1))]
            end.receive(piece)
            at += len(piece)
    except PeerProtocolError:
        assert end.done is None, "agreed with somebody who was refused"
        assert len(end.refusal) < 2048
        return False
    if end.done is not None:
        assert end.done.session, "a session without a number"
        assert end.done.peer.node_id not in (0, ME.node_id if end is listener else PEER.node_id)
        key = end.done.receive_mac_key
        assert not hmac.compare_digest(key, end.done.send_mac_key), "one key for both directions"
    return end.done is not None


PARSERS: Final = (
    Parser(
        "messages", lambda: [encode(m) for m in MESSAGES], feed_message, (PeerProtocolError,),
        mutate=by_fields([(n, s) for n in (*range(40), 57, 58, 73) for s in (1, 2, 4, 8)]),
        weight=3,
    ),
    Parser(
        "frames", wire_seeds, feed_stream, (PeerProtocolError,), sealed_stream, changed_stream,
        weight=4,
    ),
    Parser(
        "handshake", handshake_seeds, feed_handshake,
        (PeerProtocolError, AuthenticationError, PeerRefusedError), sealed_handshake,
        by_fields([(1, 2), (3, 1), (4, 8), (12, 2), (14, 2), (16, 1), (17, 16), (33, 1), (34, 16),
                   (50, 16), (66, 32), (98, 8), (106, 32)]), weight=2,
    ),
)  # fmt: skip

assert HEADER.size == HEADER_BYTES
