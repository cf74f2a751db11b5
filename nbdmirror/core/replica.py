"""The secondary's side: apply what arrives, in order, and say so.

One path per session applies; one beside it flushes, so that a flush does not hold up the writes
behind it. A frame of a session that was closed is dropped, never applied: promotion closes the
session and waits for these paths to end before it opens the gate (rule 6).
"""

import errno

from nbdmirror.core.checks import keyed_hash
from nbdmirror.core.joint import joined
from nbdmirror.core.keeping import keep_before, keep_before_zeros, wait_for_space
from nbdmirror.core.leave import answer_leave
from nbdmirror.core.messages import Failed, JointTake, JointTaken, LeaveAsk, Stable
from nbdmirror.core.node import Node
from nbdmirror.core.ports import Path
from nbdmirror.core.session import EMPTY, FUA, Session
from nbdmirror.core.superblock import DataState
from nbdmirror.core.wire import Frame, FrameFlag, FrameType
from nbdmirror.errors import (
    NbdMirrorError,
    NoRoomToKeepError,
    OutOfSpaceError,
    PeerProtocolError,
    SessionLostError,
    StoreError,
)
from nbdmirror.limits import HASH_BLOCK_BYTES, MIB

RANGED = frozenset({FrameType.ZERO, FrameType.TRIM, FrameType.RESYNC_ZERO})
RESYNC = frozenset({FrameType.RESYNC_DATA, FrameType.RESYNC_ZERO})
ACK_BYTES = MIB
# What the smallest frame counts for: a disk can be slow in requests as well as in bytes.
ACK_BYTES_OF_FRAME = ACK_BYTES // 32
WRITES = frozenset({FrameType.WRITE, FrameType.RESYNC_DATA}) | RANGED


def replica(node: Node, session: Session) -> Path:
    """Apply the frames of one session until it ends. Spawned once per receiving session."""
    node.enter(session)
    try:
        while session.live:
            if not session.inbox:
                session.inbox_waiter = waiter = node.shell.waiter()
                yield (waiter.wait,)
                continue
            frames, session.inbox = session.inbox, []
            yield from apply(node, session, frames)
    except SessionLostError:
        pass
    except PeerProtocolError as error:
        node.lose_session(session, str(error))
    except NoRoomToKeepError as error:
        yield from wait_for_space(node, session, error)
    except NbdMirrorError as error:
        yield from fail(node, session, error)
    finally:
        node.leave(session)


def fail(node: Node, session: Session, error: NbdMirrorError) -> Path:
    """This copy cannot go on: record it where data was lost, tell the peer, end the session."""
    number = error.number if isinstance(error, StoreError) else errno.EIO
    node.note_failure(str(error), lost=not isinstance(error, OutOfSpaceError))
    if node.failure_lost:
        yield from node.record_failure()
    session.tell(Failed(errno=number, where=str(error)))
    yield (session.link.kick,)
    node.lose_session(session, f"this node's disk failed: {error}")


def apply(node: Node, session: Session, frames: list[Frame]) -> Path:
    """Intents of the whole batch with one commit, then the frames one by one, then one answer.

    Raises:
        SessionLostError: the session was closed; the rest of the batch is dropped.
        PeerProtocolError: more is in flight than a sender that keeps the rules can have.
    """
    index = 0
    while index < len(frames):
        stop, version = register(node, frames, index)
        if stop == index:
            if not (yield from node.evict()):
                raise PeerProtocolError("more regions in flight than the intent log can hold")
            continue
        if version:
            yield from node.commit(version)
        unacknowledged = 0
        for frame in frames[index:stop]:
            if not session.live:
                raise SessionLostError(session.reason)
            if frame.type is FrameType.WRITE and node.keep.kept is None:
                yield (node.store.pwrite, frame.payload, frame.offset)
                session.applied_seq = frame.seq
                unacknowledged += max(len(frame.payload), ACK_BYTES_OF_FRAME)
                if frame.flags:
                    want_flush(node, session, frame.seq)
            else:
                yield from apply_one(node, session, frame)
                unacknowledged += work_of(frame)
            if unacknowledged >= ACK_BYTES:
                # A slow disk makes progress: the sender's deadline is for one that makes none.
                unacknowledged = 0
                yield from acknowledge(session)
        index = stop
        yield from acknowledge(session)


def keep_old(node: Node, frame: Frame) -> Path:
    """What a copy that was given up held is kept before a frame changes it (rule 19)."""
    if node.keep.kept is None:
        return
    if frame.type in RANGED:
        yield from keep_before_zeros(node, frame.offset, frame.offset + frame.aux)
    else:
        yield from keep_before(node, frame.offset, frame.offset + len(frame.payload))


def work_of(frame: Frame) -> int:
    """How many bytes a frame made this node's disk read or write."""
    return 0 if frame.type is FrameType.CONTROL else frame.aux + len(frame.payload)


def acknowledge(session: Session) -> Path:
    """Say up to which frame this node has applied."""
    if session.live and session.applied_seq > session.acked_seq:
        session.acked_seq = session.applied_seq
        session.queue(FrameType.ACK, 0, session.applied_seq, 0, 0, EMPTY)
        yield (session.link.kick,)


def register(node: Node, frames: list[Frame], index: int) -> tuple[int, int]:
    """Mark the regions of as many frames as the hot set takes; returns (end index, log version).

    The range is remembered as unflushed before its data is written, so nothing that a crash or the
    loss of the peer could leave different is ever outside log, map and this list (rule 3).

    Blocks of a resync need no intent: this copy is durably inconsistent, and the source keeps each
    bit until both have flushed. A sparse terabyte would want more regions hot than the log holds.
    """
    version = 0
    while index < len(frames):
        frame = frames[index]
        kind = frame.type
        if kind in WRITES:
            end = frame.offset + (frame.aux if kind in RANGED else len(frame.payload))
            if kind not in RESYNC:
                if not node.log_has_room(frame.offset, end):
                    break
                needed = node.touch(frame.offset, end, frame.seq)
                version = max(version, needed)
            node.remember_unflushed(frame.seq, frame.offset, end)
        index += 1
    return index, version


