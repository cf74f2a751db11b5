"""Receiving from the peer: on the loop's thread, and by a stand-in while a disk holds that one up.

The loop's thread receives frames and, so that a write costs one wake-up, carries them out itself as
long as nothing blocks (ADR 13). A write into the page cache is not supposed to block, and now and
then does: the kernel throttles who dirties memory, a journal is full. Then nobody would answer the
peer's echoes, and a read lease that hangs on them (rule 17) would run out with the disk. So another
thread looks now and then whether the loop's is still at the same work, and receives meanwhile:
echoes are answered at once, data waits in the session's inbox for the path that is held up.

Owns who receives at a moment, and the calls that the loop's thread carries out itself. One lock:
whoever holds it receives. The loop's thread does not hold it while it carries something out, and
cannot go on without it, so no socket is closed under the stand-in. Must never be asked for that
lock by somebody who holds the engine's: the order is this one first.
"""

import threading
from _thread import allocate_lock
from collections.abc import Callable
from typing import Final, Protocol

import uvloop

from nbdmirror.core import dispatch
from nbdmirror.core.node import Node
from nbdmirror.core.session import Session
from nbdmirror.driver import Driver
from nbdmirror.errors import PeerProtocolError

# A third of the shortest lease has room for two of these.
LOOK_S: Final = 0.05


class Source(Protocol):
    """Where the bytes come from: the socket itself, or what stands between it and the frames."""

    def recv_into(self, buffer: memoryview, /) -> int:
        """As a non-blocking socket does it."""
        ...


class Receiver:
    """The receiving half of the peer channel. `begin` on the loop's thread, before anything."""

    def __init__(self, node: Node, driver: Driver) -> None:
        self._node = node
        self._driver = driver
        self._lock = allocate_lock()
        self._ready: list[Callable[[], None]] = []
        self._from: tuple[Source, Session] | None = None
        self._carrying_out = False
        self._turn = 0
        self._loop: uvloop.Loop
        self._thread = 0

    def begin(self, loop: uvloop.Loop) -> None:
        """This thread is the loop's."""
        self._loop = loop
        self._thread = threading.get_ident()

    # --- on the loop's thread -------------------------------------------------------------------

    def readable(self, connection: Source, session: Session) -> None:
        """Something arrived: sort it, answer what is answered at once, carry out the rest."""
        with self._lock:
            self._from = (connection, session)
            self._receive(connection, session)
        self._go_on(session)

    def take_frames(self, session: Session) -> None:
        """The same for what came right behind the handshake."""
        with self._lock:
            self._take_frames(session)
        self._go_on(session)

    def _go_on(self, session: Session) -> None:
        # Before the disk is asked for anything: a lease hangs on the answer to an echo.
        if session.outgoing:
            session.link.kick()
        self.carry_out()
        if session.outgoing:
            session.link.kick()

    def carry_out(self) -> None:
        """Run what became ready."""
        if not self._ready:
            return
        with self._lock:
            self._turn += 1
            self._carrying_out = True
        try:
            while self._ready:
                self._ready.pop(0)()
        finally:
            with self._lock:
                self._carrying_out = False

    # --- from any thread ------------------------------------------------------------------------

    def schedule(self, run: Callable[[], None]) -> None:
        """Let the loop's thread run it. May be asked under the engine's lock."""
        if threading.get_ident() == self._thread:
            self._ready.append(run)
        else:
            self._loop.call_soon_threadsafe(self._run_soon, run)

    def _run_soon(self, run: Callable[[], None]) -> None:
        self._ready.append(run)
        self.carry_out()

    # --- the stand-in ---------------------------------------------------------------------------

    def stand_in_for_ever(self) -> None:
        """Receive whenever the loop's thread is at one piece of work for longer than a look."""
        never = threading.Event()
        seen = 0
        while True:
            never.wait(LOOK_S)
            seen = self.stand_in(seen)

    def stand_in(self, seen: int) -> int:
        """One look; `seen` is the turn of the look before. Returns that of this one, 0 for none."""
        while True:
            with self._lock:
                if not self._carrying_out or self._from is None:
                    return 0
                if self._turn != seen:
                    return self._turn
                connection, session = self._from
                more = session.live and self._receive(connection, session)
            if session.outgoing:
                session.link.kick()
            if not more:
                return seen

    # --- under the lock -------------------------------------------------------------------------

    def _receive(self, connection: Source, session: Session) -> bool:
        """Take what the connection has; True when there may be more."""
        channel = session.channel
        try:
            count = connection.recv_into(channel.buffer_for_read())
            if count:
                channel.received(count)
        except (BlockingIOError, InterruptedError):
            return False
        except PeerProtocolError as error:
            return self._lost(session, str(error))
        except OSError as error:
            return self._lost(session, f"receiving failed: {error.strerror}")
        if count <= 0:
            return self._lost(session, "the peer closed the connection")
        self._take_frames(session)
        return True

    def _take_frames(self, session: Session) -> None:
        more = True
        while more:
            # Checked before the engine's lock is taken: a large payload takes its time.
            try:
                frames = session.channel.frames()
            except PeerProtocolError as error:
                with self._driver.lock:
                    dispatch.violation(self._node, session, error)
                return
            if not frames:
                return
            with self._driver.lock:
                more = dispatch.take(self._node, session, frames)

    def _lost(self, session: Session, reason: str) -> bool:
        with self._driver.lock:
            self._node.lose_session(session, reason)
        return False
