"""The resync, as the source: copy what is dirty while the clients go on writing.

Blocks are read under a shared range lock and travel in the same session and order as the writes,
so an older block never overtakes a newer one (rule 4). A bit is cleared only when both nodes have
flushed past the copy (rule 3, `Node.advance_stable`); a session that ends before that leaves the
bit set, so a resync that is interrupted anywhere goes on where it was. Several workers share one
cursor, because a comparison by hash costs a round trip.
"""

from nbdmirror.core.checks import keyed_hash
from nbdmirror.core.io import flush_pair, span_bytes_max
from nbdmirror.core.node import Node
from nbdmirror.core.ports import Path, ReadBuffer, Waiter
from nbdmirror.core.session import EMPTY, Session
from nbdmirror.core.wire import FrameType
from nbdmirror.errors import NbdMirrorError, PeerProtocolError, SessionLostError
from nbdmirror.limits import (
    COMMAND_TIMEOUT_MS,
    HASH_BLOCK_BYTES,
    RESYNC_CHUNK_BYTES,
    RESYNC_CHUNKS_AHEAD,
)

ZEROS = bytes(RESYNC_CHUNK_BYTES)


class Pass:
    """One sweep over the dirty map, shared by its workers."""

    def __init__(self) -> None:
        self.cursor = 0
        self.workers = 0
        self.failure: NbdMirrorError | None = None
        self.done: Waiter | None = None


def resync(node: Node, session: Session) -> Path:
    """Copy until the map is empty and both nodes have flushed it.

    Raises:
        SessionLostError: the session ended; what was not copied and flushed is still dirty.
        StoreError: this node's disk failed.
    """
    total = node.dirty.count * node.geometry.extent_bytes
    node.resync = {"total_bytes": total, "examined_bytes": 0, "copied_bytes": 0, "zeroed_bytes": 0}
    node.shell.emit("resync-started", bytes=total)
    while node.dirty.any():
        if not session.live:
            # The workers end at once then: without this the loop would spin.
            raise SessionLostError(session.reason)
        yield from sweep(node, session)
        swept_seq = node.seq
        while node.stable_seq < swept_seq:
            if not session.live:
                raise SessionLostError(session.reason)
            yield from flush_pair(node)
    node.shell.emit("resync-finished", **node.resync)


def sweep(node: Node, session: Session) -> Path:
    """One pass with several workers; returns when all of them have ended."""
    shared = Pass()
    shared.workers = RESYNC_CHUNKS_AHEAD
    shared.done = node.shell.waiter()
    for _ in range(RESYNC_CHUNKS_AHEAD):
        node.shell.spawn("resync", worker(node, session, shared))
    yield (shared.done.wait,)
    if shared.failure is not None:
        raise shared.failure


def worker(node: Node, session: Session, shared: Pass) -> Path:
    """Take runs off the cursor until there are none."""
    try:
        while session.live and shared.failure is None:
            run = node.dirty.next_run(shared.cursor, run_extents_max(node, shared.cursor))
            if run is None:
                return
            first, last = run
            shared.cursor = last
            offset, end = node.geometry.bytes_of_extents(first, last)
            yield from copy_run(node, session, offset, end)
    except NbdMirrorError as error:
        shared.failure = error
    finally:
        shared.workers -= 1
        if shared.workers == 0 and shared.done is not None:
            shared.done.wake()


