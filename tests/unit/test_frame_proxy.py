"""The relay that harms frames, against recorded connections: it cuts right, harms one, no more."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.core.channel import Channel
from nbdmirror.core.handshake import Handshake, Identity, offers
from nbdmirror.core.messages import Role, SourceBegin, Stable
from nbdmirror.core.wire import HEADER_BYTES, MAC_BYTES, FrameType
from tests.support.frame_proxy import FAULTS, HOLD_S, REPLAY_AFTER_COUNT, Fault, FrameProxy
from tests.support.frames import DIALER, KINDS, LISTENER, Cutter, Offers, Piece

T = FrameType
ONE = Identity(b"m" * 16, 1, b"1" * 16, b"i" * 16)
TWO = Identity(b"m" * 16, 2, b"2" * 16, b"j" * 16)
BLOCK = bytes(range(256)) * 16
BOUND_S = 20.0
NAMES = ["SourceBegin", "WRITE", "TRIM", "WRITE", "FLUSH", "Stable", "ECHO_REQUEST"]
ANSWERS = ["Role", "ACK", "HASH_REPLY", "FLUSHED", "ECHO_REPLY"]


def take(into: Channel, data: bytes) -> None:
    """Let one end read what the other one said."""
    buffer = into.buffer_for_read()
    buffer[: len(data)] = data
    into.received(len(data))


def recorded(*, one_asks: bool, other_asks: bool) -> tuple[list[bytes], list[bytes]]:
    """What dialer and listener say in one connection: handshake messages, then frames."""
    ends = []
    for me, dialer, asks in ((ONE, True, one_asks), (TWO, False, other_asks)):
        features, required = offers(macs=asks)
        ends.append(
            Channel(
                Handshake(dialer, b"k" * 32, me, bytes((me.node_id,)) * 32,
                          features=features, required=required)
            )
        )  # fmt: skip
    one, two = ends
    said = [one.start()]
    take(two, said[0])
    answered = [two.take_outgoing()]
    take(one, answered[0])
    said.append(one.take_outgoing())
    take(two, said[1])
    said.append(one.control_frame(SourceBegin(first_seq=1, resume=False)))
    said += [
        one.encode(T.WRITE, 0, 1, 0, 0, BLOCK) + BLOCK,
        one.encode(T.TRIM, 0, 2, 4096, 8192, b""),
        one.encode(T.WRITE, 1, 3, 8192, 0, BLOCK[:7]) + BLOCK[:7],
        one.encode(T.FLUSH, 0, 4, 0, 0, b""),
        one.control_frame(Stable(seq=4)),
        one.encode(T.ECHO_REQUEST, 0, 1, 0, 9, b""),
    ]
    answered += [
        two.control_frame(Role(primary=False, term=7)),
        two.encode(T.ACK, 0, 4, 0, 0, b""),
        two.encode(T.HASH_REPLY, 0, 3, 0, 0, b"\x80") + b"\x80",
        two.encode(T.FLUSHED, 0, 4, 0, 0, b""),
        two.encode(T.ECHO_REPLY, 0, 1, 0, 8, b""),
    ]
    return said, answered


def fed(cutter: Cutter, data: bytes, step: int) -> list[Piece]:
    """Everything in parts of `step` bytes."""
    parts = [data[at : at + step] for at in range(0, len(data), step)]
    return [piece for part in parts for piece in cutter.feed(part)]


# --- cutting ------------------------------------------------------------------------------------


@given(step=st.integers(1, 5000), one_asks=st.booleans(), other_asks=st.booleans())
def test_frames_are_cut_at_their_borders_wherever_the_reads_end(
    step: int, one_asks: bool, other_asks: bool
) -> None:
    """Breaks in the field: a fault meets half a frame, and a campaign tests a broken cable only."""
    said, answered = recorded(one_asks=one_asks, other_asks=other_asks)
    cut = Offers()
    dialer, listener = Cutter(DIALER, cut), Cutter(LISTENER, cut)
    pieces = fed(dialer, said[0], step)
    replies = fed(listener, answered[0], step)
    pieces += fed(dialer, b"".join(said[1:]), step)
    replies += fed(listener, b"".join(answered[1:]), step)
    assert [piece.data for piece in pieces] == said
    assert [piece.data for piece in replies] == answered
    assert [piece.kind for piece in pieces] == ["", "", *NAMES]
    assert [piece.kind for piece in replies] == ["", *ANSWERS]
    assert cut.macs == (one_asks or other_asks)
    head = HEADER_BYTES + (MAC_BYTES if cut.macs else 0)
    assert {piece.head_bytes for piece in pieces[2:]} == {head}


def test_what_is_no_frame_passes_as_it_is() -> None:
    """Breaks in the field: nothing; but a relay that waits for ever for the rest of a length that
    no frame has hides what an engine does with it.
    """
    said, _ = recorded(one_asks=False, other_asks=False)
    junk = Random(1).randbytes(5000)
    cutter = Cutter(DIALER, Offers())
    pieces = fed(cutter, b"".join(said[:3]) + junk, 100)
    assert [piece.kind for piece in pieces[:3]] == ["", "", "SourceBegin"]
    assert b"".join(piece.data for piece in pieces[3:]) == junk
    stranger = Cutter(LISTENER, Offers())
    assert b"".join(piece.data for piece in fed(stranger, junk, 7)) == junk


# --- harming ------------------------------------------------------------------------------------


class Wire:
    """A relay between two plain sockets that play a recording."""

    def __init__(self) -> None:
        self.proxy = FrameProxy()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.proxy.target = self._listener.getsockname()[:2]
        self.connect()

    def connect(self) -> None:
        """A new connection."""
        self.dialer = socket.create_connection(self.proxy.address, BOUND_S)
        self.listener, _ = self._listener.accept()
        self.listener.settimeout(BOUND_S)

    def play(self, said: list[bytes], answered: list[bytes]) -> None:
        """The handshake in turn, as engines do, then the frames of both."""
        for sender, receiver, message in (
            (self.dialer, self.listener, said[0]),
            (self.listener, self.dialer, answered[0]),
            (self.dialer, self.listener, said[1]),
        ):
            sender.sendall(message)
            assert received(receiver, len(message)) == message
        self.dialer.sendall(b"".join(said[2:]))
        self.listener.sendall(b"".join(answered[1:]))

    def close(self) -> None:
        """Give everything back."""
        self.proxy.close()
        for each in (self.dialer, self.listener, self._listener):
            each.close()


@contextmanager
def wired() -> Iterator[Wire]:
    wire = Wire()
    try:
        yield wire
    finally:
        wire.close()


def received(end: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer if the connection ends before."""
    data = b""
    try:
        while len(data) < count and (piece := end.recv(count - len(data))):
            data += piece
    except ConnectionResetError:
        pass
    return data


