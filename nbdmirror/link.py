"""The peer's TCP connection: sending from whoever has something, receiving on the uvloop thread.

Owns one connected socket. Callers of `kick` put the session's queue on the wire themselves; if
another thread is doing that already it takes theirs along, so a frame costs one system call and no
wake-up. What the socket does not take is left to the loop. Must never touch the engine's lock
while it holds its own.
"""

import contextlib
import socket
import struct
import threading
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable
from typing import Final

import uvloop

from nbdmirror.core.ports import ReadBuffer
from nbdmirror.limits import TCP_USER_TIMEOUT_MS

BATCH_BUFFERS_MAX: Final = 64
DRAIN_WAIT_S: Final = 1.0


def tune(connection: socket.socket) -> None:
    """Options of every peer socket: no delay, and a black hole is noticed within the deadline."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)


def enlarge(connection: socket.socket) -> None:
    """Room in the kernel for a whole window; only for a peer that has proven itself."""
    with contextlib.suppress(OSError):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, 4 * 1024 * 1024)


class TcpLink:
    """The sending half of core/ports.py for one session."""

    def __init__(
        self,
        loop: uvloop.Loop,
        connection: socket.socket,
        lost: Callable[[str], None],
        closed: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._on_close = closed
        self._socket = connection
        self._lost = lost
        self._lock = allocate_lock()
        self._queue: deque[ReadBuffer] = deque()
        self._rest: list[ReadBuffer] = []
        self._blocked = False
        self._closed = False
        self._drained = threading.Event()

    def attach(self, queue: deque[ReadBuffer]) -> None:
        """Send what `queue` holds from now on."""
        self._queue = queue

    def kick(self) -> None:
        """Put what is queued on the wire, unless the socket is full or somebody is at it."""
        while (self._queue or self._rest) and not self._blocked and not self._closed:
            if not self._lock.acquire(False):
                # The holder looks at the queue again after it has let go.
                return
            try:
                self._send()
            finally:
                self._lock.release()

    def _send(self) -> None:
        queue = self._queue
        while not self._closed:
            batch = self._rest
            self._rest = []
            while queue and len(batch) < BATCH_BUFFERS_MAX:
                batch.append(queue.popleft())
            if not batch:
                return
            try:
                sent = self._socket.sendmsg(batch)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._blocked = True
                self._fail(f"sending failed: {error.strerror}")
                return
            if sent < sum(map(len, batch)):
                self._rest = unsent(batch, sent)
                self._blocked = True
                self._loop.call_soon_threadsafe(self._wait_writable)
                return

    def _wait_writable(self) -> None:
        if not self._closed:
            self._loop.add_writer(self._socket.fileno(), self._writable)

    def _writable(self) -> None:
        self._loop.remove_writer(self._socket.fileno())
        self._blocked = False
        self.kick()
        if not self._blocked:
            self._drained.set()

    def drain(self) -> bool:
        """Wait until the socket took what was queued, at most DRAIN_WAIT_S."""
        self._drained.clear()
        self.kick()
        if self._blocked and not self._closed:
            self._drained.wait(DRAIN_WAIT_S)
        with self._lock:
            return self._closed or not (self._queue or self._rest)

    def close(self, reason: str) -> None:  # noqa: ARG002 - the port's signature
        """Nothing leaves after this. No thread is inside a send call when it returns.

        What the caller queued last (why it closes) has one chance to leave.
        """
        if self._closed:
            return
        if not self._blocked:
            self.kick()
        with self._lock:
            self._closed = True
            self._rest.clear()
        self._drained.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._loop.call_soon_threadsafe(self._dispose)

    def _dispose(self) -> None:
        descriptor = self._socket.fileno()
        if descriptor >= 0:
            self._loop.remove_reader(descriptor)
            self._loop.remove_writer(descriptor)
            self._socket.close()
        self._on_close()

    def _fail(self, reason: str) -> None:
        self._loop.call_soon_threadsafe(self._lost, reason)


def unsent(batch: list[ReadBuffer], sent: int) -> list[ReadBuffer]:
    """What remains of `batch` after its first `sent` bytes."""
    for index, item in enumerate(batch):
        if sent < len(item):
            return [memoryview(item)[sent:], *batch[index + 1 :]]
        sent -= len(item)
    return []


def abort(connection: socket.socket) -> None:
    """Close without waiting for a peer that does not read."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
