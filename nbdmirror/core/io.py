"""The life of a client's request: write, zero, trim, read, flush, each told once from top to
bottom.

Every path here is a generator (see ports.py): it runs under the engine's lock and yields what must
be done outside it. The rules behind the order of the lines are docs/safety.md 1 to 6; the order
is:

    role gate -> range lock -> room -> intent registered -> frame queued -> on the wire
    -> intent durable here -> local leg -> remote leg's verdict -> (alone: generation) -> done

Nothing here knows how a thread, a socket or a file works, and nothing here is repeated elsewhere.
"""

import errno
from contextlib import suppress

from nbdmirror.core.keeping import keep_before, keep_before_zeros
from nbdmirror.core.lease import may_answer, permission
from nbdmirror.core.messages import Stable
from nbdmirror.core.node import Node
from nbdmirror.core.ports import Path, ReadBuffer, WriteBuffer
from nbdmirror.core.ranges import Hold
from nbdmirror.core.session import EMPTY, Operation, Phase, Session, Verdict
from nbdmirror.core.wire import FrameFlag, FrameType
from nbdmirror.errors import (
    NbdMirrorError,
    NotPrimaryError,
    NotSupportedError,
    OutOfSpaceError,
    StoreError,
)
from nbdmirror.limits import (
    FRAME_PAYLOAD_BYTES_MAX,
    FRAME_SPAN_BYTES_MAX,
    MIB,
    UNFLUSHED_ENTRIES_MAX,
)

REGIONS_PER_PIECE_MAX = 128
SLOW_PIECE_BYTES_MAX = 16 * MIB


def write(node: Node, buffer: ReadBuffer, offset: int, flags: int) -> Path:
    """Write `buffer` at `offset` on both nodes, or on this one if it may act alone.

    `flags` may hold FrameFlag.FUA: durable on every side before it is acknowledged.

    Raises:
        NotPrimaryError: nothing was done, or (after a freeze) the outcome is unknown.
        OutOfSpaceError: nobody could take it; StoreError: the last copy failed.
    """
    return request(node, FrameType.WRITE, offset, offset + len(buffer), buffer, flags)


def zero(node: Node, offset: int, length: int, flags: int) -> Path:
    """Make a range read as zeros on both nodes; FrameFlag.MAY_TRIM lets it give the space back."""
    return request(node, FrameType.ZERO, offset, offset + length, EMPTY, flags)


def trim(node: Node, offset: int, length: int, flags: int) -> Path:
    """Give a range back on both nodes; it reads as zeros on both afterwards.

    Raises:
        NotSupportedError: one of the two file systems cannot promise that (agreed at the
        handshake).
    """
    node.require_primary()
    if not node.trim_ok:
        raise NotSupportedError("trim: not on both file systems does a hole read as zeros")
    yield from request(node, FrameType.TRIM, offset, offset + length, EMPTY, flags)


def request(  # noqa: C901, PLR0912 - the life of a write, on one screen on purpose
    node: Node, kind: FrameType, offset: int, end: int, payload: ReadBuffer, flags: int
) -> Path:
    """Everything that changes data, from the gate to "done", in pieces under one range lock.

    It returns only when every verdict is there, also after an error: a frame that is still queued
    shows the caller's buffer, so the caller may not have it back before the frame is sent and
    answered or its session closed.
    """
    epoch = node.require_primary()
    if offset == end:
        return
    hold = node.locks.acquire(offset, end, True)
    operations: list[Operation] = []
    failure: NbdMirrorError | None = None
    try:
        if hold.waiter is not None:
            yield (hold.waiter.wait,)
        operations = pieces(node, kind, offset, end, payload, flags)
        try:
            for operation in operations:
                node.require_term(epoch)
                while not admitted(node, operation):
                    yield from make_room(node, operation)
                    node.require_term(epoch)
                version, session = register(node, operation)
                if session is not None:
                    yield (session.link.kick,)
                try:
                    if version:
                        yield from node.commit(version)
                    yield from change_here(node, operation)
                except NbdMirrorError as error:
                    # The peer may have done it: no error of any kind passes without a verdict.
                    yield from local_failure(node, operation, as_store_error(error))
                node.local_leg_ended(operation)
        except (StoreError, NotPrimaryError) as error:
            failure = error
        for operation in operations:
            if operation.verdict is None and operation.seq:
                yield (operation.waiter.wait,)
        if failure is not None:
            raise failure
        for operation in operations:
            if operation.verdict is not Verdict.ACKNOWLEDGED:
                yield from conclude(node, operation)
        if node.failed:
            yield from require_counting(node)
    finally:
        leave(node, hold, operations)