def ended(end: socket.socket) -> bool:
    """Whether nothing more comes, because the connection is over."""
    return received(end, 1) == b""


def in_place(said: list[bytes], index: int, *frames: bytes) -> bytes:
    """The frames of the dialer with others in the place of one."""
    return b"".join([*said[2:index], *frames, *said[index + 1 :]])


# In the recording: where the second WRITE stands.
SECOND_WRITE = 5


@pytest.mark.parametrize("macs", [False, True])
@pytest.mark.parametrize("what", ["drop", "duplicate", "replay", "corrupt-header", "hold", "call"])
def test_one_frame_is_harmed_and_no_other_byte(what: str, macs: bool) -> None:
    """Breaks in the field: a campaign says that an engine bears a fault which never happened."""
    said, answered = recorded(one_asks=macs, other_asks=False)
    called: list[str] = []
    fault = Fault(what, "WRITE", DIALER, 2, 3, call=lambda: called.append("now"))
    with wired() as wire:
        armed = wire.proxy.arm(fault)
        wire.play(said, answered)
        old = said[SECOND_WRITE]
        wanted = {
            "drop": in_place(said, SECOND_WRITE),
            "duplicate": in_place(said, SECOND_WRITE, old, old),
            "replay": b"".join(
                [*said[2 : SECOND_WRITE + 1 + REPLAY_AFTER_COUNT], old,
                 *said[SECOND_WRITE + 1 + REPLAY_AFTER_COUNT :]]
            ),
            "corrupt-header": in_place(
                said, SECOND_WRITE, old[:3] + bytes((old[3] ^ 0x20,)) + old[4:]
            ),
        }.get(what, b"".join(said[2:]))  # fmt: skip
        assert received(wire.listener, len(wanted)) == wanted
        assert received(wire.dialer, len(b"".join(answered[1:]))) == b"".join(answered[1:])
        assert armed.harmed == old
        assert called == (["now"] if what == "call" else [])
        assert wire.proxy.seen["WRITE", DIALER] == 2
        assert wire.proxy.seen["ACK", LISTENER] == 1


@pytest.mark.parametrize("macs", [False, True])
def test_a_byte_of_the_payload_is_changed_and_of_none_a_byte_before_it(macs: bool) -> None:
    """Breaks in the field: the check of the payload is never what finds a fault."""
    said, answered = recorded(one_asks=macs, other_asks=False)
    head = HEADER_BYTES + (MAC_BYTES if macs else 0)
    for kind, index, changed in (("WRITE", SECOND_WRITE, head + 2), ("FLUSH", 6, 9)):
        with wired() as wire:
            wire.proxy.arm(Fault("corrupt-payload", kind, DIALER, 2 if kind == "WRITE" else 1, 9))
            wire.play(said, answered)
            old = said[index]
            new = old[:changed] + bytes((old[changed] ^ 0x20,)) + old[changed + 1 :]
            wanted = in_place(said, index, new)
            assert received(wire.listener, len(wanted)) == wanted


