"""Frames: both forms of the header agree, and the reader believes nothing it has not checked."""

import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.core.checks import crc32c_reference
from nbdmirror.core.messages import Bye, CaughtUp, SourceBegin, encode
from nbdmirror.core.wire import (
    BUFFER_BYTES_MAX,
    HEADER,
    HEADER_BYTES,
    HEADER_SCHEMA,
    Frame,
    FrameReader,
    FrameType,
    encode_control,
    encode_header,
)
from nbdmirror.errors import PeerProtocolError
from nbdmirror.limits import (
    CONTROL_BYTES_MAX,
    FRAME_PAYLOAD_BYTES_MAX,
    FRAME_SPAN_BYTES_MAX,
    HASH_BLOCK_BYTES,
    KIB,
    MIB,
)

SESSION = 0x1122_3344_5566_7788
SEED = 0xCAFE_F00D
KEY = bytes(range(32))
DEVICE_BYTES = 8 * MIB
FIRST_SEQ = 41

T = FrameType
u8, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 32, 64))


def frame(kind: int, seq: int, payload: bytes = b"", **fields: Any) -> bytes:
    """A frame by the rules of the format, made with the reference CRC; `fields` break rules."""
    values = {
        "flags": 0,
        "length": len(payload),
        "session": SESSION,
        "offset": 0,
        "aux": 0,
        "payload_crc": crc32c_reference(payload, SEED) if payload else 0,
        "seed": SEED,
    } | fields
    head = HEADER.pack(
        values.get("magic", 0x4E4D),
        kind,
        values["flags"],
        values["length"],
        values["session"],
        seq,
        values["offset"],
        values["aux"],
        values["payload_crc"],
        0,
    )[:44]
    return head + crc32c_reference(head, values["seed"]).to_bytes(4, "big") + payload


def control(seq: int, reason: str = "so long", **changes: Any) -> bytes:
    values: dict[str, Any] = {"session": SESSION, "seed": SEED, "key": KEY} | changes
    return encode_control(encode(Bye(reason=reason)), seq=seq, **values)


def reader(*, opened: bool = True) -> FrameReader:
    made = FrameReader(SESSION, SEED, DEVICE_BYTES, KEY)
    if opened:
        made.expect(FIRST_SEQ)
    return made


def put(into: FrameReader, data: bytes) -> None:
    into.buffer_for_read()[: len(data)] = data
    into.received(len(data))


def feed(into: FrameReader, pieces: Iterable[bytes]) -> list[Frame]:
    """All frames of a stream that arrives in these pieces."""
    frames = []
    for piece in pieces:
        rest = piece
        while True:
            count = min(len(rest), len(into.buffer_for_read()))
            put(into, rest[:count])
            frames += into.frames()
            rest = rest[count:]
            if not rest:
                break
    return frames


def refusal(data: bytes, *, opened: bool = True) -> str:
    with pytest.raises(PeerProtocolError) as caught:
        feed(reader(opened=opened), [data])
    return str(caught.value)


HASHES = bytes(range(48))
EVERY_TYPE = b"".join(
    (
        control(1),
        frame(T.WRITE, 41, b"some data", offset=4096, flags=1),
        frame(T.ZERO, 42, offset=MIB, aux=DEVICE_BYTES - MIB, flags=3),
        frame(T.TRIM, 43, aux=1, flags=1),
        frame(T.FLUSH, 44, aux=40),
        frame(T.ACK, 7),
        frame(T.RESYNC_DATA, 45, b"x" * 700, offset=DEVICE_BYTES - 700),
        frame(T.RESYNC_ZERO, 46, offset=5, aux=6, flags=2),
        frame(T.HASH, 47, HASHES, offset=512, aux=2 * HASH_BLOCK_BYTES + 1),
        frame(T.FLUSHED, 8),
        frame(T.NACK, 9, aux=28),
        frame(T.HASH_REPLY, 10, b"\xe0"),
        frame(T.ECHO_REQUEST, 2, aux=99),
        control(2, "and thanks"),
        frame(T.ECHO_REPLY, 3, aux=98),
    )
)


