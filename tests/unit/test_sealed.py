"""Frames with a keyed code: whoever has no key can neither make one nor move one."""

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.core.channel import Channel
from nbdmirror.core.checks import crc32c
from nbdmirror.core.handshake import Handshake, Identity, offers
from nbdmirror.core.messages import SourceBegin, Stable
from nbdmirror.core.sealed import SealedReader
from nbdmirror.core.wire import (
    HEADER,
    HEADER_BYTES,
    HEADER_CHECKED_BYTES,
    MAC_BYTES,
    Frame,
    FrameReader,
    FrameType,
    encode_header,
)
from nbdmirror.errors import PeerProtocolError
from nbdmirror.limits import FRAME_PAYLOAD_BYTES_MAX, HASH_BLOCK_BYTES, KIB, MIB

T = FrameType
DEVICE_BYTES = 8 * MIB
PAYLOAD_AT = HEADER_BYTES + MAC_BYTES
ONE = Identity(b"m" * 16, 1, b"1" * 16, b"i" * 16)
TWO = Identity(b"m" * 16, 2, b"2" * 16, b"j" * 16)


def feed(into: Channel, data: bytes, step: int = 64 * KIB) -> list[Frame]:
    frames = []
    while data:
        buffer = into.buffer_for_read()
        count = min(step, len(buffer), len(data))
        buffer[:count] = data[:count]
        into.received(count)
        frames += into.frames()
        data = data[count:]
    return frames


def opened(*, macs: bool = True, nonce: bytes = b"n" * 32) -> tuple[Channel, Channel]:
    """Both ends of a session whose data may flow in both directions."""
    features, required = offers(macs=macs)
    more: dict[str, Any] = {"features": features, "required": required}
    one = Channel(Handshake(True, b"k" * 32, ONE, nonce, **more))
    two = Channel(Handshake(False, b"k" * 32, TWO, b"o" * 32, **more))
    feed(two, one.start())
    feed(one, two.take_outgoing())
    feed(two, one.take_outgoing())
    one.open_data(DEVICE_BYTES, 1)
    two.open_data(DEVICE_BYTES, 1)
    return one, two


def frame(sender: Channel, kind: FrameType, seq: int, payload: bytes = b"", **more: int) -> bytes:
    fields = {"flags": 0, "offset": 0, "aux": 0} | more
    head = sender.encode(kind, fields["flags"], seq, fields["offset"], fields["aux"], payload)
    return head + payload


def write(sender: Channel, seq: int, payload: bytes = b"data") -> bytes:
    return frame(sender, T.WRITE, seq, payload)


def every_type(sender: Channel) -> list[bytes]:
    """One good frame of each type, in an order that a peer takes."""
    hashes = bytes(range(48))
    return [
        sender.control_frame(Stable(seq=0)),
        write(sender, 1),
        frame(sender, T.ZERO, 2, aux=4096, flags=3),
        frame(sender, T.TRIM, 3, aux=1, flags=1),
        frame(sender, T.FLUSH, 4, aux=3),
        frame(sender, T.ACK, 7),
        frame(sender, T.RESYNC_DATA, 5, b"x" * 700, offset=DEVICE_BYTES - 700),
        frame(sender, T.RESYNC_ZERO, 6, offset=5, aux=6, flags=2),
        frame(sender, T.HASH, 7, hashes, offset=512, aux=2 * HASH_BLOCK_BYTES + 1),
        frame(sender, T.FLUSHED, 8),
        frame(sender, T.NACK, 9, aux=28),
        frame(sender, T.HASH_REPLY, 10, b"\xe0"),
        frame(sender, T.ECHO_REQUEST, 2, aux=99),
        sender.control_frame(Stable(seq=1)),
        frame(sender, T.ECHO_REPLY, 3, aux=98),
    ]


def refused(into: Channel, data: bytes) -> str:
    with pytest.raises(PeerProtocolError) as caught:
        feed(into, data)
    return str(caught.value)


def taken(into: Channel, data: bytes) -> int:
    """How many frames are handed out of this stream before it ends, or is refused."""
    try:
        return len(feed(into, data))
    except PeerProtocolError:
        return 0


def repaired(sent: bytes, seed: int) -> bytes:
    """Both checks made to fit again, as somebody on the way can who knows the seed, or the bits."""
    payload = sent[PAYLOAD_AT:]
    head = sent[: HEADER_CHECKED_BYTES - 4]
    head += struct.pack(">I", crc32c(payload, seed) if payload else 0)
    return head + struct.pack(">I", crc32c(head, seed)) + sent[HEADER_BYTES:]


def test_a_frame_keeps_the_bytes_of_the_document() -> None:
    """Breaks in the field: two builds with the same version refuse each other's frames."""
    one, two = opened()
    done = two.established
    assert done is not None
    control = one.control_frame(Stable(seq=5))
    sent = write(one, 1, b"some data")
    key, seed = done.receive_frame_key, done.receive_seed
    header = encode_header(T.WRITE, 0, 9, done.session, 1, 0, 0, crc32c(b"some data", seed), seed)
    covered = b"some data" + (2).to_bytes(8, "big") + header
    assert sent == header + blake3(covered, key=key).digest()[:16] + b"some data"
    covered = control[PAYLOAD_AT:] + (1).to_bytes(8, "big") + control[:HEADER_BYTES]
    assert control[HEADER_BYTES:PAYLOAD_AT] == blake3(covered, key=key).digest()[:16]


