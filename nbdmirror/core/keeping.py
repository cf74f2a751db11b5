"""Keeping what a copy held when it was given up, while it is overwritten (rule 19).

Owns the order: the old content of an extent is durable in the file `kept` before the first byte of
the extent changes, whoever changes it, a resync or a write of today. Every path of the core that
changes the data file calls `keep_before` first. What the file looks like is in kept.py.

Two things can be in the way: the space that was given for it, and the disk. What follows depends on
the copy. While it is inconsistent, in the middle of being overwritten, nothing is lost by waiting:
the resync waits for the operator. Afterwards it is one of two copies again, and a mirror does not
lose its second copy for the sake of an old image: the image is closed, durably, before anything
changes that it lacks. It still has all that the resync overwrote.
"""

from collections.abc import Sequence

from nbdmirror.core.checks import crc32c
from nbdmirror.core.durable import wake_all
from nbdmirror.core.kept import (
    ENTRY_BYTES,
    MARK_OFFSET_BYTES,
    UNKNOWN,
    Entry,
    Header,
    Judge,
    Kept,
    decode_entry,
    decode_header,
    encode_entry,
    encode_header,
    encode_mark,
)
from nbdmirror.core.messages import Bye
from nbdmirror.core.node import Node
from nbdmirror.core.ports import KeptFile, Path
from nbdmirror.core.session import Session
from nbdmirror.core.superblock import DataState, Superblock
from nbdmirror.errors import (
    MetadataError,
    NoRoomToKeepError,
    OutOfSpaceError,
    RefusedError,
    StoreError,
)
from nbdmirror.limits import KIB, META_BLOCK_BYTES, MIB

# One sync for so much: small enough for the peer's patience, large enough for a resync.
BATCH_BYTES = 1 * MIB
INDEX_PIECE_BYTES = 64 * KIB
WAYS_OUT = (
    "`nbdmirror kept limit SIZE` gives more space, `nbdmirror kept discard` keeps nothing of it"
)


# --- before anything changes ----------------------------------------------------------------------


