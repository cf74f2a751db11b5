"""Simulated files: a page cache, what is durable, and what a power cut leaves of the difference.

Owns the store and metadata ports of one node. A write reaches the cache when it completes and the
disk when a sync that began afterwards completes. A kill keeps the cache. A power cut keeps, drops
or tears each unsynced write on its own, at sectors of 512 bytes. Each operation can be told to
fail: a change may then be there in part, and a failed sync drops what it should have written (the
pages count as clean, "fsyncgate") and fails for ever after. Sparse: only written blocks exist.
"""

import errno
import random
from collections.abc import Callable, Sequence
from typing import Any

from nbdmirror.core.dirtymap import DirtyMap
from nbdmirror.core.geometry import Geometry
from nbdmirror.core.ports import Path, ReadBuffer, WriteBuffer
from nbdmirror.core.superblock import Superblock, choose, encode
from nbdmirror.errors import NotSupportedError, OutOfSpaceError, StoreError
from nbdmirror.limits import (
    LOG_BLOCKS_COUNT,
    LOG_OFFSET_BYTES,
    MAP_OFFSET_BYTES,
    META_BLOCK_BYTES,
    MIB,
    SUPERBLOCK_SLOT_OFFSETS_BYTES,
)
from tests.sim.world import Op, Task, World

BLOCK_BYTES = 4096
SECTOR_BYTES = 512
ZERO_BLOCK = bytes(BLOCK_BYTES)
CHANGES = ("write", "zero", "trim")
OPERATIONS = (*CHANGES, "sync", "read")
# A system that cannot zero or trim a range so, or has no room to note it: zeros are written.
FALLS_BACK = frozenset({errno.EOPNOTSUPP, errno.ENOSPC})

Blocks = dict[int, bytes]


