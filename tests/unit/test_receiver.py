"""Who receives from the peer while the loop's thread is held up by a disk."""

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from bench.rig import channels, feed, make_node
from nbdmirror.core.channel import Channel
from nbdmirror.core.session import Session
from nbdmirror.core.wire import FrameType
from nbdmirror.driver import Driver
from nbdmirror.receiver import LOOK_S, Receiver

BOUND_S = 20.0


class Loop:
    """What the receiver asks of the loop: nothing here comes from another thread."""

    def call_soon_threadsafe(self, run: Callable[..., None], *arguments: Any) -> None:
        """Not asked for in these tests."""
        raise AssertionError(run, arguments)


class SocketLink:
    """A link that sends at once."""

    def __init__(self, connection: socket.socket) -> None:
        self.session: Session
        self._connection = connection

    def kick(self) -> None:
        """Everything that is queued."""
        while self.session.outgoing:
            self._connection.sendall(self.session.outgoing.popleft())

    def drain(self) -> bool:
        """The same."""
        self.kick()
        return True

    def close(self, reason: str) -> None:
        """The test closes the sockets."""


@dataclass
class Secondary:
    """A receiver with a proven connection, and the peer's end of it."""

    receiver: Receiver
    session: Session
    connection: socket.socket
    peer: socket.socket
    channel: Channel

    def ask(self, number: int) -> None:
        """The peer sends an echo request."""
        self.peer.sendall(self.channel.encode(FrameType.ECHO_REQUEST, 0, number, 0, 0, b""))

    def answers(self, bound_s: float) -> list[int]:
        """The numbers of the echoes that arrive next at the peer, none if none does in time."""
        self.peer.settimeout(bound_s)
        try:
            feed(self.channel, self.peer.recv(4096))
        except TimeoutError:
            return []
        return [f.seq for f in self.channel.frames() if f.type is FrameType.ECHO_REPLY]


@pytest.fixture
def secondary() -> Iterator[Secondary]:
    """One that is connected."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    sender, channel = channels()
    node = make_node(2)
    link = SocketLink(ours)
    session = link.session = Session(node.shell, channel, link)
    node.session = session
    receiver = Receiver(node, Driver())
    loop: Any = Loop()
    receiver.begin(loop)
    yield Secondary(receiver, session, ours, theirs, sender)
    ours.close()
    theirs.close()


def test_echo_is_answered_before_the_disk_is_asked(secondary: Secondary) -> None:
    """Breaks in the field: a write that takes its time holds back the echo that came before it."""
    answered: list[list[int]] = []
    secondary.ask(7)
    secondary.receiver.schedule(lambda: answered.append(secondary.answers(BOUND_S)))
    secondary.receiver.readable(secondary.connection, secondary.session)
    assert answered == [[7]]


def test_echo_is_answered_while_a_disk_hangs(secondary: Secondary) -> None:
    """Breaks in the field: the peer's reads stop for as long as this node's disk does."""
    receiver = secondary.receiver
    threading.Thread(target=receiver.stand_in_for_ever, daemon=True).start()
    answered: list[list[int]] = []

    def hang() -> None:
        """A write on the loop's thread that returns when the peer was answered twice."""
        for number in (8, 9):
            secondary.ask(number)
            answered.append(secondary.answers(BOUND_S))

    secondary.ask(7)
    receiver.schedule(hang)
    receiver.readable(secondary.connection, secondary.session)
    assert answered in ([[7], [8]], [[7], [8, 9]])


def test_stand_in_leaves_a_thread_that_works_alone(secondary: Secondary) -> None:
    """Breaks in the field: two threads read one connection, and its bytes end up out of order."""
    receiver = secondary.receiver
    secondary.ask(7)
    assert receiver.stand_in(0) == 0
    looks: list[int] = []

    def work() -> None:
        looks.append(receiver.stand_in(0))
        looks.append(receiver.stand_in(looks[0]))

    receiver.readable(secondary.connection, secondary.session)
    for _ in range(2):
        receiver.schedule(work)
        receiver.carry_out()
    # A look is never the first of its turn, and what it saw in another turn counts for nothing.
    assert looks[0] == looks[1] != looks[2] == looks[3]
    assert receiver.stand_in(looks[3]) == 0


def test_end_of_the_connection_is_seen_by_the_stand_in(secondary: Secondary) -> None:
    """Breaks in the field: a node whose disk hangs takes a peer that is gone for one that waits."""
    receiver = secondary.receiver
    receiver.readable(secondary.connection, secondary.session)
    secondary.peer.close()

    def hang() -> None:
        turn = receiver.stand_in(0)
        assert receiver.stand_in(turn) == turn

    receiver.schedule(hang)
    receiver.carry_out()
    assert not secondary.session.live
    assert "closed" in secondary.session.reason


def test_stand_in_looks_often_enough() -> None:
    """Breaks in the field: between two looks the shortest lease runs out."""
    assert LOOK_S * 1000 * 3 < 300
