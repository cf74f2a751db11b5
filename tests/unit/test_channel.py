"""The channel: handshake first, then frames of this session and this direction, and no others."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.core.channel import Channel
from nbdmirror.core.handshake import Handshake, Identity
from nbdmirror.core.messages import Bye, Role, SourceBegin, Stable
from nbdmirror.core.wire import Frame, FrameType
from nbdmirror.errors import AuthenticationError, PeerProtocolError
from nbdmirror.limits import HANDSHAKE_BYTES_MAX, KIB, MIB

T = FrameType
DEVICE_BYTES = 4 * MIB
ONE = Identity(b"m" * 16, 1, b"1" * 16, b"i" * 16)
TWO = Identity(b"m" * 16, 2, b"2" * 16, b"j" * 16)


def ends(**of_dialer: Any) -> tuple[Channel, Channel]:
    """Dialer and listener, nothing exchanged yet."""
    one: dict[str, Any] = {"psk": b"k" * 32, "me": ONE, "nonce": b"n" * 32} | of_dialer
    two: dict[str, Any] = {"psk": b"k" * 32, "me": TWO, "nonce": b"o" * 32}
    return Channel(Handshake(dialer=True, **one)), Channel(Handshake(dialer=False, **two))


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


def connect(**of_dialer: Any) -> tuple[Channel, Channel]:
    one, two = ends(**of_dialer)
    feed(two, one.start())
    feed(one, two.take_outgoing())
    feed(two, one.take_outgoing())
    assert one.established is not None
    assert two.established is not None
    return one, two


def opened(**of_dialer: Any) -> tuple[Channel, Channel]:
    one, two = connect(**of_dialer)
    one.open_data(DEVICE_BYTES, 1)
    two.open_data(DEVICE_BYTES, 1)
    return one, two


def write(channel: Channel, seq: int, payload: bytes = b"data") -> bytes:
    return channel.encode(T.WRITE, 0, seq, 0, 0, payload) + payload


@given(
    step=st.integers(1, 300),
    payloads=st.lists(st.binary(min_size=1, max_size=500), max_size=8),
    terms=st.lists(st.integers(0, 2**64 - 1), max_size=4),
)
def test_what_one_end_makes_the_other_end_reads(
    step: int, payloads: list[bytes], terms: list[int]
) -> None:
    """Breaks in the field: a link that cuts packets anywhere ends sessions or mangles writes."""
    one, two = ends()
    feed(two, one.start(), step)
    feed(one, two.take_outgoing(), step)
    # Everything right behind CONFIRM, so that frames begin inside the handshake's last read.
    stream = one.take_outgoing() + one.control_frame(SourceBegin(first_seq=1, resume=False))
    frames = feed(two, stream, step)
    two.open_data(DEVICE_BYTES, 1)
    stream = b"".join(write(one, seq, p) for seq, p in enumerate(payloads, 1))
    stream += b"".join(one.control_frame(Role(primary=True, term=term)) for term in terms)
    stream += one.encode(T.ECHO_REQUEST, 0, 5, 0, 6, b"")
    frames += feed(two, stream, step)
    assert [f.payload for f in frames] == [
        SourceBegin(first_seq=1, resume=False),
        *payloads,
        *(Role(primary=True, term=term) for term in terms),
        b"",
    ]


def test_both_directions_are_alike() -> None:
    """Breaks in the field: the node that listens can receive but not send."""
    one, two = opened()
    for sender, receiver in ((one, two), (two, one)):
        stream = sender.control_frame(Stable(seq=4)) + write(sender, 1)
        assert [f.payload for f in feed(receiver, stream)] == [Stable(seq=4), b"data"]


def test_frames_before_the_handshake_are_not_read() -> None:
    """Breaks in the field: anybody who reaches the port can write to the device."""
    one, _ = opened()
    _, fresh = ends()
    with pytest.raises(PeerProtocolError, match="handshake"):
        feed(fresh, write(one, 1))
    assert fresh.established is None
    assert fresh.frames() == []
    assert fresh.refusal


def test_frames_in_place_of_the_proof_are_not_read() -> None:
    """Breaks in the field: a dialer without the key only has to skip the last message."""
    good, _ = opened()
    one, two = ends()
    feed(two, one.start())
    with pytest.raises(PeerProtocolError, match="handshake"):
        feed(two, write(good, 1))
    assert two.established is None
    assert two.frames() == []


def test_a_wrong_key_gives_a_refusal_and_nothing_else() -> None:
    """Breaks in the field: the operator of the other node sees a dead connection, no reason."""
    one, two = ends(psk=b"K" * 32)
    feed(two, one.start())
    with pytest.raises(AuthenticationError):
        feed(one, two.take_outgoing())
    assert one.take_outgoing() == b""
    with pytest.raises(PeerProtocolError, match="authentication failed"):
        feed(two, one.refusal)


def test_handshake_bytes_are_sent_once() -> None:
    """Breaks in the field: a message sent twice ends the handshake."""
    one, two = ends()
    feed(two, one.start())
    assert two.take_outgoing()
    assert two.take_outgoing() == b""


def test_a_full_read_behind_the_last_message_is_kept() -> None:
    """Breaks in the field: the first frames of a fast peer are lost."""
    one, two = ends()
    feed(two, one.start())
    feed(one, two.take_outgoing())
    stream = one.take_outgoing()
    count = 0
    while len(stream) < HANDSHAKE_BYTES_MAX:
        stream += one.control_frame(Stable(seq=count))
        count += 1
    assert [f.payload.seq for f in feed(two, stream)] == list(range(count))


def test_a_reflected_frame_is_refused() -> None:
    """Breaks in the field: a primary takes its own echo for its peer's acknowledgement."""
    for make in (
        lambda one: write(one, 1),
        lambda one: one.encode(T.ACK, 0, 1, 0, 0, b""),
        lambda one: one.control_frame(Bye(reason="")),
    ):
        one, _ = opened()
        with pytest.raises(PeerProtocolError):
            feed(one, make(one))