def run_extents_max(node: Node, cursor: int) -> int:
    """How many extents one step may take: a chunk, or a long span where holes may be skipped."""
    size = node.geometry.extent_bytes
    if cursor % (RESYNC_CHUNK_BYTES // size):
        return RESYNC_CHUNK_BYTES // size - cursor % (RESYNC_CHUNK_BYTES // size)
    return span_bytes_max(node) // size


def copy_run(node: Node, session: Session, offset: int, end: int) -> Path:
    """Copy one dirty run: its holes as one command, its data in chunks."""
    hold = node.locks.acquire(offset, end, False)
    try:
        if hold.waiter is not None:
            yield (hold.waiter.wait,)
        runs = yield (node.store.data_runs, offset, end - offset)
        if not runs:
            yield from send_zero(node, session, offset, end)
            return
    finally:
        node.locks.release(hold)
    for start, stop, data in segments(runs, offset, end):
        if not data and (start, stop) != (offset, end):
            # Asked again under its own lock: somebody may have written there meanwhile.
            yield from copy_run(node, session, start, stop)
            continue
        for at in range(start, stop, RESYNC_CHUNK_BYTES):
            if not session.live:
                return
            yield from copy_chunk(node, session, at, min(at + RESYNC_CHUNK_BYTES, stop))


def segments(runs: list[tuple[int, int]], offset: int, end: int) -> list[tuple[int, int, bool]]:
    """Cut [offset, end) into (start, stop, may hold data), holes only in whole chunks.

    Chunk borders are extent borders, so a bit is never cleared for half an extent.
    """
    cut: list[tuple[int, int, bool]] = []
    at = offset
    for start, stop in runs:
        first = max(start - start % RESYNC_CHUNK_BYTES, at)
        last = min(stop + -stop % RESYNC_CHUNK_BYTES, end)
        if last <= at:
            continue
        if first > at:
            cut.append((at, first, False))
        cut.append((first, last, True))
        at = last
    if at < end:
        cut.append((at, end, False))
    return cut


def copy_chunk(node: Node, session: Session, offset: int, end: int) -> Path:
    """Copy at most RESYNC_CHUNK_BYTES under one range lock."""
    # A chunk at a time, and not for holes: a run may be half a gigabyte, or a terabyte of nothing.
    yield (node.shell.pace, end - offset)
    suspect = node.dirty.is_suspect(offset // node.geometry.extent_bytes)
    hold = node.locks.acquire(offset, end, False)
    try:
        if hold.waiter is not None:
            yield (hold.waiter.wait,)
        buffer = bytearray(end - offset)
        yield (node.store.pread, buffer, offset)
        if is_zero(buffer):
            yield from send_zero(node, session, offset, end)
            return
        pieces = [(0, len(buffer))]
        if suspect:
            pieces = yield from differing_pieces(node, session, offset, buffer)
        view = memoryview(buffer)
        for start, stop in pieces:
            yield from submit(
                node, session, FrameType.RESYNC_DATA, offset + start, 0, view[start:stop]
            )
        if session.live:
            copied(node, offset, end, sum(stop - start for start, stop in pieces))
            yield (session.link.kick,)
    finally:
        node.locks.release(hold)


def is_zero(buffer: bytearray) -> bool:
    """Whether a chunk holds nothing but zeros."""
    return buffer == (ZEROS if len(buffer) == len(ZEROS) else bytes(len(buffer)))


def differing_pieces(node: Node, session: Session, offset: int, buffer: bytearray) -> Path:
    """Ask the target which blocks differ; returns their (start, stop) in the chunk, joined."""
    hashes = yield (hash_blocks, session.hash_key, buffer)
    seq = yield from submit(node, session, FrameType.HASH, offset, len(buffer), hashes)
    if not session.live:
        return []
    waiter = session.hash_waiters[seq] = node.shell.waiter()
    yield (session.link.kick,)
    if not (yield (waiter.wait, COMMAND_TIMEOUT_MS / 1000)):
        raise PeerProtocolError(f"no answer to a comparison within {COMMAND_TIMEOUT_MS} ms")
    if waiter.result is None:
        return []
    return join_blocks(waiter.result, len(buffer))


def hash_blocks(key: bytes, buffer: bytearray) -> bytes:
    """One keyed hash per HASH_BLOCK_BYTES. Yielded: it is slow."""
    view = memoryview(buffer)
    return b"".join(
        keyed_hash(key, view[at : at + HASH_BLOCK_BYTES])
        for at in range(0, len(buffer), HASH_BLOCK_BYTES)
    )


def join_blocks(bitmap: bytes, length: int) -> list[tuple[int, int]]:
    """(start, stop) of runs of set bits, in bytes, clipped to `length`."""
    pieces: list[tuple[int, int]] = []
    for index in range((length + HASH_BLOCK_BYTES - 1) // HASH_BLOCK_BYTES):
        if not bitmap[index // 8] & (0x80 >> (index % 8)):
            continue
        start = index * HASH_BLOCK_BYTES
        stop = min(start + HASH_BLOCK_BYTES, length)
        if pieces and pieces[-1][1] == start:
            pieces[-1] = (pieces[-1][0], stop)
        else:
            pieces.append((start, stop))
    return pieces


def send_zero(node: Node, session: Session, offset: int, end: int) -> Path:
    """Tell the target that a range reads as zeros."""
    yield from submit(node, session, FrameType.RESYNC_ZERO, offset, end - offset, EMPTY)
    if session.live:
        node.resync["zeroed_bytes"] += end - offset
        copied(node, offset, end, 0)
        yield (session.link.kick,)


def submit(
    node: Node, session: Session, kind: FrameType, offset: int, aux: int, payload: ReadBuffer
) -> Path:
    """Queue one frame of the resync when the window has room; returns its sequence number."""
    yield from session.room(len(payload))
    if not session.live:
        return 0
    node.seq += 1
    if kind is not FrameType.HASH:
        node.remember_unflushed(node.seq, offset, offset + (aux or len(payload)))
    session.submit_resync(kind, node.seq, offset, aux, payload)
    return node.seq


def copied(node: Node, offset: int, end: int, payload_bytes: int) -> None:
    """Everything of [offset, end) is queued: its bits go once both nodes have flushed past it."""
    size = node.geometry.extent_bytes
    node.pending_clear.append((node.seq, offset // size, (end + size - 1) // size))
    node.resync["examined_bytes"] += end - offset
    node.resync["copied_bytes"] += payload_bytes