def as_store_error(error: NbdMirrorError) -> StoreError:
    """Any refusal of the local leg, as the failure of this copy that it is."""
    return error if isinstance(error, StoreError) else StoreError(errno.EIO, str(error))


def pieces(
    node: Node, kind: FrameType, offset: int, end: int, payload: ReadBuffer, flags: int
) -> list[Operation]:
    """One operation per frame: payloads that a frame takes, ranges that the intent log can hold."""
    waiter = node.shell.waiter
    if kind is not FrameType.WRITE:
        size = span_bytes_max(node)
        return [
            Operation(kind, at, min(at + size, end), EMPTY, flags, waiter())
            for at in range(offset, end, size)
        ]
    if end - offset <= FRAME_PAYLOAD_BYTES_MAX:
        return [Operation(kind, offset, end, payload, flags, waiter())]
    size = FRAME_PAYLOAD_BYTES_MAX
    view = memoryview(payload)
    return [
        Operation(
            kind,
            at,
            min(at + size, end),
            view[at - offset : min(at + size, end) - offset],
            flags,
            waiter(),
        )
        for at in range(offset, end, size)
    ]


def span_bytes_max(node: Node) -> int:
    """The longest range that one frame without a payload may name."""
    size = min(FRAME_SPAN_BYTES_MAX, REGIONS_PER_PIECE_MAX * node.geometry.region_bytes)
    if not node.fast_zero_ok:
        # One side may have to write the zeros: each piece within the peer's deadline.
        size = min(size, SLOW_PIECE_BYTES_MAX)
    return size


def register(node: Node, operation: Operation) -> tuple[int, Session | None]:
    """Give an operation its number, its intent, and its place: in the window, or in the map.

    Returns the log version to wait for (0: durable already) and the session to kick, if any.
    """
    offset, end = operation.offset, operation.end
    node.seq = seq = node.seq + 1
    operation.seq = seq
    node.inflight[operation] = None
    version = node.touch(offset, end, seq)
    session = node.session
    if session is not None and session.sending:
        node.remember_unflushed(seq, offset, end)
        session.submit(operation)
        return version, session
    if node.right:
        node.dirty.mark(offset, end)
        operation.verdict = Verdict.ALONE
    else:
        # Frozen: if the session is resumed this goes out under the same number.
        node.remember_unflushed(seq, offset, end)
    return version, None


def change_here(node: Node, operation: Operation) -> Path:
    """The local leg; what a copy that was given up held there is kept first (rule 19)."""
    is_write = operation.kind is FrameType.WRITE
    if node.keep.kept is not None:
        keep = keep_before if is_write else keep_before_zeros
        yield from keep(node, operation.offset, operation.end)
    yield local_leg(node, operation)
    if operation.durable and not is_write:
        yield (node.store.fdatasync,)


def local_leg(node: Node, operation: Operation) -> tuple[object, ...]:
    """The one call that changes the local file."""
    if operation.kind is FrameType.WRITE:
        if operation.durable:
            return (node.store.pwrite_durable, operation.payload, operation.offset)
        return (node.store.pwrite, operation.payload, operation.offset)
    length = operation.end - operation.offset
    if operation.kind is FrameType.TRIM:
        return (node.store.trim, operation.offset, length)
    return (
        node.store.zero,
        operation.offset,
        length,
        bool(operation.flags & FrameFlag.MAY_TRIM),
    )