def apply_one(node: Node, session: Session, frame: Frame) -> Path:
    """Carry out any frame; the common WRITE is done by `apply` itself."""
    kind = frame.type
    if kind in RESYNC and node.sb.data_state is not DataState.INCONSISTENT:
        raise PeerProtocolError("a block of a resync, but this node is not inconsistent yet")
    if kind in WRITES:
        yield from keep_old(node, frame)
    if kind is FrameType.RESYNC_DATA or kind is FrameType.WRITE:
        yield (node.store.pwrite, frame.payload, frame.offset)
    elif kind is FrameType.ZERO or kind is FrameType.RESYNC_ZERO:
        yield (node.store.zero, frame.offset, frame.aux, bool(frame.flags & FrameFlag.MAY_TRIM))
    elif kind is FrameType.TRIM:
        yield (node.store.trim, frame.offset, frame.aux)
    elif kind is FrameType.HASH:
        yield from compare(node, session, frame)
    elif kind is FrameType.CONTROL:
        yield from control(node, session, frame)
        return
    session.applied_seq = frame.seq
    if kind is FrameType.FLUSH or frame.flags & FUA:
        want_flush(node, session, frame.seq)


def control(node: Node, session: Session, frame: Frame) -> Path:
    """A control message whose place among the writes matters."""
    message = frame.payload
    if isinstance(message, Stable):
        forget_stable(node, session, message.seq)
    elif isinstance(message, JointTake):
        if message.last_seq != session.applied_seq:
            raise PeerProtocolError(
                f"joint step at {message.last_seq}, applied {session.applied_seq}"
            )
        yield (node.store.fdatasync,)
        yield from take_joint(node, session, message.generation)
    elif isinstance(message, LeaveAsk):
        answer_leave(node, session, message)
        yield (session.link.kick,)
    else:
        raise PeerProtocolError(f"{type(message).__name__} among the writes")


def take_joint(node: Node, session: Session, generation: bytes) -> Path:
    """Rule 9 (c): everything is flushed; take the joint generation and be up to date.

    Raises:
        SessionLostError: the session ended first; nothing was taken.
    """
    if not session.live:
        raise SessionLostError(session.reason)
    yield from node.change(joined(node, session, generation, keep_primary=False))
    if not session.live:
        raise SessionLostError(session.reason)
    node.dirty.clear(0, node.geometry.extent_count)
    node.in_sync(session)
    session.tell(JointTaken(generation=generation))
    yield (session.link.kick,)


def forget_stable(node: Node, session: Session, seq: int) -> None:
    """The sender says that both nodes have flushed up to `seq`."""
    if seq > session.flush_done_seq:
        raise PeerProtocolError(
            f"stable up to {seq}, but this node has flushed only up to {session.flush_done_seq}"
        )
    session.stable_seq = seq
    node.advance_stable(seq)


def want_flush(node: Node, session: Session, seq: int) -> None:
    """Ask the flushing path to report `seq` durable; starts it if it is idle."""
    session.flush_wanted_seq = seq
    if not session.flushing:
        session.flushing = True
        node.shell.spawn("replica-flush", flusher(node, session))


def flusher(node: Node, session: Session) -> Path:
    """Flush until nothing more is wanted; each report covers what was applied before it began.

    Blocks of a resync leave no intent in the log, and the source clears its bits by this report. So
    the log gets a new number first, and the source hears of it first: a copy that is set back to
    before the blocks shows a lower one.
    """
    node.enter(session)
    try:
        while session.live and session.flush_done_seq < session.flush_wanted_seq:
            seq = session.applied_seq
            yield (node.store.fdatasync,)
            if node.sb.data_state is DataState.INCONSISTENT:
                yield from node.commit_anew()
            session.flush_done_seq = seq
            if session.live:
                session.queue(FrameType.ECHO_REQUEST, 0, 0, 0, node.log.txn, EMPTY)
                session.queue(FrameType.FLUSHED, 0, seq, 0, 0, EMPTY)
                yield (session.link.kick,)
    except NbdMirrorError as error:
        yield from fail(node, session, error)
    finally:
        session.flushing = False
        node.leave(session)


def compare(node: Node, session: Session, frame: Frame) -> Path:
    """Answer a HASH frame: one bit per block, set where this node's bytes differ."""
    blocks = (frame.aux + HASH_BLOCK_BYTES - 1) // HASH_BLOCK_BYTES
    buffer = bytearray(frame.aux)
    yield (node.store.pread, buffer, frame.offset)
    bitmap = yield (differing, session.hash_key, buffer, bytes(frame.payload), blocks)
    if session.live:
        session.queue(FrameType.HASH_REPLY, 0, frame.seq, 0, 0, bitmap)
        yield (session.link.kick,)


def differing(key: bytes, buffer: bytearray, hashes: bytes, blocks: int) -> bytes:
    """The bitmap of blocks whose keyed hash differs, MSB first. Yielded: it is slow."""
    view = memoryview(buffer)
    bitmap = bytearray((blocks + 7) // 8)
    for index in range(blocks):
        block = view[index * HASH_BLOCK_BYTES : (index + 1) * HASH_BLOCK_BYTES]
        if keyed_hash(key, block) != hashes[index * 16 : index * 16 + 16]:
            bitmap[index // 8] |= 0x80 >> (index % 8)
    return bytes(bitmap)