@given(
    type_=u8, flags=u8, length=u32, session=u64, seq=u64, offset=u64, aux=u64, payload_crc=u32,
    seed=u32,
)  # fmt: skip
def test_the_twin_of_the_header_agrees_with_its_schema(**fields: int) -> None:
    """Breaks in the field: the fast path speaks another format than the documented one."""
    made = encode_header(**fields)
    seed = fields.pop("seed")
    checked = {"type" if name == "type_" else name: value for name, value in fields.items()}
    header_crc = crc32c_reference(made[:44], seed)
    assert made == HEADER_SCHEMA.build({**checked, "header_crc": header_crc})
    parsed = HEADER_SCHEMA.parse(made)
    assert HEADER.unpack(made) == tuple(parsed[sub.name] for sub in HEADER_SCHEMA.subcons)
    assert {name: parsed[name] for name in checked} == checked


def test_a_known_header_keeps_its_bytes() -> None:
    """Breaks in the field: two builds with the same version number do not understand each other."""
    made = encode_header(T.WRITE, 1, 4096, 0x0102030405060708, 9, 0xA000, 0, 0x0B0C0D0E, 0)
    assert made[:44].hex() == (
        "4e4d01010000100001020304050607080000000000000009000000000000a00000000000000000000b0c0d0e"
    )
    assert int.from_bytes(made[44:], "big") == crc32c_reference(made[:44])
    assert HEADER_SCHEMA.sizeof() == HEADER.size == HEADER_BYTES


def test_every_type_arrives_as_it_was_sent() -> None:
    """Breaks in the field: a request is carried out with another range, flag or payload."""
    frames = feed(reader(), [EVERY_TYPE])
    assert [(f.type, f.flags, f.seq, f.offset, f.aux) for f in frames] == [
        (T.CONTROL, 0, 1, 0, 0),
        (T.WRITE, 1, 41, 4096, 0),
        (T.ZERO, 3, 42, MIB, DEVICE_BYTES - MIB),
        (T.TRIM, 1, 43, 0, 1),
        (T.FLUSH, 0, 44, 0, 40),
        (T.ACK, 0, 7, 0, 0),
        (T.RESYNC_DATA, 0, 45, DEVICE_BYTES - 700, 0),
        (T.RESYNC_ZERO, 2, 46, 5, 6),
        (T.HASH, 0, 47, 512, 2 * HASH_BLOCK_BYTES + 1),
        (T.FLUSHED, 0, 8, 0, 0),
        (T.NACK, 0, 9, 0, 28),
        (T.HASH_REPLY, 0, 10, 0, 0),
        (T.ECHO_REQUEST, 0, 2, 0, 99),
        (T.CONTROL, 0, 2, 0, 0),
        (T.ECHO_REPLY, 0, 3, 0, 98),
    ]
    payloads = {index: f.payload for index, f in enumerate(frames) if len_of(f.payload)}
    assert payloads == {
        0: Bye(reason="so long"), 1: b"some data", 6: b"x" * 700, 8: HASHES, 11: b"\xe0",
        13: Bye(reason="and thanks"),
    }  # fmt: skip


def len_of(payload: Any) -> int:
    return len(payload) if isinstance(payload, memoryview) else 1


def test_every_split_in_two_gives_the_same_frames() -> None:
    """Breaks in the field: a frame is lost or mangled where TCP happened to cut."""
    whole = feed(reader(), [EVERY_TYPE])
    for at in range(len(EVERY_TYPE) + 1):
        assert feed(reader(), [EVERY_TYPE[:at], EVERY_TYPE[at:]]) == whole


def test_byte_by_byte_gives_the_same_frames() -> None:
    """Breaks in the field: a slow link ends every session."""
    pieces = [EVERY_TYPE[at : at + 1] for at in range(len(EVERY_TYPE))]
    assert feed(reader(), pieces) == feed(reader(), [EVERY_TYPE])


