"""The two links, plain and inside TLS, on a real loop with a real socket, for their contract.

Owns a loop on a thread of its own, a connection over loopback, and the test's end of it, which is a
blocking socket of Python's own: what it reads was made by no code of ours.
"""

import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import uvloop

from nbdmirror import certificate, tls
from nbdmirror.core.ports import ReadBuffer
from nbdmirror.errors import PeerProtocolError
from nbdmirror.link import TcpLink, tune
from nbdmirror.receiver import Source
from nbdmirror.tls import TlsSetup, TlsStream
from nbdmirror.tls_link import TlsLink

BOUND_S: Final = 30.0
SMALL_BUFFER: Final = 16 * 1024


def make_setup(directory: Path) -> TlsSetup:
    """With a certificate of its own."""
    path = directory / "tls.pem"
    certificate.make(path, "demo", "alpha", replace=True)
    return tls.load(path, path, None)


def connected() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection that hold little by themselves."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        ours = socket.socket()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
        ours.connect(listener.getsockname())
        theirs, _ = listener.accept()
    theirs.settimeout(BOUND_S)
    return ours, theirs


def shake(stream: TlsStream, connection: socket.socket) -> None:
    """TLS's handshake on a blocking socket."""
    while not stream.shake():
        connection.sendall(stream.outgoing.read())
        stream.feed(connection.recv(16384))
    connection.sendall(stream.outgoing.read())


class LoopThread:
    """A uvloop that runs on a thread."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def do(self, action: Callable[..., object], *arguments: object) -> None:
        """On the loop's thread; returns when it is done."""
        done = threading.Event()

        def run() -> None:
            try:
                action(*arguments)
            finally:
                done.set()

        self.loop.call_soon_threadsafe(run)
        assert done.wait(BOUND_S)

    def end(self) -> None:
        """The thread is gone, and the loop's descriptors are."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(BOUND_S)
        self.loop.close()


class Reader:
    """Receives as receiver.py does: one read for each call, from the loop's thread."""

    def __init__(self, end: "End", room: int) -> None:
        self.got = bytearray()
        self.error = ""
        self.ended = threading.Event()
        self.changed = threading.Condition()
        self._end = end
        self._room = room

    def readable(self) -> None:
        """The loop, or the link, says that there is something."""
        buffer = memoryview(bytearray(self._room))
        try:
            count = self._end.source.recv_into(buffer)
        except BlockingIOError:
            return
        except (OSError, PeerProtocolError) as error:
            self.error, count = str(error), 0
        with self.changed:
            self.got += buffer[:count]
            self.changed.notify_all()
        if not count:
            self._end.loop.remove_reader(self._end.descriptor)
            self.ended.set()

    def wait(self, count: int) -> bytes:
        """Until so much is there."""
        with self.changed:
            there = self.changed.wait_for(lambda: len(self.got) >= count, BOUND_S)
            assert there, f"{len(self.got)} of {count} bytes; {self.error}"
            return bytes(self.got)


class End:
    """Our end: the link, its queue, and what it told."""

    def __init__(self, loop: Any, connection: socket.socket, stream: TlsStream | None) -> None:
        self.loop = loop
        self.descriptor = connection.fileno()
        self.queue: deque[ReadBuffer] = deque()
        self.reasons: list[str] = []
        self.lost = threading.Event()
        self.spent = threading.Event()
        self.closed = threading.Event()
        self.source: Source = connection
        tune(connection)
        if stream is None:
            self.link = TcpLink(loop, connection, self._lost, self.closed.set)
        else:
            self.source = self.link = TlsLink(loop, connection, self._lost, self.closed.set, stream)
        self.link.attach(self.queue)

    def _lost(self, reason: str) -> None:
        self.reasons.append(reason)
        self.lost.set()

    def send(self, *buffers: ReadBuffer) -> None:
        """As a caller of the engine does it."""
        self.queue.extend(buffers)
        self.link.kick()

    def receive(self, thread: LoopThread, room: int = 256 * 1024) -> Reader:
        """Begin to receive."""
        reader = Reader(self, room)
        thread.do(self.loop.add_reader, self.descriptor, reader.readable)
        if isinstance(self.link, TlsLink):
            thread.do(self.link.begin, reader.readable, self.spent.set)
        return reader

    def waiting_bytes(self) -> int:
        """What the link holds that it took from the queue."""
        return sum(map(len, self.link._rest))


def tls_peer(theirs: socket.socket, setup: TlsSetup) -> ssl.SSLSocket:
    """Python's own TLS at the other end, as the listener."""
    return setup.listening.wrap_socket(theirs, server_side=True)


def tls_ends(
    loop: Any, ours: socket.socket, theirs: socket.socket, setup: TlsSetup
) -> tuple[End, ssl.SSLSocket]:
    """A link that dialed, and who took its call."""
    taken: list[ssl.SSLSocket] = []
    thread = threading.Thread(target=lambda: taken.append(tls_peer(theirs, setup)))
    thread.start()
    stream = TlsStream(setup, dialer=True)
    shake(stream, ours)
    thread.join(BOUND_S)
    return End(loop, ours, stream), taken[0]


def tls_pair(loop: Any, setup: TlsSetup) -> tuple[End, End]:
    """Two links that speak to each other."""
    ours, theirs = connected()
    streams = TlsStream(setup, dialer=True), TlsStream(setup, dialer=False)
    thread = threading.Thread(target=shake, args=(streams[1], theirs))
    thread.start()
    shake(streams[0], ours)
    thread.join(BOUND_S)
    return End(loop, ours, streams[0]), End(loop, theirs, streams[1])


def exactly(peer: socket.socket, count: int) -> bytes:
    """So many bytes from a blocking socket."""
    got = bytearray()
    while len(got) < count:
        piece = peer.recv(min(65536, count - len(got)))
        assert piece, f"the end after {len(got)} of {count} bytes"
        got += piece
    return bytes(got)
