"""A TCP relay between the two nodes that can be cut at any byte, or made to swallow.

Owns its listening socket, one thread, and at most a few connections. It knows nothing of the
protocol; who does is given the bytes and may change them, or derives from it (frame_proxy.py). Must
never: keep a byte back by itself except when told to swallow.
"""

import contextlib
import os
import selectors
import socket
import struct
import threading
from collections.abc import Callable

CHUNK_BYTES = 256 * 1024
PAUSE_S = 0.5
RESET = struct.pack("ii", 1, 0)
Editor = Callable[[bytes], bytes]


class Proxy:
    """Relays connections on `address` to a target that may be set later."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self.target: tuple[str, int] | None = None
        self.relayed_bytes = 0
        self.connections = 0
        self.cuts = 0
        # For each new connection: what changes the bytes to the target, and those from it.
        self.editors: Callable[[], tuple[Editor, Editor]] | None = None
        self._editors: dict[socket.socket, Editor] = {}
        self._refusing = False
        self._swallowing = False
        self._left: int | None = None
        self._lock = threading.Lock()
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._waiting: dict[socket.socket, bytes] = {}
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        self._closing = False
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # --- what a test does ---------------------------------------------------------------------

    def cut_after(self, count: int) -> None:
        """Reset the connection when `count` more bytes have gone through, also inside a piece."""
        with self._lock:
            self._left = count

    def refuse(self, refusing: bool) -> None:
        """Reset what there is, and everything that comes, until told otherwise."""
        with self._lock:
            self._refusing = refusing
            if refusing:
                self._reset_all()

    def swallow(self, swallowing: bool) -> None:
        """Take bytes and pass none on: the wire is dead, and no end says so."""
        with self._lock:
            self._swallowing = swallowing
            if not swallowing:
                self._reset_all()

    def close(self) -> None:
        """End the thread and every connection."""
        self._closing = True
        self._wake()
        self._thread.join(5)
        with self._lock:
            self._reset_all()
        self._listener.close()
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    # --- the relay ----------------------------------------------------------------------------

    def _wake(self) -> None:
        os.write(self._wake_write, b"x")

    def _run(self) -> None:
        while not self._closing:
            for key, mask in self._selector.select(self._pause_s()):
                with self._lock:
                    self._serve(key.fileobj, mask)
            with self._lock:
                self._due()

    def _serve(self, ready: object, mask: int) -> None:
        if ready is self._listener:
            self._accept()
        elif ready == self._wake_read:
            os.read(self._wake_read, 64)
        elif isinstance(ready, socket.socket) and ready in self._pairs:
            if mask & selectors.EVENT_WRITE:
                self._flush(ready)
            if mask & selectors.EVENT_READ and ready in self._pairs:
                self._relay(ready)

    def _accept(self) -> None:
        inner, _ = self._listener.accept()
        if self._refusing or self.target is None:
            reset(inner)
            return
        try:
            outer = socket.create_connection(self.target, 2)
        except OSError:
            reset(inner)
            return
        self.connections += 1
        if self.editors is not None:
            self._editors[inner], self._editors[outer] = self.editors()
        for one, other in ((inner, outer), (outer, inner)):
            one.setblocking(False)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pairs[one] = other
            self._selector.register(one, selectors.EVENT_READ)
        self._opened(inner, outer)

    def _relay(self, source: socket.socket) -> None:
        target = self._pairs[source]
        try:
            piece = source.recv(CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            self._ended(source)
            return
        if self._swallowing:
            return
        cut = self._left is not None and len(piece) >= self._left
        if cut and self._left is not None:
            piece = piece[: self._left]
            self._left = None
            self.cuts += 1
        elif self._left is not None:
            self._left -= len(piece)
        self.relayed_bytes += len(piece)
        if source in self._editors:
            piece = self._editors[source](piece)
        piece, closing = self._passed(source, piece)
        self._send(target, piece)
        if cut or closing:
            self._drop(source)

    def _send(self, target: socket.socket, piece: bytes) -> None:
        self._waiting[target] = self._waiting.get(target, b"") + piece
        self._flush(target)

    def _flush(self, target: socket.socket) -> None:
        """Send what waits; while something does, nothing more is read for it."""
        piece = self._waiting.pop(target, b"")
        try:
            sent = target.send(piece) if piece else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop(target)
            return
        if sent < len(piece):
            self._waiting[target] = piece[sent:]
        self._watch(target)
        self._watch(self._pairs[target])

    def _watch(self, one: socket.socket) -> None:
        """Wait for what this end can do now. Both ends may be full at once, so each is asked
        anew, and neither touches what the other direction waits for.
        """
        readable = 0 if self._pairs[one] in self._waiting else selectors.EVENT_READ
        writable = selectors.EVENT_WRITE if one in self._waiting else 0
        wanted = readable | writable
        watched = one in self._selector.get_map()
        if wanted and watched:
            self._selector.modify(one, wanted)
        elif wanted:
            self._selector.register(one, wanted)
        elif watched:
            self._selector.unregister(one)

    def _drop(self, one: socket.socket) -> None:
        other = self._pairs.pop(one, None)
        for each in (one, other):
            if each is not None:
                self._closed(each)
                self._pairs.pop(each, None)
                self._waiting.pop(each, None)
                self._editors.pop(each, None)
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(each)
                reset(each)

    def _reset_all(self) -> None:
        for each in list(self._pairs):
            if each in self._pairs:
                self._drop(each)

    # --- what a relay that knows the protocol does in addition ----------------------------------

    def _opened(self, inner: socket.socket, outer: socket.socket) -> None:
        """A connection: `inner` to who dialed, `outer` to the target."""

    def _closed(self, one: socket.socket) -> None:
        """This end of a connection is given up."""

    def _passed(self, source: socket.socket, piece: bytes) -> tuple[bytes, bool]:
        """What goes on instead of `piece`, and whether the connection ends after it."""
        return piece, False

    def _ended(self, source: socket.socket) -> None:
        """This end says nothing any more."""
        self._drop(source)

    def _pause_s(self) -> float:
        """How long to wait for the next event at most."""
        return PAUSE_S

    def _due(self) -> None:
        """What is to be done by now, after each round of events."""


def reset(connection: socket.socket) -> None:
    """Close with a reset: what the kernel still had to send is gone, too."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()