class Change:
    """One write (`data`) or one range of zeros (`data` is None)."""

    __slots__ = ("data", "end", "offset")

    def __init__(self, offset: int, end: int, data: bytes | None) -> None:
        self.offset = offset
        self.end = end
        self.data = data

    def apply(self, blocks: Blocks) -> None:
        """Carry it out on an image."""
        if self.data is None:
            self._zero(blocks)
            return
        offset, data = self.offset, self.data
        at = 0
        while at < len(data):
            index, start = divmod(offset + at, BLOCK_BYTES)
            count = min(BLOCK_BYTES - start, len(data) - at)
            piece = data[at : at + count]
            if count < BLOCK_BYTES:
                old = blocks.get(index, ZERO_BLOCK)
                piece = old[:start] + piece + old[start + count :]
            blocks[index] = piece
            at += count

    def _zero(self, blocks: Blocks) -> None:
        first, last = self.offset // BLOCK_BYTES, (self.end - 1) // BLOCK_BYTES
        wanted = range(first, last + 1)
        present = (
            [i for i in wanted if i in blocks]
            if len(wanted) < len(blocks)
            else sorted(i for i in blocks if first <= i <= last)
        )
        for index in present:
            start = max(self.offset - index * BLOCK_BYTES, 0)
            stop = min(self.end - index * BLOCK_BYTES, BLOCK_BYTES)
            if start == 0 and stop == BLOCK_BYTES:
                del blocks[index]
            else:
                old = blocks[index]
                blocks[index] = old[:start] + bytes(stop - start) + old[stop:]

    def torn(self, rng: random.Random) -> "list[Change]":
        """A random part of it, cut at sectors."""
        parts: list[Change] = []
        step = max(SECTOR_BYTES, (self.end - self.offset) // 16 // SECTOR_BYTES * SECTOR_BYTES)
        for at in range(self.offset, self.end, step):
            stop = min(at + step, self.end)
            if rng.random() < 0.5:
                data = (
                    None if self.data is None else self.data[at - self.offset : stop - self.offset]
                )
                parts.append(Change(at, stop, data))
        return parts


class SimFile:
    """One file of one node, over all its lives."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.cache: Blocks = {}
        self.durable: Blocks = {}
        self.pending: dict[int, Change] = {}
        self.started: dict[int, Change] = {}
        self._serial = 0
        self.slow_factor = 1
        # How long the next "write" (any change), "sync" or "read" takes on top: a bad sector.
        self.hold_ms: dict[str, int] = {}
        self.failed = False
        # Operation: the errno it fails with; those of `once` fail one time only.
        self.failing: dict[str, int] = {}
        self.once: dict[str, int] = {}
        # What a write beyond it fails with EFBIG.
        self.limit_bytes = 1 << 63
        self.on_error: Callable[[str, int], None] | None = None
        self.version = 0
        # Blocks whose content in the cache may have changed since somebody looked; None: all.
        self.touched: set[int] | None = None

    def apply(self, change: Change) -> None:
        """A write completed: the cache shows it."""
        change.apply(self.cache)
        self._serial += 1
        self.version += 1
        if self.touched is not None:
            self.touched.update(range(change.offset // BLOCK_BYTES, -(-change.end // BLOCK_BYTES)))
        self.pending[self._serial] = change

    def make_durable(self, serials: Sequence[int]) -> None:
        """Those of the given changes that are still pending reach the disk, in order."""
        for serial in serials:
            change = self.pending.pop(serial, None)
            if change is not None:
                change.apply(self.durable)

    def make_range_durable(self, offset: int, end: int) -> None:
        """Everything pending in the pages of a range reaches the disk, and what is below it."""
        self.make_durable(self.below(offset, end))

    def below(self, offset: int, end: int) -> list[int]:
        """What is pending in the pages of a range, and what lies below that, oldest first."""
        ranges = [(offset // BLOCK_BYTES * BLOCK_BYTES, -(-end // BLOCK_BYTES) * BLOCK_BYTES)]
        chosen: list[int] = []
        # Newest first: what lies under a chosen change must not come over it later.
        for serial in reversed(self.pending):
            change = self.pending[serial]
            if any(change.offset < stop and start < change.end for start, stop in ranges):
                chosen.append(serial)
                ranges.append((change.offset, change.end))
        return chosen[::-1]

    def fail(self, number: int, *operations: str) -> None:
        """The next one of each of these operations fails, once."""
        self.once.update(dict.fromkeys(operations, number))

    def heal(self) -> None:
        """Nothing fails any more, but for what a failed sync has spoiled."""
        self.failing.clear()
        self.once.clear()

    def error(self, operation: str) -> int:
        """The errno that this operation fails with now, 0 if it does not."""
        number = self.once.pop(operation, 0) or self.failing.get(operation, 0)
        if number and self.on_error is not None:
            self.on_error(operation, number)
        return number

    def spoil(self, serials: Sequence[int]) -> None:
        """A sync of these changes failed: the cache shows them as clean, the disk lacks them."""
        self.failed = True
        for serial in serials:
            self.pending.pop(serial, None)

    def read(self, offset: int, length: int) -> bytes:
        """From the cache."""
        return read_blocks(self.cache, offset, length)

    def end_life(self, rng: random.Random, *, power: bool) -> None:
        """A kill or a power cut: what was started may have happened, in part."""
        for change in self.started.values():
            if rng.random() < 0.5:
                for part in [change] if rng.random() < 0.5 else change.torn(rng):
                    self.apply(part)
        self.started.clear()
        self.once.clear()
        self.failed = False
        if not power:
            return
        for change in self.pending.values():
            choice = rng.random()
            if choice < 0.4:
                change.apply(self.durable)
            elif choice < 0.6:
                for part in change.torn(rng):
                    part.apply(self.durable)
        self.pending.clear()
        self.cache = dict(self.durable)
        self.touched = None
        self.version += 1


def read_blocks(blocks: Blocks, offset: int, length: int) -> bytes:
    """Bytes of an image."""
    pieces: list[bytes] = []
    while length:
        index, start = divmod(offset, BLOCK_BYTES)
        count = min(BLOCK_BYTES - start, length)
        pieces.append(blocks.get(index, ZERO_BLOCK)[start : start + count])
        offset += count
        length -= count
    return b"".join(pieces)


class DiskOp(Op):
    """One system call on a file: it takes time, then `effect` happens."""

    def __init__(self, delay_ms: int, effect: Callable[[], None]) -> None:
        self.delay_ms = delay_ms
        self.effect = effect
        self.task: Task | None = None

    def start(self, task: Task) -> None:
        """Begin."""
        self.task = task
        task.world.at(self.delay_ms, task.life, self._complete)

    def _complete(self) -> None:
        assert self.task is not None
        try:
            self.effect()
        except StoreError as error:
            self.task._step(None, error)
            return
        self.task._step(None, None)


def write_op(
    file: SimFile, change: Change, operation: str = "write", *, durable: bool = False
) -> DiskOp:
    """pwrite or fallocate, or a pwrite that is durable when it returns."""
    rng = file.world.rng["disk"]
    serial = file._serial = file._serial + 1
    file.started[serial] = change

    def effect() -> None:
        file.started.pop(serial, None)
        if change.end > file.limit_bytes:
            raise StoreError(errno.EFBIG, f"{operation} {file.name}")
        number = file.error(operation)
        if number:
            for part in change.torn(rng):
                file.apply(part)
            raise_error(number, f"{operation} {file.name}")
        file.apply(change)
        if durable:
            require_synced(file, file.below(change.offset, change.end))
            file.make_range_durable(change.offset, change.end)

    delay_ms = rng.choice((0, 0, 0, 1, 2)) + (rng.randrange(1, 8) if durable else 0)
    return DiskOp(delay_ms * file.slow_factor + file.hold_ms.pop("write", 0), effect)


def raise_error(number: int, where: str) -> None:
    """As production turns an errno into an exception."""
    raise (OutOfSpaceError if number == errno.ENOSPC else StoreError)(number, where)


def require_synced(file: SimFile, serials: Sequence[int]) -> None:
    """A sync of these changes does not fail, and none has before."""
    if file.failed:
        raise StoreError(errno.EIO, f"sync {file.name}: it failed before")
    number = file.error("sync")
    if number:
        file.spoil(serials)
        raise StoreError(number, f"sync {file.name}")


def sync_op(file: SimFile) -> DiskOp:
    """fdatasync. No room for what was written before is a loss like any other."""
    rng = file.world.rng["disk"]
    serials = list(file.pending)

    def effect() -> None:
        require_synced(file, serials)
        file.make_durable(serials)

    return DiskOp(rng.randrange(1, 12) * file.slow_factor + file.hold_ms.pop("sync", 0), effect)


class SimStore:
    """The backing file port. A new one for each life, over the same file."""

    def __init__(
        self, file: SimFile, device_bytes: int, *, can_trim: bool = True, can_fast_zero: bool = True
    ) -> None:
        self.file = file
        self.device_bytes = device_bytes
        self.can_trim = can_trim
        self.can_fast_zero = can_fast_zero
        self.on_write: Callable[[int, int], None] | None = None

    def _begin(self, offset: int, end: int) -> None:
        assert 0 <= offset < end <= self.device_bytes, "outside the device"
        if self.on_write is not None:
            self.on_write(offset, end)

    def pread(self, buffer: WriteBuffer, offset: int) -> Any:
        """Fill the buffer when it completes."""

        def effect() -> None:
            number = self.file.error("read")
            if number:
                raise StoreError(number, f"read {self.file.name}")
            buffer[:] = self.file.read(offset, len(buffer))

        delay_ms = self.file.world.rng["disk"].choice((0, 0, 1))
        return DiskOp(delay_ms + self.file.hold_ms.pop("read", 0), effect)

    def pwrite(self, buffer: ReadBuffer, offset: int) -> Any:
        """Into the cache."""
        self._begin(offset, offset + len(buffer))
        return write_op(self.file, Change(offset, offset + len(buffer), bytes(buffer)))

    def pwrite_durable(self, buffer: ReadBuffer, offset: int) -> Any:
        """Onto the disk."""
        self._begin(offset, offset + len(buffer))
        change = Change(offset, offset + len(buffer), bytes(buffer))
        return write_op(self.file, change, durable=True)

    def zero(self, offset: int, length: int, may_trim: bool) -> Any:
        """Zeros into the cache."""
        self._begin(offset, offset + length)
        return self._zeros("zero", offset, offset + length)

    def trim(self, offset: int, length: int) -> Any:
        """The same, where it is offered."""
        self._begin(offset, offset + length)
        if not self.can_trim:
            raise NotSupportedError(f"trim {self.file.name}: not here")
        return self._zeros("trim", offset, offset + length)

    def _zeros(self, operation: str, offset: int, end: int) -> Path:
        """By the operation if the system has it, else by the next best one, else written."""
        if operation == "trim" or self.can_fast_zero:
            try:
                yield (write_op, self.file, Change(offset, end, None), operation)
            except StoreError as error:
                if error.number not in FALLS_BACK:
                    raise
                if operation == "trim":
                    yield from self._zeros("zero", offset, end)
                    return
            else:
                return
        for at in range(offset, end, MIB):
            yield (write_op, self.file, Change(at, min(at + MIB, end), None))

    def fdatasync(self) -> Any:
        """Everything that completed before is durable."""
        return sync_op(self.file)

    def data_runs(self, offset: int, length: int) -> Any:
        """Where blocks exist, joined."""
        assert 0 <= offset <= offset + length <= self.device_bytes, "outside the device"
        first, last = offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES
        runs: list[tuple[int, int]] = []
        for index in sorted(i for i in self.file.cache if first <= i <= last):
            start = max(index * BLOCK_BYTES, offset)
            stop = min((index + 1) * BLOCK_BYTES, offset + length)
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((start, stop))
        return runs


def format_meta(file: SimFile, superblock: Superblock, geometry: Geometry) -> None:
    """Make a metadata file, as `metadata create` does, durable. Nothing is hot or dirty."""
    for offset in SUPERBLOCK_SLOT_OFFSETS_BYTES:
        file.apply(Change(offset, offset + META_BLOCK_BYTES, encode(superblock)))
    clean = DirtyMap(geometry, superblock.map_id)
    for index in range(geometry.page_count):
        page = clean.begin_page(index, superblock.generation)
        file.apply(Change(page.offset, page.offset + META_BLOCK_BYTES, page.block))
    file.make_durable(list(file.pending))


class SimMeta:
    """The metadata port. A new one for each life, over the same file."""

    def __init__(self, file: SimFile, size_bytes: int) -> None:
        self.file = file
        self.size_bytes = size_bytes
        self._failed = False
        self._sequence = choose(*self.read_slots()).superblock.sequence
        self.on_begin: Callable[[Superblock], None] | None = None
        self.on_store: Callable[[Superblock], None] | None = None

    def write_superblock(self, superblock: Superblock) -> Any:
        """Slot 0, sync, slot 1, sync."""
        assert superblock.sequence == self._sequence + 1 or self._failed, "no gap, no repetition"
        return self._store_superblock(superblock)

    def _store_superblock(self, superblock: Superblock) -> Path:
        block = encode(superblock)
        if self.on_begin is not None and not self._failed:
            self.on_begin(superblock)
        for offset in SUPERBLOCK_SLOT_OFFSETS_BYTES:
            yield from self._store([(offset, block)])
        self._sequence = superblock.sequence
        if self.on_store is not None:
            self.on_store(superblock)

    def write_blocks(self, blocks: Sequence[tuple[int, bytes]]) -> Any:
        """All of them, then one sync."""
        for offset, block in blocks:
            assert len(block) == META_BLOCK_BYTES, "whole blocks"
            assert LOG_OFFSET_BYTES <= offset <= self.size_bytes - META_BLOCK_BYTES, "in the file"
            assert offset % META_BLOCK_BYTES == 0, "at a block"
        return self._store(blocks)

    def _store(self, blocks: Sequence[tuple[int, bytes]]) -> Path:
        if self._failed:
            raise StoreError(errno.EIO, f"write {self.file.name}: it failed before")
        try:
            for offset, block in blocks:
                yield (write_op, self.file, Change(offset, offset + len(block), bytes(block)))
            yield (sync_op, self.file)
        except StoreError as error:
            self._failed = True
            raise StoreError(error.number, f"write {self.file.name}") from error

    # --- reading at the start -------------------------------------------------------------------

    def read_slots(self) -> tuple[bytes, bytes]:
        """Both superblock slots."""
        first, second = SUPERBLOCK_SLOT_OFFSETS_BYTES
        return self.file.read(first, META_BLOCK_BYTES), self.file.read(second, META_BLOCK_BYTES)

    def read_ring(self) -> bytes:
        """The intent log."""
        return self.file.read(LOG_OFFSET_BYTES, LOG_BLOCKS_COUNT * META_BLOCK_BYTES)

    def read_map(self) -> list[bytes]:
        """Every page of the dirty map."""
        return [
            self.file.read(offset, META_BLOCK_BYTES)
            for offset in range(MAP_OFFSET_BYTES, self.size_bytes, META_BLOCK_BYTES)
        ]