@given(
    sizes=st.lists(st.integers(1, 300_000), min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 400_000), max_size=30),
)
def test_any_chunking_of_any_writes_gives_their_bytes(sizes: list[int], cuts: list[int]) -> None:
    """Breaks in the field: a payload is overwritten while the disk still reads it."""
    payloads = [bytes((index + 1,)) * size for index, size in enumerate(sizes)]
    stream = b"".join(frame(T.WRITE, FIRST_SEQ + i, p) for i, p in enumerate(payloads))
    pieces = []
    for cut in cuts:
        pieces.append(stream[:cut])
        stream = stream[cut:]
    # All frames are kept until the end: none may share bytes with a later one.
    frames = feed(reader(), [*pieces, stream])
    assert [f.payload for f in frames] == payloads
    assert [f.seq for f in frames] == list(range(FIRST_SEQ, FIRST_SEQ + len(sizes)))


@pytest.mark.parametrize(
    "sent",
    [frame(T.WRITE, 41, b"0123456789abcdef", offset=8192), frame(T.ACK, 5), control(1)],
    ids=["write", "ack", "control"],
)
def test_no_flipped_bit_passes(sent: bytes) -> None:
    """Breaks in the field: a bit error on the way is written to the secondary's disk."""
    for bit in range(len(sent) * 8):
        flipped = bytearray(sent)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PeerProtocolError):
            feed(reader(), [bytes(flipped)])


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (frame(T.WRITE, 41, b"x", magic=0x4E4E), "magic 0x4e4e"),
        (frame(9, 41), "type 9 is not known"),
        (frame(0, 41), "type 0 is not known"),
        (frame(T.WRITE, 41, b"x", session=SESSION + 1), "session 1122334455667789"),
        (frame(T.WRITE, 41, b"x", seed=SEED + 1), "header check"),
        (frame(T.WRITE, 41, b"x", payload_crc=5), "payload check 0x00000005"),
        (frame(T.ACK, 1, payload_crc=5), "payload check 0x00000005"),
        (frame(T.WRITE, 41, b"x", flags=2), "WRITE frame: flags 0x02"),
        (frame(T.WRITE, 41, b"x", flags=4), "WRITE frame: flags 0x04"),
        (frame(T.ZERO, 41, aux=1, flags=0x80), "ZERO frame: flags 0x80"),
        (frame(T.TRIM, 41, aux=1, flags=2), "TRIM frame: flags 0x02"),
        (frame(T.RESYNC_DATA, 41, b"x", flags=1), "RESYNC_DATA frame: flags 0x01"),
        (frame(T.ACK, 41, flags=1), "ACK frame: flags 0x01"),
        (frame(T.WRITE, 41), "WRITE frame: length 0"),
        (frame(T.RESYNC_DATA, 41), "RESYNC_DATA frame: length 0"),
        (frame(T.ZERO, 41, b"x", aux=1), "ZERO frame: length 1"),
        (frame(T.FLUSH, 41, b"x"), "FLUSH frame: length 1"),
        (frame(T.ACK, 41, b"x"), "ACK frame: length 1"),
        (frame(T.NACK, 41, b"x"), "NACK frame: length 1"),
        (frame(T.ECHO_REQUEST, 41, b"x"), "ECHO_REQUEST frame: length 1"),
        (frame(T.HASH_REPLY, 41), "HASH_REPLY frame: length 0"),
        (frame(T.HASH_REPLY, 41, bytes(4097)), "HASH_REPLY frame: length 4097"),
        (frame(T.CONTROL, 1, bytes(16)), "CONTROL frame: length 16"),
        (frame(T.HASH, 41, bytes(16), aux=HASH_BLOCK_BYTES + 1), "HASH frame: length 16"),
        (frame(T.HASH, 41, bytes(32), aux=HASH_BLOCK_BYTES), "HASH frame: length 32"),
        (frame(T.HASH, 41, bytes(17), aux=HASH_BLOCK_BYTES), "HASH frame: length 17"),
        (frame(T.HASH, 41, bytes(16), aux=0), "HASH frame: aux 0"),
        (frame(T.ZERO, 41, aux=0), "ZERO frame: aux 0"),
        (frame(T.ZERO, 41, aux=FRAME_SPAN_BYTES_MAX + 1), "ZERO frame: aux 1073741825"),
        (frame(T.TRIM, 41, aux=0), "TRIM frame: aux 0"),
        (frame(T.RESYNC_ZERO, 41, aux=0), "RESYNC_ZERO frame: aux 0"),
        (frame(T.WRITE, 41, b"x", aux=1), "WRITE frame: aux 1"),
        (frame(T.ACK, 41, aux=1), "ACK frame: aux 1"),
        (frame(T.ACK, 41, offset=1), "ACK frame: offset 1"),
        (frame(T.FLUSH, 41, offset=1), "FLUSH frame: offset 1"),
        (frame(T.WRITE, 41, b"xy", offset=DEVICE_BYTES - 1), f"WRITE frame: offset {8388607}"),
        (frame(T.WRITE, 41, b"x", offset=2**64 - 1), "WRITE frame: offset 18446744073709551615"),
        (frame(T.RESYNC_DATA, 41, b"x", offset=DEVICE_BYTES), "RESYNC_DATA frame: offset 8388608"),
        (frame(T.ZERO, 41, offset=1, aux=DEVICE_BYTES), "ZERO frame: offset 1"),
        (frame(T.TRIM, 41, offset=1, aux=DEVICE_BYTES), "TRIM frame: offset 1"),
        (frame(T.RESYNC_ZERO, 41, offset=1, aux=DEVICE_BYTES), "RESYNC_ZERO frame: offset 1"),
        (frame(T.HASH, 41, bytes(16), offset=DEVICE_BYTES, aux=1), "HASH frame: offset 8388608"),
        (frame(T.WRITE, 40, b"x"), "WRITE frame: seq 40, not 41"),
        (frame(T.WRITE, 42, b"x"), "WRITE frame: seq 42, not 41"),
        (frame(T.FLUSH, 42), "FLUSH frame: seq 42, not 41"),
        (frame(T.WRITE, 41, b"x") * 2, "WRITE frame: seq 41, not 42"),
        (control(2), "CONTROL frame: seq 2, not 1"),
        (control(1) * 2, "CONTROL frame: seq 1, not 2"),
        (control(1, key=bytes(32)), "CONTROL frame: MAC"),
        (control(1, session=5), "CONTROL frame: session 0000000000000005"),
    ],
)  # fmt: skip
def test_each_violation_is_refused_by_name(bad: bytes, told: str) -> None:
    """Breaks in the field: bytes change on the disk because of a frame that was never valid."""
    assert told in refusal(bad)