def test_without_a_wish_frames_are_what_they_were() -> None:
    """Breaks in the field: a node that was updated first is not understood by its peer."""
    one, two = opened(macs=False)
    assert isinstance(two._reader, FrameReader)
    assert not isinstance(two._reader, SealedReader)
    sent = write(one, 1)
    assert len(sent) == HEADER_BYTES + 4
    assert [f.payload for f in feed(two, sent)] == [b"data"]


@pytest.mark.parametrize("step", [1, 7, 64, 100_000])
def test_every_type_arrives_as_it_was_sent(step: int) -> None:
    """Breaks in the field: a session with "mac" ends for nothing, where TCP happened to cut."""
    one, two = opened()
    frames = feed(two, b"".join(every_type(one)), step)
    plain_one, plain_two = opened(macs=False)
    assert frames == feed(plain_two, b"".join(every_type(plain_one)), step)
    assert len(frames) == 15


@given(
    sizes=st.lists(st.integers(1, 300_000), min_size=1, max_size=8),
    cuts=st.lists(st.integers(1, 400_000), max_size=20),
)
def test_any_chunking_of_any_writes_gives_their_bytes(sizes: list[int], cuts: list[int]) -> None:
    """Breaks in the field: a large write in several reads is checked against another header."""
    one, two = opened()
    payloads = [bytes((index + 1,)) * size for index, size in enumerate(sizes)]
    stream = b"".join(write(one, index + 1, each) for index, each in enumerate(payloads))
    frames = []
    for cut in cuts:
        frames += feed(two, stream[:cut])
        stream = stream[cut:]
    frames += feed(two, stream)
    assert [f.payload for f in frames] == payloads


def test_the_largest_frame_passes() -> None:
    """Breaks in the field: a write of 1 MiB finds no room beside its code."""
    one, two = opened()
    for seq in range(1, 7):
        assert len(feed(two, write(one, seq, b"x" * FRAME_PAYLOAD_BYTES_MAX))) == 1


