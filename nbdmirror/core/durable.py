"""What a node knows durably: superblock, intent log and dirty map, and how they are changed.

Owns the three and their order on disk. Memory changes last: nobody is told what a crash could take
back (rule 7). A failed metadata write fails whatever needed it (rule 2). It knows nothing of roles,
sessions or clients; `Node` is built upon it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nbdmirror.core.dirtymap import DirtyMap
from nbdmirror.core.intentlog import IntentLog
from nbdmirror.core.ports import MetaStore, Path, Shell, Waiter
from nbdmirror.core.superblock import (
    DataState,
    Flags,
    PendingKind,
    Superblock,
    advance_generation,
)
from nbdmirror.errors import RefusedError, StoreError
from nbdmirror.limits import BASE_COUNT_MAX

NO_GENERATION = bytes(16)
EVICT_REGIONS_COUNT = 64
NO_LIMIT_SEQ = 2**63
PAGES_PER_WRITE_COUNT = 256


@dataclass(frozen=True, slots=True)
class Opened:
    """What opening the metadata found out; see opening.py."""

    superblock: Superblock
    dirty: DirtyMap
    log: IntentLog
    fell_back: bool
    cache_survived: bool
    boot_id: bytes
    mount_id: bytes
    log_damaged: bool = False
    notes: tuple[str, ...] = ()


class Durable:
    """The durable half of a node."""

    def __init__(self, shell: Shell, meta: MetaStore, opened: Opened) -> None:
        self.shell = shell
        self.meta = meta
        self.sb = opened.superblock
        self.dirty = opened.dirty
        self.log = opened.log
        self.geometry = opened.dirty.geometry
        # How much is kept of a copy that was given up; every store of the superblock has it.
        self.saved_bytes = opened.superblock.saved_bytes
        self.failed = ""
        self.failure_lost = False
        self.arbiter_counter = self.sb.arbiter_counter
        self._storing = False
        self._store_waiters: list[Waiter] = []
        self._committing = False
        self._commit_waiters: list[Waiter] = []

    @property
    def right(self) -> bool:
        """Whether this node may acknowledge what its peer does not have, by its metadata alone."""
        return bool(self.sb.flags & Flags.ALONE)

    def note_failure(self, reason: str, *, lost: bool = True) -> None:
        """This copy failed: it serves and acknowledges nothing that relies on it any more.

        `lost`: what was acknowledged may be missing from it, which is to be recorded. Without it
        (no space, a write that hangs) this side is out until its engine starts again.
        """
        self.failure_lost = self.failure_lost or lost
        if not self.failed:
            self.failed = reason
            self.shell.emit("local-failure", reason=reason)

    def note_counter(self, counter: int) -> None:
        """The highest counter of the arbiter's record so far (rule 21); stored with what follows.

        Raises:
            RefusedError: a record that is behind what was seen already was set back.
        """
        if counter < self.arbiter_counter:
            raise RefusedError(
                f"the arbiter's record has counter {counter}, and {self.arbiter_counter} was seen "
                "before: the store was set back, and what it says may have been taken by the peer "
                "already"
            )
        self.arbiter_counter = counter

    # --- the superblock ----------------------------------------------------------------------

    def change(self, edit: Callable[[Superblock], Superblock], *, always: bool = False) -> Path:
        """Apply `edit` to the superblock; returns when both slots hold the result.

        Memory changes last, so nobody is told what a crash could take back (rule 7). An edit that
        changes nothing is not written, unless `always`.

        Raises:
            StoreError: the metadata could not be written; memory is as before.
        """
        while self._storing:
            waiter = self.shell.waiter()
            self._store_waiters.append(waiter)
            yield (waiter.wait,)
        wanted = edit(self.sb)
        if wanted == self.sb and not always:
            return
        self._storing = True
        try:
            wanted = replace(
                wanted,
                sequence=self.sb.sequence + 1,
                own_txn=max(self.log.txn, wanted.own_txn),
                peer_txn=max(self.log.peer_txn, wanted.peer_txn),
                arbiter_counter=max(self.arbiter_counter, wanted.arbiter_counter),
                saved_bytes=self.saved_bytes,
            )
            yield (self.meta.write_superblock, wanted)
            self.sb = wanted
        except StoreError as error:
            self.note_failure(f"metadata: {error}")
            raise
        finally:
            self._storing = False
            wake_all(self._store_waiters)

    def begin_generation(self) -> Path:
        """Make the reserved generation the current one, before the first write alone counts.

        Rules 1 and 11: the right is taken at the decision, the generation begins with the first
        write that the peer does not get. Afterwards `base` names every generation that the peer
        may be found with.
        """
        if self.sb.pending_kind is not PendingKind.CLAIM and not self.sb.flags & Flags.ZEROED:
            return

        def begin(sb: Superblock) -> Superblock:
            flags = sb.flags & ~Flags.ZEROED
            if sb.pending_kind is not PendingKind.CLAIM:
                return replace(sb, flags=flags)
            base = add_base(sb.base, sb.generation)
            fresh = advance_generation(sb, sb.pending)
            return replace(
                fresh,
                flags=flags,
                base=base,
                pending=NO_GENERATION,
                pending_kind=PendingKind.NONE,
            )

        yield from self.change(begin)

    # --- intents -----------------------------------------------------------------------------

    def touch(self, offset: int, end: int, seq: int) -> int:
        """Make the regions of [offset, end) hot; returns the log version to wait for, or 0."""
        size = self.geometry.region_bytes
        return self.log.touch(offset // size, (end - 1) // size, seq)

    def commit(self, version: int) -> Path:
        """Wait until that version of the intent log is durable (rule 2), as a group.

        Raises:
            StoreError: the log could not be written; the data must not be.
        """
        log = self.log
        while log.durable < version:
            if self._committing:
                waiter = self.shell.waiter()
                self._commit_waiters.append(waiter)
                yield (waiter.wait,)
                if self.failed:
                    raise StoreError(5, self.failed)
                continue
            self._committing = True
            begun = log.begin_commit(self.sb.generation)
            try:
                yield (self.meta.write_blocks, [(begun.offset, begun.block)])
                log.end_commit(begun)
            except StoreError as error:
                self.note_failure(f"intent log: {error}")
                log.abort_commit(begun)
                raise
            finally:
                self._committing = False
                wake_all(self._commit_waiters)

    def commit_anew(self) -> Path:
        """Give the log as it is a number of its own; returns when that is durable.

        With it goes the peer's number that was heard last.

        Raises:
            StoreError: as commit.
        """
        self.log.version += 1
        yield from self.commit(self.log.version)

    def log_has_room(self, offset: int, end: int) -> bool:
        """Whether the hot set can take the regions of [offset, end) as it is."""
        size = self.geometry.region_bytes
        first, last = offset // size, (end - 1) // size
        return (first == last and first in self.log.hot) or self.log.room_for(first, last)

    def evict_below(self, highest: Callable[[], int]) -> Path:
        """Take some regions whose last write is not above `highest()` out of the hot set.

        A region goes when both nodes have flushed it, or when its dirty extents are in the map on
        disk (rule 2). Returns how many went: 0 if every region still waits for a flush.
        """
        regions = self.log.evictable(highest(), never_busy, EVICT_REGIONS_COUNT)
        if not regions:
            return 0
        yield from self.save_pages(
            sorted({page for r in regions for page in self.dirty.unsaved_pages_of_region(r)})
        )
        limit = highest()
        gone = [
            r
            for r in regions
            if self.log.is_evictable(r, limit) and not self.dirty.unsaved_pages_of_region(r)
        ]
        self.log.drop(gone)
        return len(gone)

    def save_pages(self, pages: Sequence[int]) -> Path:
        """Write these pages of the dirty map, durable when it returns."""
        for start in range(0, len(pages), PAGES_PER_WRITE_COUNT):
            writes = [
                self.dirty.begin_page(index, self.sb.generation)
                for index in pages[start : start + PAGES_PER_WRITE_COUNT]
            ]
            try:
                yield (self.meta.write_blocks, [(w.offset, w.block) for w in writes])
            except StoreError as error:
                for write in writes:
                    self.dirty.abort_page(write)
                self.note_failure(f"dirty map: {error}")
                raise
            for write in writes:
                self.dirty.end_page(write)


def wake_all(waiters: list[Waiter]) -> None:
    """Wake and forget every waiter of a list."""
    taken = waiters[:]
    waiters.clear()
    for waiter in taken:
        waiter.wake()


def never_busy(_region: int) -> bool:
    """Nothing is busy: what is in flight is newer than `stable_seq` or already marked dirty."""
    return False


def add_base(base: tuple[bytes, ...], *generations: bytes) -> tuple[bytes, ...]:
    """Add generations that the peer may be found with, newest last, none twice, none empty.

    The oldest go when there are too many; they are still in the history, so the worst is a full
    sync.
    """
    named = dict.fromkeys(g for g in reversed((*base, *generations)) if any(g))
    return tuple(reversed(list(named)[:BASE_COUNT_MAX]))


def inconsistent(sb: Superblock) -> Superblock:
    """In the middle of a resync: neither promotable nor a source; nothing of its own is pending."""
    gone = Flags.ALONE | Flags.PEER_OUTDATED | Flags.WAS_PRIMARY | Flags.ZEROED | Flags.SPLIT
    gone |= Flags.TOOK_OVER
    return replace(
        sb,
        data_state=DataState.INCONSISTENT,
        flags=sb.flags & ~gone,
        base=add_base(sb.base, sb.pending),
        pending=bytes(16),
        pending_kind=PendingKind.NONE,
    )