def conclude(node: Node, operation: Operation) -> Path:
    """Do what the verdict on the remote leg asks for before "done" is said."""
    if operation.verdict is Verdict.FENCED:
        raise NotPrimaryError("stepped back while the request was in flight: outcome unknown")
    if operation.verdict is Verdict.ALONE:
        yield from node.begin_generation()
        node.require_primary()


def admitted(node: Node, operation: Operation) -> bool:
    """Whether window, intent log and the bound of the background flush have room for it."""
    session = node.session
    if session is not None and session.sending:
        if not session.has_room(len(operation.payload)):
            return False
        if node.unflushed_bytes >= node.settings.flush_bytes:
            if not node.background_flush:
                node.shell.spawn("background-flush", background_flush(node))
            if node.unflushed_full():
                return False
        elif len(node.unflushed) >= UNFLUSHED_ENTRIES_MAX:
            return False
    return node.log_has_room(operation.offset, operation.end)


def make_room(node: Node, operation: Operation) -> Path:
    """Back-pressure: wait for the window, flush both nodes, or evict regions, as is needed."""
    session = node.sending_session()
    if session is not None and not session.has_room(len(operation.payload)):
        yield from session.room(len(operation.payload))
    elif node.frozen:
        yield from node.wait_for_answer()
    elif node.unflushed_full():
        yield from flush_pair(node)
    else:
        evicted = yield from node.evict()
        if not evicted:
            yield from flush_pair(node)


def leave(node: Node, hold: Hold, operations: list[Operation]) -> None:
    """Take a finished request out of all tables."""
    for operation in operations:
        if operation.seq:
            node.finish(operation)
    node.locks.release(hold)


def local_failure(node: Node, operation: Operation, error: StoreError) -> Path:
    """Rule 5: a local failure is never acknowledged while another copy could serve.

    Alone, "no space" goes to the client and nothing is detached; any other failure of the last
    copy is EIO until the operator declares it good. With a peer that is up to date the request
    freezes and this node steps back.
    """
    session = node.session
    lost = not isinstance(error, OutOfSpaceError)
    if session is not None and session.sending and session.phase is Phase.SYNCED:
        node.note_failure(str(error), lost=lost)
        yield from step_aside(node)
    if isinstance(error, OutOfSpaceError) and node.right:
        node.mark_different(operation.offset, operation.end)
        raise error
    node.note_failure(str(error), lost=lost)
    if session is not None:
        node.lose_session(session, f"the local disk failed: {error}")
    if not node.right:
        yield from step_aside(node)
    raise error


def require_counting(node: Node) -> Path:
    """Rule 5: what was done while this copy failed is on the peer only, so it is not acknowledged.

    Alone, this request was carried out before the failure or beside it; the next one hears of it.

    Raises:
        NotPrimaryError: this node has stepped back.
    """
    if not node.right:
        yield from step_aside(node)


def step_aside(node: Node) -> Path:
    """Hold a request that this disk failed until this node has stepped back.

    Raises:
        NotPrimaryError: it has. Another copy may serve, so this disk's error would be no answer.
    """
    node.ask("local-failure")
    yield from node.wait_for_fence()
    raise NotPrimaryError("the local disk failed and this node stepped back: outcome unknown")


def read(node: Node, buffer: WriteBuffer, offset: int) -> Path:
    """Fill `buffer` from the local file; a read waits for an overlapping write in flight.

    What was read may not vanish at a failover, so a range whose write is not yet on both nodes is
    not shown. The gate is asked again afterwards: a node deposed meanwhile answers nothing; nor
    does one whose lease has run out, as it may be deposed (rule 17). A read that has to wait for
    that keeps nothing locked.
    """
    epoch = node.require_primary()
    mark = node.lease.number
    hold = node.locks.acquire(offset, offset + len(buffer), False)
    try:
        if hold.waiter is not None:
            yield (hold.waiter.wait,)
            node.require_primary()
        try:
            yield (node.store.pread, buffer, offset)
        except StoreError as error:
            node.note_failure(str(error))
            if not node.right:
                yield from step_aside(node)
            raise
        node.require_primary()
    finally:
        node.locks.release(hold)
    if node.shell.now_ms() >= node.lease.until_ms and not may_answer(node, mark):
        yield from permission(node, epoch, mark)