@pytest.mark.parametrize(
    ("kind", "length", "aux"),
    [
        (T.WRITE, FRAME_PAYLOAD_BYTES_MAX + 1, 0),
        (T.WRITE, 2**32 - 1, 0),
        (T.RESYNC_DATA, FRAME_PAYLOAD_BYTES_MAX + 1, 0),
        (T.CONTROL, CONTROL_BYTES_MAX + 1, 0),
        (T.HASH, 2**32 - 16, HASH_BLOCK_BYTES),
        (T.HASH_REPLY, 2**32 - 1, 0),
        (T.ACK, 2**32 - 1, 0),
    ],
)
def test_a_giant_length_is_refused_before_memory_or_payload(
    kind: FrameType, length: int, aux: int
) -> None:
    """Breaks in the field: one bad frame takes the memory of the engine, or stalls the session."""
    into = reader()
    seq = 1 if kind is T.CONTROL else FIRST_SEQ
    put(into, frame(kind, seq, length=length, aux=aux, payload_crc=1))
    tracemalloc.start()
    try:
        with pytest.raises(PeerProtocolError, match="length"):
            into.frames()
        assert tracemalloc.get_traced_memory()[1] < 64 * KIB
    finally:
        tracemalloc.stop()


def test_a_range_outside_the_device_is_refused_before_its_payload() -> None:
    """Breaks in the field: a megabyte is waited for that could never be written."""
    head = frame(T.WRITE, 41, length=FRAME_PAYLOAD_BYTES_MAX, offset=DEVICE_BYTES, payload_crc=1)
    assert "offset" in refusal(head)


