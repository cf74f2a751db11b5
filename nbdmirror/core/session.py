"""One session with the peer: what was sent, what was acknowledged, what arrived.

Owns the window of operations in flight, the queue of bytes to send, the inbox of frames to apply
and the mailbox of answers that a path waits for. It decides nothing about roles: when it ends it
tells the node, which does. Everything here runs under the engine's lock and returns at once,
except the two paths `expect` and `room`.

Sequence numbers belong to the sender and rise by one per data frame for the life of its engine,
across sessions, so "flushed up to N" means one thing only.
"""

from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Any

from nbdmirror.core.messages import Message
from nbdmirror.core.ports import Path, ReadBuffer, Shell, Waiter
from nbdmirror.core.wire import Frame, FrameFlag, FrameType
from nbdmirror.errors import PeerProtocolError, SessionLostError
from nbdmirror.limits import (
    COMMAND_TIMEOUT_MS,
    WINDOW_BYTES_MAX,
    WINDOW_ENTRIES_MAX,
)

if TYPE_CHECKING:
    from nbdmirror.core.channel import Channel
    from nbdmirror.core.ports import Link

EMPTY = b""
# A plain number: an enum's `&` costs as much as the rest of Operation.__init__.
FUA = int(FrameFlag.FUA)


class Phase(Enum):
    """Where a session stands. A session only moves down this list."""

    NEGOTIATING = "negotiating"
    RESYNC = "resync"
    JOINT = "joint"
    SYNCED = "synced"
    CLOSED = "closed"


class Verdict(Enum):
    """What became of the remote leg of an operation."""

    ACKNOWLEDGED = "acknowledged"
    ALONE = "alone"
    FENCED = "fenced"


class Operation:
    """One data frame and the path that waits for it.

    `end` is exclusive. `payload` is the caller's buffer: it may be read until the verdict is there.
    """

    __slots__ = (
        "durable",
        "end",
        "flags",
        "kind",
        "local_done",
        "offset",
        "payload",
        "seq",
        "verdict",
        "waiter",
    )

    def __init__(
        self,
        kind: FrameType,
        offset: int,
        end: int,
        payload: ReadBuffer,
        flags: int,
        waiter: Waiter,
    ) -> None:
        self.kind = kind
        self.offset = offset
        self.end = end
        self.payload = payload
        self.flags = flags
        self.durable = flags & FUA != 0 or kind is FrameType.FLUSH
        self.local_done = kind is FrameType.FLUSH
        self.seq = 0
        self.verdict: Verdict | None = None
        self.waiter = waiter

    def settle(self, verdict: Verdict) -> None:
        """Fix the verdict and wake the waiting path. The first verdict stays."""
        if self.verdict is None:
            self.verdict = verdict
            self.waiter.wake()