def keep_before(node: Node, offset: int, end: int) -> Path:
    """Return when the old content of [offset, end) is safe, or need not be.

    Raises:
        NoRoomToKeepError: it cannot be kept, and this copy is being overwritten; nothing changes.
        StoreError: the disk failed.
    """
    while (kept := node.keep.kept) is not None and not at_rest(node, kept):
        if kept.busy:
            waiter = node.shell.waiter()
            kept.waiters.append(waiter)
            yield (waiter.wait,)
            continue
        count_max = max(1, BATCH_BYTES // node.geometry.extent_bytes)
        runs = kept.unsaved(offset, end, count_max)
        if not runs:
            return
        kept.busy = True
        try:
            yield from save(node, kept, runs)
        finally:
            kept.busy = False
            wake_all(kept.waiters)


def keep_before_zeros(node: Node, offset: int, end: int) -> Path:
    """The same before a range is made zero: where there is nothing, nothing changes.

    Raises:
        NoRoomToKeepError, StoreError: as keep_before.
    """
    if node.keep.kept is not None:
        runs = yield (node.store.data_runs, offset, end - offset)
        for start, stop in runs:
            yield from keep_before(node, start, stop)


def at_rest(node: Node, kept: Kept) -> bool:
    """Whether nothing has to be kept any more, although the file is there."""
    return kept.closed and not is_overwritten(node, kept)


def is_overwritten(node: Node, kept: Kept) -> bool:
    """Whether the copy that is kept is being overwritten, so that waiting costs nothing.

    Until the joint step at its end this node has the generation that was given up. A later resync
    of it is one like any other. Where the header cannot be read it is waited for in any of them.
    """
    known = kept.header is not UNKNOWN
    given_up = not known or node.sb.generation == kept.header.generation
    return given_up and node.sb.data_state is DataState.INCONSISTENT


def save(node: Node, kept: Kept, runs: Sequence[tuple[int, int]]) -> Path:
    """Make the content of some extents durable; one sync for all of them."""
    entries: list[Entry] = []
    contents: list[tuple[int, bytes]] = []
    for first, last in runs:
        start, stop = node.geometry.bytes_of_extents(first, last)
        buffer = bytearray(stop - start)
        yield (node.store.pread, buffer, start)
        for extent in range(first, last):
            at = node.geometry.bytes_of_extents(extent, extent + 1)[0] - start
            content = bytes(buffer[at : at + kept.extent_length(extent)])
            zeros = not any(content)
            entries.append(Entry(extent, crc32c(content), kept.count, zeros))
            if not zeros:
                contents.append((kept.content_at(extent), content))
    wanted = kept.used_bytes + sum(map(kept.cost, entries))
    problem = kept.damage or kept.problem
    if not problem and wanted > node.keep.limit_bytes:
        problem = (
            f"{node.keep.limit_bytes} bytes were given for it and {kept.used_bytes} are in use"
        )
    if not problem:
        problem = yield from store(kept, entries, contents)
    if problem:
        yield from not_kept(node, kept, problem)
        return
    kept.note(entries)
    node.saved_bytes = kept.count * node.geometry.extent_bytes


def store(kept: Kept, entries: Sequence[Entry], contents: Sequence[tuple[int, bytes]]) -> Path:
    """Contents, then their entries, then one sync; returns what went wrong, or ""."""
    try:
        for offset, content in joined(contents):
            yield (kept.file.pwrite, content, offset)
    except OutOfSpaceError as error:
        return f"there is no room on its disk ({error})"
    except StoreError as error:
        return f"its file cannot be written ({error})"
    try:
        yield (kept.file.pwrite, encoded(kept, entries), kept.entry_at(kept.count))
        yield (kept.file.fdatasync,)
    except StoreError as error:
        # What of it reached the disk is found out by reading it again, not by trying again.
        kept.problem = f"its file cannot be written ({error})"
    return kept.problem


def joined(contents: Sequence[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Neighbours in one write."""
    pieces: list[tuple[int, list[bytes], int]] = []
    for offset, content in contents:
        if pieces and pieces[-1][2] == offset:
            pieces[-1][1].append(content)
            pieces[-1] = (pieces[-1][0], pieces[-1][1], offset + len(content))
        else:
            pieces.append((offset, [content], offset + len(content)))
    return [(offset, b"".join(parts)) for offset, parts, _ in pieces]


def not_kept(node: Node, kept: Kept, problem: str) -> Path:
    """Wait for the operator where that costs nothing, else say durably that the image ends here.

    Raises:
        NoRoomToKeepError: this copy is being overwritten.
        StoreError: that the image is closed cannot be stored, so nothing may change.
    """
    if is_overwritten(node, kept):
        raise NoRoomToKeepError(
            f"node {node.sb.node_id} waits with the resync: what its copy held cannot be kept, "
            f"{problem}; there: {WAYS_OUT}"
        )
    if not kept.damage:
        yield (kept.file.pwrite, encode_mark(kept.header.image_id), MARK_OFFSET_BYTES)
        yield (kept.file.fdatasync,)
    kept.closed = True
    node.shell.emit("kept-closed", reason=problem)


def wait_for_space(node: Node, session: Session, error: NoRoomToKeepError) -> Path:
    """End the session of a target that cannot keep what it would overwrite; both sides show why."""
    node.keep.hold = str(error)
    node.shell.emit("resync-waits", reason=node.keep.hold)
    session.tell(Bye(reason=node.keep.hold))
    yield (session.link.kick,)
    node.lose_session(session, node.keep.hold)


# --- beginning, finding, ending -------------------------------------------------------------------


def begin(node: Node, file: KeptFile, own_bytes: int, peer_bytes: int) -> Path:
    """From here on nothing of this copy is lost: the file is there, durably, with its header.

    Raises:
        RefusedError: something of an earlier day is kept. StoreError: the file cannot be made.
    """
    sb = node.sb
    kept = node.keep.kept
    if kept is not None:
        untouched = not (kept.count or kept.closed or kept.damage)
        if untouched and kept.header.generation == sb.generation:
            # An earlier attempt got so far; what was not changed since needs no second image.
            node.shell.emit("kept-begun", image=kept.header.image_id.hex())
            return
        raise RefusedError(
            "give-up: what an earlier copy of this node held is kept still; export it if it is "
            "wanted, then `nbdmirror kept discard`, or give this one up without keeping it"
        )
    header = Header(
        node_id=sb.node_id,
        extent_bytes=sb.extent_bytes,
        device_bytes=sb.device_bytes,
        mirror_id=sb.mirror_id,
        node_uuid=sb.node_uuid,
        image_id=node.shell.random_bytes(16),
        generation=sb.generation,
        own_bytes=own_bytes,
        peer_bytes=peer_bytes,
    )
    kept = Kept(file, node.geometry, header)
    yield (file.create, encode_header(header), kept.size_bytes)
    node.keep.kept = kept
    node.shell.emit("kept-begun", image=header.image_id.hex())


def load(node: Node, file: KeptFile) -> Path:
    """Find what an earlier engine kept, before this one changes anything.

    A file that cannot be believed is told, and as long as it is there it counts as kept: while this
    copy is being overwritten, an operator has to look at it first.

    Raises:
        StoreError: it cannot be read, or what a crash left of it cannot be settled.
    """
    node.keep.kept = None
    node.saved_bytes = node.sb.saved_bytes
    if not (yield (file.open,)):
        if node.sb.saved_bytes:
            node.shell.emit("kept-missing", bytes=node.sb.saved_bytes)
        node.saved_bytes = 0
        return
    kept = yield from read_kept(node, file)
    node.keep.kept = kept
    node.saved_bytes = kept.count * node.geometry.extent_bytes
    if kept.damage:
        node.shell.emit("kept-damaged", reason=kept.damage)


def read_kept(node: Node, file: KeptFile) -> Path:
    """The file as memory knows it. Returns a Kept, which may be a damaged one."""
    sb = node.sb
    block = bytearray(META_BLOCK_BYTES)
    yield (file.pread, block, 0)
    try:
        header = decode_header(bytes(block))
        require_ours(header, sb)
    except MetadataError as error:
        kept = Kept(file, node.geometry, UNKNOWN)
        kept.damage, kept.closed = str(error), True
        return kept
    kept = Kept(file, node.geometry, header)
    yield (file.pread, block, MARK_OFFSET_BYTES)
    kept.closed = any(block)
    judge = Judge(kept, sb.saved_bytes // sb.extent_bytes)
    yield from read_index(kept, judge)
    kept.damage = judge.damage()
    kept.closed = kept.closed or bool(kept.damage)
    if not kept.damage:
        yield from settle_tail(kept, judge.tail(), judge.end)
    return kept


def require_ours(header: Header, sb: Superblock) -> None:
    """Another node's file, or that of another device, was put in this place.

    Raises:
        MetadataError: it was.
    """
    ours = (header.mirror_id, header.node_uuid) == (sb.mirror_id, sb.node_uuid)
    sizes = (header.device_bytes, header.extent_bytes) == (sb.device_bytes, sb.extent_bytes)
    if not ours or not sizes:
        raise MetadataError("kept: this file belongs to another node or device")


def read_index(kept: Kept, judge: Judge) -> Path:
    """Every entry in its order; ends where a whole piece of the index holds none."""
    image_id, most = kept.header.image_id, kept.geometry.extent_count
    slot = 0
    while slot < most:
        count = min(INDEX_PIECE_BYTES // ENTRY_BYTES, most - slot)
        piece = bytearray(count * ENTRY_BYTES)
        yield (kept.file.pread, piece, kept.entry_at(slot))
        if not any(piece):
            return
        for number in range(count):
            block = bytes(piece[number * ENTRY_BYTES : (number + 1) * ENTRY_BYTES])
            judge.take(decode_entry(image_id, slot + number, block))
        slot += count


def settle_tail(kept: Kept, tail: Sequence[Entry], end: int) -> Path:
    """The last batch may be in a cache only, or in part: what is whole is written once more.

    What is not whole was never relied on, and its extents are as they were. It is wiped out, so
    that it cannot be taken for something of a later batch. `end`: behind the last whole entry.
    """
    whole: list[Entry] = []
    contents: list[tuple[int, bytes]] = []
    kept.forget(tail)
    for entry in tail:
        if not entry.zeros:
            content = bytearray(kept.extent_length(entry.extent))
            yield (kept.file.pread, content, kept.content_at(entry.extent))
            if crc32c(bytes(content)) != entry.content_crc:
                break
            contents.append((kept.content_at(entry.extent), bytes(content)))
        whole.append(Entry(entry.extent, entry.content_crc, kept.count, entry.zeros))
    rest = end - kept.count - len(whole)
    if not whole and not rest:
        return
    for offset, piece in joined(contents):
        yield (kept.file.pwrite, piece, offset)
    index = encoded(kept, whole) + bytes(rest * ENTRY_BYTES)
    yield (kept.file.pwrite, index, kept.entry_at(kept.count))
    yield (kept.file.fdatasync,)
    kept.note(whole)


def encoded(kept: Kept, entries: Sequence[Entry]) -> bytes:
    """The bytes of entries that follow what the index has."""
    image_id = kept.header.image_id
    return b"".join(
        encode_entry(image_id, kept.count + number, entry) for number, entry in enumerate(entries)
    )


def discard(node: Node) -> Path:
    """Keep nothing any more. The file is gone before anything changes that it would have kept.

    Raises:
        RefusedError: nothing is kept. StoreError: the file cannot be removed.
    """
    while (kept := node.keep.kept) is not None and kept.busy:
        waiter = node.shell.waiter()
        kept.waiters.append(waiter)
        yield (waiter.wait,)
    if kept is None:
        raise RefusedError("kept: nothing is kept on this node")
    kept.busy = True
    try:
        yield (kept.file.remove,)
        node.keep.kept, node.keep.hold = None, ""
        node.saved_bytes = 0
    finally:
        kept.busy = False
        wake_all(kept.waiters)
    node.shell.emit("kept-discarded")
    yield from node.change(lambda sb: sb, always=True)


def give_space(node: Node, limit_bytes: int) -> Path:
    """Use so much from now on; what waits for space goes on at the next contact.

    Raises:
        StoreError: the file, which had a problem, cannot be read.
    """
    node.keep.limit_bytes = limit_bytes
    kept = node.keep.kept
    if kept is not None and kept.problem:
        while kept.busy:
            waiter = node.shell.waiter()
            kept.waiters.append(waiter)
            yield (waiter.wait,)
        kept.busy = True
        try:
            node.saved_bytes = kept.count * node.geometry.extent_bytes
            node.keep.kept = yield from read_kept(node, kept.file)
        finally:
            kept.busy = False
            wake_all(kept.waiters)
    node.keep.hold = ""