def test_limits_themselves_are_allowed() -> None:
    """Breaks in the field: the largest requests end the session."""
    largest = bytes(FRAME_PAYLOAD_BYTES_MAX)
    into = FrameReader(SESSION, SEED, 4 * FRAME_SPAN_BYTES_MAX, KEY)
    into.expect(0)
    hashes = bytes(FRAME_SPAN_BYTES_MAX // HASH_BLOCK_BYTES * 16)
    frames = feed(
        into,
        [
            frame(T.WRITE, 0, largest),
            frame(T.ZERO, 1, aux=FRAME_SPAN_BYTES_MAX, offset=3 * FRAME_SPAN_BYTES_MAX),
            frame(T.HASH, 2, hashes, aux=FRAME_SPAN_BYTES_MAX),
            frame(T.HASH_REPLY, 2, bytes(4096)),
        ],
    )
    assert [len(f.payload) for f in frames] == [FRAME_PAYLOAD_BYTES_MAX, 0, len(hashes), 4096]


def test_a_dead_reader_stays_dead() -> None:
    """Breaks in the field: after a bad frame the bytes behind it are taken for good ones."""
    into = reader()
    put(into, frame(T.WRITE, 99, b"x"))
    with pytest.raises(PeerProtocolError):
        into.frames()
    for call in (into.frames, into.buffer_for_read, lambda: into.received(0)):
        with pytest.raises(PeerProtocolError, match="seq 99, not 41"):
            call()


@pytest.mark.parametrize("kind", [k for k in T if k not in (T.CONTROL, 32, 33)])
def test_data_plane_frames_wait_for_their_opening(kind: FrameType) -> None:
    """Breaks in the field: data is applied before both nodes decided whose data is right."""
    payload = b"x" * 16 if kind in (T.WRITE, T.RESYNC_DATA, T.HASH, T.HASH_REPLY) else b""
    assert f"{kind.name} frame: type" in refusal(frame(kind, 0, payload, aux=0), opened=False)


def test_a_data_frame_right_behind_the_opening_message_is_held_back() -> None:
    """Breaks in the field: a session ends now and then, when TCP joins two packets."""
    into = reader(opened=False)
    begin = encode(SourceBegin(first_seq=41, resume=False))
    opening = encode_control(begin, SESSION, 1, SEED, KEY)
    put(into, opening + frame(T.WRITE, 41, b"x"))
    assert [f.type for f in into.frames()] == [T.CONTROL]
    into.expect(41)
    assert [f.payload for f in into.frames()] == [b"x"]

    unopened = reader(opened=False)
    put(unopened, opening + frame(T.WRITE, 41, b"x"))
    unopened.frames()
    with pytest.raises(PeerProtocolError, match="before the data plane was opened"):
        unopened.frames()


def test_the_direction_may_change_inside_a_session() -> None:
    """Breaks in the field: after a planned swap the first write ends the session."""
    into = reader()
    assert len(feed(into, [frame(T.FLUSH, 41)])) == 1
    into.expect(1000)
    assert [f.seq for f in feed(into, [frame(T.FLUSH, 1000)])] == [1000]


def test_a_control_message_must_be_one() -> None:
    """Breaks in the field: a peer with a bug makes this node act on a half-read message."""
    assert "unknown kind 200" in refusal(encode_control(b"\xc8", SESSION, 1, SEED, KEY))


def test_control_and_data_count_apart() -> None:
    """Breaks in the field: a control message between two writes looks like a lost write."""
    begin = encode(CaughtUp(seq=41))
    stream = [
        frame(T.FLUSH, 41),
        encode_control(begin, SESSION, 1, SEED, KEY),
        frame(T.FLUSH, 42),
        control(2),
    ]
    assert [f.seq for f in feed(reader(), stream)] == [41, 1, 42, 2]


def test_there_is_always_room_to_read() -> None:
    """Breaks in the field: small reads, one system call for every few bytes."""
    into = reader()
    large = frame(T.WRITE, 41, bytes(FRAME_PAYLOAD_BYTES_MAX))
    for at in range(0, len(large), 10_007):
        assert 64 * KIB <= len(into.buffer_for_read()) <= BUFFER_BYTES_MAX
        feed(into, [large[at : at + 10_007]])


@pytest.mark.parametrize("size", [4 * KIB, 100 * KIB, MIB])
def test_a_long_stream_lives_in_little_memory(size: int) -> None:
    """Breaks in the field: the secondary's engine grows with every write it has seen."""
    into = reader()
    payload = bytes(size)
    payload_crc = crc32c_reference(payload, SEED)
    tracemalloc.start()
    try:
        for seq in range(FIRST_SEQ, FIRST_SEQ + 24 * MIB // size):
            head = encode_header(T.WRITE, 0, size, SESSION, seq, 0, 0, payload_crc, SEED)
            assert len(feed(into, [head, payload])) == 1
        assert tracemalloc.get_traced_memory()[1] < 4 * BUFFER_BYTES_MAX
    finally:
        tracemalloc.stop()


def test_answers_alone_take_no_new_buffer() -> None:
    """Breaks in the field: the primary allocates for ever while it only reads answers."""
    into = reader()
    feed(into, [frame(T.WRITE, FIRST_SEQ, b"an earlier role")])
    buffers = [into.buffer_for_read().obj]
    for seq in range(20_000):
        put(into, encode_header(T.ACK, 0, 0, SESSION, seq, 0, 0, 0, SEED))
        into.frames()
        buffer = into.buffer_for_read().obj
        if buffer is not buffers[-1]:
            buffers.append(buffer)
    # The one that the payload pointed into, then one for all the answers.
    assert len(buffers) == 2


def test_memory_of_a_burst_is_given_back() -> None:
    """Breaks in the field: after one slow moment of its disk a secondary stays large for ever."""
    into = reader()
    tracemalloc.start()
    try:
        kept = [
            feed(into, [frame(T.WRITE, FIRST_SEQ + index, bytes(200 * KIB))]) for index in range(40)
        ]
        assert tracemalloc.get_traced_memory()[0] > 40 * 200 * KIB
        kept.clear()
        assert tracemalloc.get_traced_memory()[0] < 4 * BUFFER_BYTES_MAX
        feed(into, [frame(T.WRITE, FIRST_SEQ + 40, b"x")])
        assert tracemalloc.get_traced_memory()[0] < 8 * 512 * KIB
    finally:
        tracemalloc.stop()


def test_a_buffer_is_used_again_only_when_nobody_looks_at_it() -> None:
    """Breaks in the field: the disk gets the next request's bytes instead of this one's."""
    into = reader()
    kept = feed(into, [frame(T.WRITE, FIRST_SEQ, b"keep" * 1024)])[0].payload
    objects = set()
    for seq in range(FIRST_SEQ + 1, FIRST_SEQ + 400):
        (other,) = feed(into, [frame(T.WRITE, seq, b"other" * 2048)])
        objects.add(id(other.payload.obj))
        del other
    assert bytes(kept) == b"keep" * 1024
    # 4 MB went through 256 KiB buffers: they were used again, the one in use was not.
    assert len(objects) <= 4
