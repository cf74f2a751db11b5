"""The peer's connection inside TLS: as link.py, with OpenSSL between the queue and the socket.

No transport of a loop: the thread that has something to send encrypts and sends it itself, as
without TLS (ADR 21). One state of OpenSSL serves both directions and one thread at a time, so
reading takes the lock of sending. Whoever kicks does not wait for it: the reader looks at the queue
again when it has let go.

One key serves a bounded number of records. Whoever sends data is told in time that the connection
is to be begun anew (`spent`): it counts both directions, because where the other end broke off, a
primary would take it for a cut. An end that is not listened to stops at the bound.

Owns the state of TLS of one session, and what of the ciphertext the socket has not taken. At most
TLS_BATCH_BYTES are encrypted ahead of the socket: the rest waits in the queue, which the window
bounds. Must never: encrypt anything before older ciphertext has left, use one key for more than
TLS_RECORDS_MAX records, or leave something readable behind without a further look.
"""

import socket
from collections.abc import Callable
from typing import Final

import uvloop

from nbdmirror.core.ports import ReadBuffer
from nbdmirror.errors import PeerProtocolError
from nbdmirror.limits import (
    TLS_ANSWERS_BYTES_MAX,
    TLS_BATCH_BYTES,
    TLS_READ_BYTES,
    TLS_RECORD_BYTES,
    TLS_RECORDS_MAX,
    TLS_RECORDS_RENEW,
)
from nbdmirror.link import TcpLink
from nbdmirror.tls import TlsStream

READ_BYTES_MIN: Final = 64 * 1024
SPENT: Final = (
    f"TLS: the keys of this connection have served {TLS_RECORDS_RENEW} records; the nodes connect "
    "anew and go on with others"
)


class TlsLink(TcpLink):
    """Both halves of one session: sending as core/ports.py, receiving as a socket does it."""

    def __init__(
        self,
        loop: uvloop.Loop,
        connection: socket.socket,
        lost: Callable[[str], None],
        closed: Callable[[], None],
        stream: TlsStream,
    ) -> None:
        super().__init__(loop, connection, lost, closed)
        self._stream = stream
        self._records = 0
        self._received = 0
        self._spent: Callable[[], None] | None = None
        self._cipher = memoryview(bytearray(TLS_READ_BYTES))
        # Whether OpenSSL may have more to read without the socket: it may, from the handshake.
        self._left = True
        self._look: Callable[[], None] = _nothing
        self._look_due = False

    def begin(self, look: Callable[[], None], spent: Callable[[], None]) -> None:
        """`look` receives; it is called now, and whenever there is more than a call could take.

        `spent` is called once, when it is time for other keys. On the loop's thread.
        """
        self._look = look
        self._spent = spent
        look()

    def _dispose(self) -> None:
        super()._dispose()
        self._look, self._spent = _nothing, None  # what they lead to may go

    # --- sending --------------------------------------------------------------------------------

    def _send(self) -> None:
        while not self._closed:
            try:
                piece = self._rest.pop() if self._rest else self._encrypted()
            except PeerProtocolError as error:
                self._give_up(f"sending failed: {error}")
                return
            if not piece:
                return
            try:
                sent = self._socket.send(piece)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._give_up(f"sending failed: {error.strerror}")
                return
            if sent < len(piece):
                self._rest = [memoryview(piece)[sent:]]
                self._blocked = True
                self._loop.call_soon_threadsafe(self._wait_writable)
                return

    def _encrypted(self) -> ReadBuffer:
        """The next bytes for the socket, empty when there are none."""
        stream = self._stream
        if self._queue and self._records >= TLS_RECORDS_MAX:
            self._give_up(SPENT)
            return b""
        batch = self._batch()
        if batch:
            plain = batch[0] if len(batch) == 1 else b"".join(batch)
            # At least what was used: OpenSSL fills a record before it begins another, and one call
            # makes one record or all that it needs.
            steps = stream.write(plain)
            self._records += max(steps, -(-len(plain) // TLS_RECORD_BYTES))
            self._look_at_counts()
        return stream.outgoing.read()

    def _batch(self) -> list[ReadBuffer]:
        """Up to TLS_BATCH_BYTES of the queue, in its order."""
        queue, room = self._queue, TLS_BATCH_BYTES
        batch: list[ReadBuffer] = []
        while queue and room:
            item = queue.popleft()
            if len(item) > room:
                view = memoryview(item)
                queue.appendleft(view[room:])
                item = view[:room]
            batch.append(item)
            room -= len(item)
        return batch

    def _look_at_counts(self) -> None:
        if self._spent is not None and max(self._records, self._received) >= TLS_RECORDS_RENEW:
            self._loop.call_soon_threadsafe(self._spent)
            self._spent = None

    def _give_up(self, reason: str) -> None:
        self._blocked = True
        self._fail(reason)

    # --- receiving ------------------------------------------------------------------------------

    def recv_into(self, buffer: memoryview, /) -> int:
        """As a non-blocking socket: decrypted bytes, 0 at the end. From the receiver's thread.

        Raises:
            BlockingIOError: there are none now. OSError: the connection failed.
            PeerProtocolError: what came is not what the peer sent.
        """
        try:
            with self._lock:
                try:
                    return self._receive(buffer)
                finally:
                    self._keep_answers()
        finally:
            # What was queued meanwhile, by whoever found the lock taken, and what OpenSSL answers.
            if self._queue or self._rest:
                self.kick()

    def _receive(self, buffer: memoryview) -> int:
        while not self._closed:
            if not self._left:
                room = min(max(len(buffer), READ_BYTES_MIN), TLS_READ_BYTES)
                count = self._socket.recv_into(self._cipher[:room])
                if not count:
                    return 0
                self._stream.incoming.write(self._cipher[:count])
            got = self._decrypt(buffer)
            if got is not None:
                return got
        raise BlockingIOError

    def _decrypt(self, buffer: memoryview) -> int | None:
        """What is there, 0 at the end; None when it is no whole record."""
        stream, got = self._stream, 0
        self._left = False
        self._look_at_counts()
        while got < len(buffer):
            count = stream.read(buffer[got:])
            if count is None:
                return got or None
            if not count:
                # The end counts when what came before it was taken.
                self._look_again(got)
                return got
            got += count
            self._received += 1  # a record, or a part of one: never less than there were
            if not stream.incoming.pending and not stream.object.pending():
                return got
        self._look_again(got)
        return got

    def _look_again(self, got: int) -> None:
        """The socket need not become readable for what OpenSSL has already."""
        if got:
            self._left = True
            if not self._look_due:
                self._look_due = True
                self._loop.call_soon_threadsafe(self._looked)

    def _looked(self) -> None:
        self._look_due = False
        if not self._closed:
            self._look()

    def _keep_answers(self) -> None:
        """What reading made OpenSSL want to say leaves, too: alerts, answers to new keys."""
        outgoing = self._stream.outgoing
        if outgoing.pending > TLS_ANSWERS_BYTES_MAX:
            raise PeerProtocolError("TLS: the peer asks for answers and does not read them")
        if outgoing.pending and not self._rest:
            self._rest.append(outgoing.read())


def _nothing() -> None:
    """Before `begin`."""