@pytest.mark.parametrize(
    ("what", "share"), [("close-before", 0), ("close-middle", 1), ("close-after", 2)]
)
def test_the_connection_ends_at_the_frame(what: str, share: int) -> None:
    """Breaks in the field: a cut in the middle of a frame is never tried."""
    said, answered = recorded(one_asks=True, other_asks=False)
    with wired() as wire:
        wire.proxy.arm(Fault(what, "WRITE", DIALER, 2))
        wire.play(said, answered)
        old = said[SECOND_WRITE]
        wanted = b"".join(said[2:SECOND_WRITE]) + old[: len(old) * share // 2]
        assert received(wire.listener, len(wanted)) == wanted
        assert ended(wire.listener)
        received(wire.dialer, 1 << 20)
        assert ended(wire.dialer)


def test_a_frame_is_played_again_in_the_next_connection() -> None:
    """Breaks in the field: a frame of yesterday's connection is never shown to an engine."""
    said, answered = recorded(one_asks=True, other_asks=False)
    with wired() as wire:
        armed = wire.proxy.arm(Fault("replay-next", "WRITE", DIALER, 1))
        wire.play(said, answered)
        wanted = b"".join(said[2:4])
        assert received(wire.listener, len(wanted)) == wanted
        assert ended(wire.listener)
        wire.dialer.close()
        wire.listener.close()
        wire.connect()
        wire.play(said, answered)
        wanted = b"".join([said[2], armed.harmed, *said[3:]])
        assert received(wire.listener, len(wanted)) == wanted


def test_what_is_held_comes_when_it_is_let_go_and_nothing_overtakes_it() -> None:
    """Breaks in the field: late frames are never tried, or come in another order than sent."""
    said, answered = recorded(one_asks=False, other_asks=False)
    with wired() as wire:
        armed = wire.proxy.arm(Fault("hold-long", "TRIM", DIALER))
        wire.play(said, answered)
        armed.wait(BOUND_S)
        before = b"".join(said[2:4])
        assert received(wire.listener, len(before)) == before
        # The other direction goes on; and whoever sent it may be gone before it arrives.
        assert received(wire.dialer, len(b"".join(answered[1:]))) == b"".join(answered[1:])
        wire.listener.settimeout(HOLD_S)
        with pytest.raises(TimeoutError):
            wire.listener.recv(1)
        wire.dialer.close()
        wire.listener.sendall(answered[-1])
        wire.proxy.release()
        wire.listener.settimeout(BOUND_S)
        after = b"".join(said[4:])
        assert received(wire.listener, len(after)) == after
        assert ended(wire.listener)


def test_silence_is_of_one_direction() -> None:
    """Breaks in the field: a network that loses what one node sends is never tried."""
    said, answered = recorded(one_asks=False, other_asks=False)
    with wired() as wire:
        wire.play(said, answered)
        received(wire.listener, len(b"".join(said[2:])))
        received(wire.dialer, len(b"".join(answered[1:])))
        wire.proxy.silence(DIALER)
        wire.dialer.sendall(said[-1])
        wire.listener.sendall(answered[-1])
        assert received(wire.dialer, len(answered[-1])) == answered[-1]
        wire.listener.settimeout(HOLD_S)
        with pytest.raises(TimeoutError):
            wire.listener.recv(1)
        wire.proxy.silence()
        wire.listener.settimeout(BOUND_S)
        assert ended(wire.listener)


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_replayed_by_its_name(what: str) -> None:
    """Breaks in the field: a violation that cannot be replayed is not mended."""
    fault = Fault(what, "JointTaken", LISTENER, 2, 17)
    assert Fault.of(str(fault)) == fault


@pytest.mark.parametrize("text", ["NONE:dialer:drop:1:0", "WRITE:x:drop:1:0", "ACK:dialer:z:1:0"])
def test_a_fault_that_is_none_is_refused(text: str) -> None:
    """Breaks in the field: a typing error in a replay harms nothing, and everything seems well."""
    with pytest.raises(ValueError, match="no such fault"):
        Fault.of(text)


def test_every_type_of_frame_and_message_has_a_name() -> None:
    """Breaks in the field: a new message is not among what is harmed, and nobody misses it."""
    assert len(KINDS) == len(set(KINDS)) == len(FrameType) - 1 + 18