@pytest.mark.parametrize(
    "changed", [{"nonce": b"N" * 32}, {"me": replace(ONE, instance=b"I" * 16)}]
)
def test_a_frame_of_another_session_is_refused(changed: dict[str, Any]) -> None:
    """Breaks in the field: a late frame of a closed session is applied after a failover."""
    old, _ = opened(**changed)
    for late in (write(old, 1), old.control_frame(Bye(reason=""))):
        _, two = opened()
        with pytest.raises(PeerProtocolError):
            feed(two, late)


def test_a_repeated_or_missing_control_frame_is_refused() -> None:
    """Breaks in the field: "I left" of an earlier moment is believed a second time."""
    one, two = connect()
    first, second = (one.control_frame(Stable(seq=seq)) for seq in (1, 2))
    assert len(feed(two, first)) == 1
    with pytest.raises(PeerProtocolError, match="seq 1, not 2"):
        feed(two, first)
    _, two = connect()
    with pytest.raises(PeerProtocolError, match="seq 2, not 1"):
        feed(two, second)


def test_data_waits_for_its_opening() -> None:
    """Breaks in the field: data is applied before both nodes decided whose data is right."""
    one, two = connect()
    with pytest.raises(PeerProtocolError, match="before the data plane was opened"):
        feed(two, write(one, 1))


def test_opening_and_first_write_may_come_in_one_read() -> None:
    """Breaks in the field: a session ends now and then, when TCP joins two packets."""
    one, two = connect()
    begin = SourceBegin(first_seq=7, resume=True)
    assert [f.payload for f in feed(two, one.control_frame(begin) + write(one, 7))] == [begin]
    two.open_data(DEVICE_BYTES, begin.first_seq)
    assert [f.payload for f in two.frames()] == [b"data"]


def test_the_device_size_is_that_of_the_opening() -> None:
    """Breaks in the field: a write behind the end of the device grows the backing file."""
    one, two = connect()
    two.open_data(DEVICE_BYTES, 1)
    inside = one.encode(T.WRITE, 0, 1, DEVICE_BYTES - 1, 0, b"x") + b"x"
    outside = one.encode(T.WRITE, 0, 2, DEVICE_BYTES, 0, b"x") + b"x"
    assert len(feed(two, inside)) == 1
    with pytest.raises(PeerProtocolError, match="outside 4194304 bytes"):
        feed(two, outside)


def test_a_source_takes_answers_but_no_data() -> None:
    """Breaks in the field: a source is written to, or hangs up at the first acknowledgement."""
    source, target = connect()
    with pytest.raises(PeerProtocolError, match="ACK frame: type"):
        feed(connect()[0], target.encode(T.ACK, 0, 1, 0, 0, b""))
    source.open_answers()
    target.open_data(DEVICE_BYTES, 1)
    assert len(feed(target, write(source, 1))) == 1
    answers = [(T.ACK, 0, b""), (T.FLUSHED, 0, b""), (T.NACK, 5, b""), (T.HASH_REPLY, 0, b"x")]
    stream = b"".join(target.encode(kind, 0, 1, 0, aux, p) + p for kind, aux, p in answers)
    assert [f.type for f in feed(source, stream)] == [kind for kind, _, _ in answers]
    # It does not close what is open: after a swap both directions have frames under way.
    target.open_answers()
    assert len(feed(target, write(source, 2))) == 1
    with pytest.raises(PeerProtocolError, match="WRITE frame: type"):
        feed(source, write(target, 1))