def extents(node: Node, offset: int, length: int) -> Path:
    """(start, end) of what may hold data in the range, ascending.

    It waits like a read: that a range reads as zeros is content, and may not vanish either.
    """
    epoch = node.require_primary()
    mark = node.lease.number
    hold = node.locks.acquire(offset, offset + length, False)
    try:
        if hold.waiter is not None:
            yield (hold.waiter.wait,)
            node.require_primary()
        runs = yield (node.store.data_runs, offset, length)
        node.require_primary()
    finally:
        node.locks.release(hold)
    if node.shell.now_ms() >= node.lease.until_ms and not may_answer(node, mark):
        yield from permission(node, epoch, mark)
    return runs


def flush(node: Node) -> Path:
    """Return when everything acknowledged before is durable on every node that has it."""
    node.require_primary()
    yield from flush_pair(node)
    if node.failed:
        yield from require_counting(node)
    node.require_primary()


def flush_pair(node: Node) -> Path:
    """One flush of both legs; on both, it also moves `stable_seq` (rules 3 and 5).

    Everything up to `stable` was complete here before the local flush began, and the peer reports a
    flush that began after it had applied the same.
    """
    session = node.sending_session()
    if session is not None:
        yield from session.room(0)
        session = node.sending_session()
    operation = Operation(FrameType.FLUSH, 0, 0, EMPTY, 0, node.shell.waiter())
    stable = complete_seq(node)
    waits = session is not None or node.frozen
    if waits:
        node.seq = operation.seq = node.seq + 1
        node.inflight[operation] = None
    try:
        if session is not None:
            session.submit(operation)
            yield (session.link.kick,)
        yield from flush_here(node, operation)
        if not waits:
            return
        if operation.verdict is None:
            yield (operation.waiter.wait,)
        yield from conclude(node, operation)
        if operation.verdict is Verdict.ALONE:
            # Frozen, then alone: what was written in between is made durable here, too.
            yield from flush_here(node, operation)
        elif session is not None and session.live:
            settle_stable(node, session, stable)
    finally:
        if waits:
            node.finish(operation)


def flush_here(node: Node, operation: Operation) -> Path:
    """The local leg of a flush; a failure of it is one of this copy, whenever it comes."""
    node.syncing[operation] = None
    try:
        yield (node.store.fdatasync,)
    except StoreError as error:
        yield from local_failure(node, operation, error)
    finally:
        del node.syncing[operation]


def background_flush(node: Node) -> Path:
    """Flush both nodes beside the clients: this bounds the flush of a failover (rule 10).

    Nobody waits for it: that this node stepped back, or that its disk failed, was told by whoever
    decided or noticed it.
    """
    if node.background_flush:
        return
    node.background_flush = True
    try:
        with suppress(NotPrimaryError, StoreError):
            yield from flush_pair(node)
    finally:
        node.background_flush = False


def settle_stable(node: Node, session: Session, stable: int) -> None:
    """Both nodes flushed up to `stable`: remember it, and tell the peer before the next frame.

    Never from a failed copy: a write that it did not carry out, but its peer did, has left the
    table of what is in flight.
    """
    if stable > node.stable_seq and not node.failed:
        node.advance_stable(stable)
        session.tell(Stable(seq=stable))


def complete_seq(node: Node) -> int:
    """The highest sequence number up to which every local leg is done."""
    for operation in node.inflight:
        if not operation.local_done:
            return operation.seq - 1
    return node.seq
