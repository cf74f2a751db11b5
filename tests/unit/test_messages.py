"""Control messages: what is sent is read, and nothing else is."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.core.messages import (
    MESSAGE_TYPES,
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
    printable,
)
from nbdmirror.core.superblock import ArbiterKind, DataState, Flags, PendingKind
from nbdmirror.errors import PeerProtocolError
from nbdmirror.limits import CONTROL_BYTES_MAX, MAP_PAGE_PAYLOAD_BYTES, REASON_BYTES_MAX

u8, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 32, 64))
ids = st.binary(min_size=16, max_size=16)
some_ids = ids.filter(any)
texts = st.text(st.characters(codec="utf-8").filter(str.isprintable), max_size=200)
flags = st.integers(0, int(sum(Flags))).map(Flags)


def states() -> st.SearchStrategy[State]:
    return st.builds(
        State,
        device_bytes=u64, extent_bytes=u32, region_bytes=u32, generation=ids,
        base=st.lists(some_ids, max_size=8).map(tuple), pending=ids,
        pending_kind=st.sampled_from(PendingKind),
        history=st.lists(some_ids, max_size=16).map(tuple),
        data_state=st.sampled_from(DataState), flags=flags, own_txn=u64, peer_txn=u64,
        dirty_count=u64, arbiter=st.sampled_from(ArbiterKind),
        arbiter_identity=st.binary(min_size=32, max_size=32), arbiter_counter=u64,
        ack_timeout_ms=u32, read_lease_ms=u32, term=u64, resume_session=u64, resume_applied=u64,
        peer_instance=ids, forced_over=ids,
    )  # fmt: skip


MESSAGES: dict[type[Message], st.SearchStrategy[Any]] = {
    State: states(),
    Verdict: st.builds(Verdict, decision=u8, text=texts),
    MapPage: st.builds(
        MapPage, index=u32, payload=st.just(b"\xa5") | st.just(b"\0") | st.binary(max_size=9)
    ).map(lambda m: replace(m, payload=(m.payload * 4032 + bytes(4032))[:MAP_PAGE_PAYLOAD_BYTES])),
    MapEnd: st.builds(MapEnd, pages=u32),
    UnionStored: st.builds(UnionStored, first_seq=u64),
    TargetReady: st.builds(TargetReady),
    JointTake: st.builds(JointTake, generation=ids, last_seq=u64),
    JointTaken: st.builds(JointTaken, generation=ids),
    LeaveAsk: st.builds(LeaveAsk, generation=ids),
    LeaveAnswer: st.builds(LeaveAnswer, generation=ids, reason=texts),
    Left: st.builds(
        Left, mirror_id=ids, generation=ids, leaver=u8, stayer=u8, session=u64
    ),
    Role: st.builds(Role, term=u64),
    Bye: st.builds(Bye, reason=texts),
    Stable: st.builds(Stable, seq=u64),
    Failed: st.builds(Failed, where=texts, errno=u32),
    SourceBegin: st.builds(SourceBegin, first_seq=u64),
    CaughtUp: st.builds(CaughtUp, seq=u64),
    Relay: st.builds(Relay, payload=st.binary(max_size=2048)),
}  # fmt: skip

STATE = State(
    device_bytes=2**40, extent_bytes=4096, region_bytes=2**22, generation=b"g" * 16,
    base=(b"b" * 16,), pending=b"p" * 16, pending_kind=PendingKind.JOINT,
    history=(b"h" * 16, b"i" * 16), data_state=DataState.OUTDATED, flags=Flags.CLEAN,
    primary_now=True, cache_survived=False, fell_back=True, own_txn=5, peer_txn=6, dirty_count=7,
    arbiter=ArbiterKind.S3, arbiter_identity=b"a" * 32, arbiter_counter=8, ack_timeout_ms=2000,
    read_lease_ms=1000, term=9, trim_ok=True, fast_zero_ok=False, resume_session=10,
    resume_applied=11, peer_instance=b"e" * 16, claim_unsettled=True, forced_over=b"f" * 16,
)  # fmt: skip


def test_the_strategies_miss_no_message() -> None:
    """Breaks in the field: a message added later is tested by nobody."""
    assert set(MESSAGES) == set(MESSAGE_TYPES)


def test_the_kinds_keep_their_numbers() -> None:
    """Breaks in the field: after an upgrade of one node a word is taken for another."""
    assert {kind.KIND: kind for kind in MESSAGE_TYPES} == {
        1: State, 2: Verdict, 3: MapPage, 4: MapEnd, 5: UnionStored, 6: TargetReady, 7: JointTake,
        8: JointTaken, 9: LeaveAsk, 10: LeaveAnswer, 11: Left, 12: Role, 13: Bye, 14: Stable,
        15: Failed, 16: SourceBegin, 17: CaughtUp,
        18: Relay,
    }  # fmt: skip


@pytest.mark.parametrize("kind", MESSAGE_TYPES, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_what_is_sent_is_read(kind: type[Message], data: st.DataObject) -> None:
    """Breaks in the field: the nodes decide from facts that nobody stated."""
    message = data.draw(MESSAGES[kind])
    sent = encode(message)
    assert decode(sent) == message
    assert type(decode(sent)) is kind
    assert sent[0] == kind.KIND


@given(kind=u8, body=st.binary(max_size=900))
def test_any_bytes_are_a_message_or_refused(kind: int, body: bytes) -> None:
    """Breaks in the field: a peer with a bug kills the engine with an unforeseen exception."""
    try:
        message = decode(bytes((kind,)) + body)
    except PeerProtocolError:
        return
    assert decode(encode(message)) == message


@given(data=st.data(), at=st.integers(0, 2000), bit=st.integers(0, 7))
def test_a_damaged_state_is_a_state_or_refused(data: st.DataObject, at: int, bit: int) -> None:
    """Breaks in the field: bytes near a valid message end the engine instead of the session."""
    sent = bytearray(encode(data.draw(MESSAGES[State])))
    sent[1 + at % (len(sent) - 1)] ^= 1 << bit
    try:
        message = decode(bytes(sent))
    except PeerProtocolError:
        return
    assert decode(encode(message)) == message


EXAMPLES: tuple[Message, ...] = (
    STATE,
    Verdict(decision=3, text="why"),
    MapPage(index=1, payload=bytes(4032)),
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


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_truncated_or_longer_message_is_refused(message: Message) -> None:
    """Breaks in the field: a message of a newer format is half understood."""
    sent = encode(message)
    for length in range(len(sent)):
        with pytest.raises(PeerProtocolError):
            decode(sent[:length])
    with pytest.raises(PeerProtocolError):
        decode(sent + b"\0")


@pytest.mark.parametrize(
    ("message", "sent"),
    [
        (EXAMPLES[1], "02 03 0003 776879"),
        (EXAMPLES[3], "04 00000002 01"),
        (EXAMPLES[5], "06"),
        (EXAMPLES[6], "07" + "67" * 16 + "0000000000000004"),
        (EXAMPLES[9], "0a 01" + "67" * 16 + "0007 62656361757365"),
        (EXAMPLES[10], "0b" + "6d" * 16 + "67" * 16 + "01 02 0000000000000005"),
        (EXAMPLES[11], "0c 01 0000000000000006"),
        (EXAMPLES[14], "0f 0006 707772697465 00000005"),
        (EXAMPLES[15], "10 0000000000000008 01"),
        (EXAMPLES[17], "12 01 0008 66726f6d206f6e65"),
    ],
)
def test_known_messages_keep_their_bytes(message: Message, sent: str) -> None:
    """Breaks in the field: two builds with the same version number do not understand each other."""
    assert encode(message) == bytes.fromhex(sent)


def test_a_known_state_keeps_its_bytes() -> None:
    """Breaks in the field: two builds decide from shifted fields, and copy the wrong way."""
    assert encode(STATE) == b"".join(
        (
            b"\x01", (2**40).to_bytes(8, "big"), (4096).to_bytes(4, "big"),
            (2**22).to_bytes(4, "big"), b"g" * 16, b"\x01", b"b" * 16, b"p" * 16, b"\x02",
            b"\x02", b"h" * 16, b"i" * 16, b"\x02", (4).to_bytes(4, "big"), b"\x01\x00\x01",
            (5).to_bytes(8, "big"), (6).to_bytes(8, "big"), (7).to_bytes(8, "big"), b"\x03",
            b"a" * 32, (8).to_bytes(8, "big"), (2000).to_bytes(4, "big"),
            (1000).to_bytes(4, "big"), (9).to_bytes(8, "big"), b"\x01\x00",
            (10).to_bytes(8, "big"), (11).to_bytes(8, "big"), b"e" * 16, b"\x01", b"f" * 16,
            bytes(32),
        )
    )  # fmt: skip


STATE_BYTES = encode(STATE)
AT_BASE = 1 + 8 + 4 + 4 + 16
AT_PENDING_KIND = AT_BASE + 1 + 16 + 16
AT_DATA_STATE = AT_PENDING_KIND + 2 + 32
AT_ARBITER = AT_DATA_STATE + 1 + 4 + 3 + 24


def patched(at: int, *values: int) -> bytes:
    return STATE_BYTES[:at] + bytes(values) + STATE_BYTES[at + len(values) :]


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (b"", "empty"),
        (b"\x00", "unknown kind 0"),
        (b"\x13", "unknown kind 19"),
        (patched(AT_PENDING_KIND, 3), "State: pending_kind: 3"),
        (patched(AT_DATA_STATE, 4), "State: data_state: 4"),
        (patched(AT_ARBITER, 5), "State: arbiter: 5"),
        (patched(AT_DATA_STATE + 1, 0x80), "State: flags: unknown flags 0x80000000"),
        (patched(AT_DATA_STATE + 5, 2), "State: primary_now: 2"),
        (patched(AT_DATA_STATE + 7, 0xFF), "State: fell_back: 255"),
        (patched(AT_BASE + 1, *bytes(16)), "State: base: an entry of zeros"),
        (patched(AT_PENDING_KIND + 2, *bytes(16)), "State: history: an entry of zeros"),
        (patched(len(STATE_BYTES) - 1, 1), "reserved"),
        (
            STATE_BYTES[:AT_BASE] + b"\x09" + b"b" * 144 + STATE_BYTES[AT_BASE + 17 :],
            "State: base: 9 entries",
        ),
        (
            STATE_BYTES[: AT_PENDING_KIND + 1]
            + b"\x11"
            + b"h" * 272
            + STATE_BYTES[AT_PENDING_KIND + 2 + 32 :],
            "State: history: 17 entries",
        ),
        (b"\x0d\x04\x01" + b"x" * 1025, "Bye: reason: 1025 bytes"),
        (b"\x0d\x00\x01\xff", "Bye: reason"),
        (b"\x0d\xff\xffx", "Bye"),
        (b"\x04" + bytes(4) + b"\x02", "MapEnd: full: 2"),
        (b"\x0a\x02" + bytes(18), "LeaveAnswer: stay: 2"),
    ],
)
def test_each_bad_field_is_refused_by_name(bad: bytes, told: str) -> None:
    """Breaks in the field: a decision rests on a value that has no meaning."""
    with pytest.raises(PeerProtocolError) as caught:
        decode(bad)
    assert told in str(caught.value)


@given(text=st.text(max_size=3000))
def test_no_reason_is_too_long_to_be_sent(text: str) -> None:
    """Breaks in the field: a long reason ends the session that was about to explain itself."""
    arrived = decode(encode(Bye(reason=text)))
    assert isinstance(arrived, Bye)
    assert len(arrived.reason.encode()) <= REASON_BYTES_MAX
    assert printable(text.encode("utf-8", "replace").decode()).startswith(arrived.reason)


def test_a_long_reason_is_cut_between_characters() -> None:
    """Breaks in the field: half a character, which the peer refuses."""
    arrived = decode(encode(Bye(reason="x" + "ä" * 1000)))
    assert arrived == Bye(reason="x" + "ä" * 511)


def test_a_reason_with_an_undecodable_file_name_is_sent() -> None:
    """Breaks in the field: a strange file name ends the session that was about to name it."""
    assert decode(encode(Failed(where="open /\udcff", errno=2))) == Failed(where="open /?", errno=2)


def test_a_text_cannot_steer_the_operators_terminal() -> None:
    """Breaks in the field: a peer's text hides lines of the log or of `status`."""
    arrived = decode(encode(Bye(reason="a\x1b[2Jb\nc\u202ed")))
    assert arrived == Bye(reason="a?[2Jb?c?d")


def test_every_message_fits_a_frame() -> None:
    """Breaks in the field: the largest state of a long-lived mirror cannot be sent."""
    largest = replace(STATE, base=(b"b" * 16,) * 8, history=(b"h" * 16,) * 16)
    long = "x" * REASON_BYTES_MAX
    for message in (
        largest,
        MapPage(index=0, payload=bytes(4032)),
        Failed(where=long, errno=5),
        LeaveAnswer(stay=False, generation=bytes(16), reason=long),
    ):
        assert len(encode(message)) + 16 <= CONTROL_BYTES_MAX
        assert decode(encode(message)) == message