class Session:
    """One authenticated connection, from the handshake to its end. Never reused.

    `tls`: version and cipher of what is around it, "" for nothing.
    """

    def __init__(self, shell: Shell, channel: "Channel", link: "Link", *, tls: str = "") -> None:
        established = channel.established
        assert established is not None
        self.shell = shell
        self.channel = channel
        self.link = link
        self.number = established.session
        self.hash_key = established.hash_key
        self.peer = established.peer
        self.integrity = "mac" if established.frame_macs else "crc"
        self.tls = tls
        self.phase = Phase.NEGOTIATING
        self.live = True
        self.sending = False
        self.receiving = False
        self.may_receive = False
        self.heard = True
        self.reason = ""
        self.peer_primary = False
        self.peer_left = False
        self.peer_attended = False
        # Sender.
        self.window: deque[Operation] = deque()
        self.window_bytes = 0
        self.awaiting_flush: deque[Operation] = deque()
        self.resync_window: deque[tuple[int, int]] = deque()
        self.outgoing: deque[ReadBuffer] = deque()
        self.hash_waiters: dict[int, Waiter] = {}
        self.acked_seq = 0
        self.peer_flushed_seq = 0
        self._room_waiters: deque[Waiter] = deque()
        # Receiver.
        self.inbox: list[Frame] = []
        self.applied_seq = 0
        self.stable_seq = 0
        self.flush_wanted_seq = 0
        self.flush_done_seq = 0
        self.flushing = False
        self.inbox_waiter: Waiter | None = None
        # Answers.
        self._mailbox: deque[Message] = deque()
        self._mail_waiter: Waiter | None = None

    # --- sender -----------------------------------------------------------------------------

    def has_room(self, payload_bytes: int) -> bool:
        """Whether the window takes one more operation of that size."""
        return (
            self.window_bytes + payload_bytes <= WINDOW_BYTES_MAX
            and len(self.window) + len(self.resync_window) < WINDOW_ENTRIES_MAX
        ) or not self.live

    def room(self, payload_bytes: int) -> Path:
        """Wait until the window takes `payload_bytes` more, or the session ends."""
        while not self.has_room(payload_bytes):
            waiter = self.shell.waiter()
            self._room_waiters.append(waiter)
            yield (waiter.wait,)

    def submit(self, operation: Operation) -> None:
        """Register an operation in the window, then queue its frame: in that order."""
        assert self.live
        assert self.sending
        assert not self.window or self.window[-1].seq < operation.seq
        self.window.append(operation)
        payload = operation.payload
        length = len(payload)
        self.window_bytes += length
        kind = operation.kind
        aux = 0
        if kind is FrameType.ZERO or kind is FrameType.TRIM:
            aux = operation.end - operation.offset
        self.queue(kind, operation.flags, operation.seq, operation.offset, aux, payload)

    def submit_resync(
        self, kind: FrameType, seq: int, offset: int, aux: int, payload: ReadBuffer
    ) -> None:
        """Queue one frame of the resync; nobody waits for its acknowledgement alone."""
        assert self.live
        assert self.sending
        self.resync_window.append((seq, len(payload)))
        self.window_bytes += len(payload)
        # What is a hole here may be one there; a target that is not sparse keeps its space anyway.
        flags = int(FrameFlag.MAY_TRIM) if kind is FrameType.RESYNC_ZERO else 0
        self.queue(kind, flags, seq, offset, aux, payload)

    def queue(
        self, kind: FrameType, flags: int, seq: int, offset: int, aux: int, payload: ReadBuffer
    ) -> None:
        """Append one frame to the bytes to send."""
        self.outgoing.append(self.channel.encode(kind, flags, seq, offset, aux, payload))
        if payload:
            self.outgoing.append(payload)

    def tell(self, message: Message) -> None:
        """Queue one authenticated control message."""
        if self.live:
            self.outgoing.append(self.channel.control_frame(message))

    def acknowledged(self, seq: int) -> None:
        """The peer applied everything up to `seq`."""
        self.acked_seq = max(self.acked_seq, seq)
        window = self.window
        while window and window[0].seq <= seq:
            operation = window.popleft()
            self.window_bytes -= len(operation.payload)
            if operation.durable:
                self.awaiting_flush.append(operation)
            else:
                operation.verdict = Verdict.ACKNOWLEDGED
                operation.waiter.wake()
        resync = self.resync_window
        while resync and resync[0][0] <= seq:
            self.window_bytes -= resync.popleft()[1]
        if self._room_waiters:
            self._wake_room()

    def flushed(self, seq: int) -> None:
        """The peer made everything up to `seq` durable."""
        self.acknowledged(seq)
        self.peer_flushed_seq = max(self.peer_flushed_seq, seq)
        waiting = self.awaiting_flush
        while waiting and waiting[0].seq <= seq:
            waiting.popleft().settle(Verdict.ACKNOWLEDGED)

    def _wake_room(self) -> None:
        while self._room_waiters:
            self._room_waiters.popleft().wake()

    # --- receiver ---------------------------------------------------------------------------

    def wake_replica(self) -> None:
        """Frames were put into the inbox, or the session ended."""
        if self.inbox_waiter is not None:
            waiter, self.inbox_waiter = self.inbox_waiter, None
            waiter.wake()

    # --- answers ----------------------------------------------------------------------------

    def mail(self, message: Message) -> None:
        """Hand an answer to the path that expects it."""
        if len(self._mailbox) >= 16:
            raise PeerProtocolError("16 control messages that nobody asked for")
        self._mailbox.append(message)
        self._wake_mail()

    def _wake_mail(self) -> None:
        if self._mail_waiter is not None:
            waiter, self._mail_waiter = self._mail_waiter, None
            waiter.wake()

    def expect(self, kind: type[Message], timeout_ms: int = COMMAND_TIMEOUT_MS) -> Path:
        """Like expect_any, for one kind."""
        return (yield from self.expect_any((kind,), timeout_ms))

    def expect_any(
        self, kinds: tuple[type[Message], ...], timeout_ms: int = COMMAND_TIMEOUT_MS
    ) -> Path:
        """Wait for the next answer, which must be of one of those kinds; returns it.

        Raises:
            SessionLostError: the session ended first.
            PeerProtocolError: another message came, or none in time.
        """
        names = " or ".join(kind.__name__ for kind in kinds)
        while not self._mailbox:
            if not self.live:
                raise SessionLostError(self.reason)
            self._mail_waiter = waiter = self.shell.waiter()
            if not (yield (waiter.wait, timeout_ms / 1000)):
                raise PeerProtocolError(f"no {names} within {timeout_ms} ms")
        message = self._mailbox.popleft()
        if not isinstance(message, kinds):
            raise PeerProtocolError(f"expected {names}, the peer sent {type(message).__name__}")
        return message

    def drained(self) -> Path:
        """Wait until the peer has taken what was queued: a long list is sent in bounded parts."""
        while self.live and len(self.outgoing) > 64:
            yield (self.link.drain,)

    # --- end --------------------------------------------------------------------------------

    def close(self, reason: str) -> None:
        """End the session: nothing more is sent, applied or believed. Idempotent."""
        if not self.live:
            return
        self.phase = Phase.CLOSED
        self.live = False
        self.reason = reason
        self.link.close(reason)
        self.outgoing.clear()
        self._mailbox.clear()
        self._wake_room()
        self._wake_mail()
        self.wake_replica()
        for hash_waiter in self.hash_waiters.values():
            hash_waiter.wake(None)
        self.hash_waiters.clear()

    def describe(self) -> dict[str, Any]:
        """Facts for the state command."""
        return {
            "number": f"{self.number:016x}",
            "phase": self.phase.value,
            "integrity": self.integrity,
            "tls": self.tls,
            "peer_instance": self.peer.instance.hex(),
            "peer_primary": self.peer_primary,
            "peer_attended": self.peer_attended,
            "sending": self.sending,
            "in_flight": len(self.window) + len(self.resync_window),
            "in_flight_bytes": self.window_bytes,
            "acknowledged_seq": self.acked_seq,
            "applied_seq": self.applied_seq,
        }