@pytest.mark.parametrize("index", range(15))
def test_no_flipped_bit_passes_even_where_the_checks_are_repaired(index: int) -> None:
    """Breaks in the field: who sits on the wire changes data, and repairs the checks as always."""
    one, two = opened()
    assert two.established is not None
    seed = two.established.receive_seed
    sent = every_type(one)
    good, attacked = b"".join(sent[:index]), sent[index]
    for bit in range(0, len(attacked) * 8, 1 if len(attacked) < 120 else 53):
        flipped = bytearray(attacked)
        flipped[bit // 8] ^= 1 << bit % 8
        for forged in (bytes(flipped), repaired(bytes(flipped), seed)):
            # A flipped check is repaired to what it was; a longer length waits for ever.
            assert forged == attacked or taken(opened()[1], good + forged) <= index


def test_a_frame_with_repaired_checks_is_found_by_its_code() -> None:
    """Breaks in the field: the test above shows nothing, because the checks did not fit anyway."""
    for macs in (False, True):
        one, two = opened(macs=macs)
        done = two.established
        assert done is not None
        sent = write(one, 1, b"data")
        changed = b"DATA"
        seed = done.receive_seed
        _, kind, flags, length, number, seq, offset, aux, _, _ = HEADER.unpack(sent[:HEADER_BYTES])
        check = crc32c(changed, seed)
        head = encode_header(kind, flags, length, number, seq, offset, aux, check, seed)
        forged = head + sent[HEADER_BYTES:-4] + changed
        if macs:
            assert "MAC as frame 1 does not fit" in refused(two, forged)
        else:
            assert [f.payload for f in feed(two, forged)] == [b"DATA"], "documented: undetected"


ANSWERS: list[Callable[[Channel, int], bytes]] = [
    lambda one, n: frame(one, T.ACK, n),
    lambda one, n: frame(one, T.FLUSHED, n),
    lambda one, n: frame(one, T.ECHO_REQUEST, n, aux=n),
    lambda one, n: frame(one, T.ECHO_REPLY, n, aux=n),
    lambda one, n: one.control_frame(Stable(seq=n)),
    write,
]


@given(
    kinds=st.lists(st.integers(0, 4), min_size=3, max_size=8),
    data=st.data(),
    attack=st.sampled_from(["repeat", "drop", "swap"]),
)
def test_a_frame_repeated_dropped_or_moved_ends_the_session(
    kinds: list[int], data: st.DataObject, attack: str
) -> None:
    """Breaks in the field: an old echo prolongs a read lease, or an acknowledgement comes early."""
    one, two = opened()
    sent = [ANSWERS[kind](one, number) for number, kind in enumerate(kinds, 1)]
    at = data.draw(st.integers(0, len(sent) - 2))
    moved = list(sent)
    if attack == "repeat":
        moved.insert(at + 1, sent[at])
    elif attack == "drop":
        del moved[at]
    else:
        moved[at], moved[at + 1] = moved[at + 1], moved[at]
    took = 0
    for each in moved:
        try:
            took += len(feed(two, each))
        except PeerProtocolError:
            break
    else:
        pytest.fail("every frame was taken")
    assert took == at + (attack == "repeat")


def test_a_frame_of_the_other_direction_is_refused() -> None:
    """Breaks in the field: a primary takes its own frame for its peer's word."""
    for make in ANSWERS:
        one, two = opened()
        done = one.established
        assert done is not None
        mine = make(one, 1)
        assert refused(one, mine)
        # With the checks of the other direction, as somebody on the way can give it.
        one, _ = opened()
        assert "MAC as frame 1" in refused(one, repaired(mine, done.receive_seed))
        assert len(feed(two, mine)) == 1


def test_a_frame_of_another_session_is_refused() -> None:
    """Breaks in the field: yesterday's write, recorded on the way, is written again today."""
    for make in ANSWERS:
        old, _ = opened(nonce=b"N" * 32)
        _, two = opened()
        done = two.established
        assert done is not None
        late = bytearray(make(old, 1))
        late[8:16] = done.session.to_bytes(8, "big")
        assert "MAC as frame 1" in refused(two, repaired(bytes(late), done.receive_seed))


def test_payload_and_header_of_two_frames_do_not_go_together() -> None:
    """Breaks in the field: good data lands at the wrong place of the device."""
    one, two = opened()
    first = frame(one, T.WRITE, 1, b"here", offset=0)
    second = frame(one, T.WRITE, 2, b"away", offset=8192)
    done = two.established
    assert done is not None
    spliced = repaired(first[:PAYLOAD_AT] + second[PAYLOAD_AT:], done.receive_seed)
    assert "MAC as frame 1" in refused(two, spliced)
    _, two = opened()
    spliced = first[:HEADER_BYTES] + second[HEADER_BYTES:]
    assert "MAC as frame 1" in refused(two, repaired(spliced, done.receive_seed))


@given(cut=st.integers(0, PAYLOAD_AT + 3))
def test_a_truncated_frame_is_never_taken(cut: int) -> None:
    """Breaks in the field: the start of a frame is applied, and what follows it is its end."""
    one, two = opened()
    assert feed(two, write(one, 1)[:cut]) == []
    _, two = opened()
    one, _ = opened()
    assert refused(two, write(one, 1)[:cut] + write(one, 2) + write(one, 3))


def test_a_giant_length_is_refused_before_its_code_and_payload() -> None:
    """Breaks in the field: a forged length takes memory that nobody has checked."""
    one, two = opened()
    done = two.established
    assert done is not None
    sent = bytearray(write(one, 1))
    sent[4:8] = (FRAME_PAYLOAD_BYTES_MAX + 1).to_bytes(4, "big")
    assert "length" in refused(two, repaired(bytes(sent), done.receive_seed)[:PAYLOAD_AT])
    _, two = opened()
    sent[4:8] = b"\xff\xff\xff\xff"
    assert "length" in refused(two, repaired(bytes(sent), done.receive_seed)[:PAYLOAD_AT])


def test_good_frames_before_a_bad_one_are_not_handed_out() -> None:
    """Breaks in the field: half of what arrived with a forgery is applied."""
    one, two = opened()
    good, bad = write(one, 1), bytearray(write(one, 2))
    bad[-1] ^= 1
    refused(two, good + bytes(bad))
    with pytest.raises(PeerProtocolError, match="the session ended with"):
        two.frames()


def test_data_right_behind_its_opening_is_held_back_and_counted_once() -> None:
    """Breaks in the field: a session with "mac" ends now and then, when TCP joins two packets."""
    features, required = offers(macs=True)
    more: dict[str, Any] = {"features": features, "required": required}
    one = Channel(Handshake(True, b"k" * 32, ONE, b"n" * 32, **more))
    two = Channel(Handshake(False, b"k" * 32, TWO, b"o" * 32, **more))
    feed(two, one.start())
    feed(one, two.take_outgoing())
    begin = SourceBegin(first_seq=7, resume=True)
    # The first frames come in one read with the last message of the handshake.
    confirm = one.take_outgoing()
    stream = confirm + one.control_frame(begin) + write(one, 7) + write(one, 8)
    assert [f.payload for f in feed(two, stream)] == [begin]
    two.open_data(DEVICE_BYTES, begin.first_seq)
    assert [f.seq for f in two.frames()] == [7, 8]


def test_the_keys_of_frames_are_no_other_keys() -> None:
    """Breaks in the field: the code of one kind of message serves for another one."""
    one, two = opened()
    mine, theirs = one.established, two.established
    assert mine is not None
    assert theirs is not None
    keys = [
        mine.send_frame_key,
        mine.receive_frame_key,
        mine.send_mac_key,
        mine.receive_mac_key,
        mine.hash_key,
    ]
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {32}
    assert mine.frame_macs
    assert not replace(mine, features=1).frame_macs
