"""Simulated files: a page cache, what is durable, and what a power cut leaves of the difference.

Owns the store and metadata ports of one node. A write reaches the cache when it completes and the
disk when a sync that began afterwards completes. A kill keeps the cache. A power cut keeps, drops
or tears each unsynced write on its own, at sectors of 512 bytes. A failed sync drops what it
should have written (the pages count as clean, "fsyncgate") and fails for ever after. Sparse: only
written blocks exist.
"""

import errno
import random
from collections.abc import Callable, Sequence
from typing import Any

from nbdmirror.core.ports import Path, ReadBuffer, WriteBuffer
from nbdmirror.core.superblock import Superblock, encode
from nbdmirror.errors import OutOfSpaceError, StoreError
from nbdmirror.limits import (
    LOG_BLOCKS_COUNT,
    LOG_OFFSET_BYTES,
    MAP_OFFSET_BYTES,
    META_BLOCK_BYTES,
    SUPERBLOCK_SLOT_OFFSETS_BYTES,
)
from tests.sim.world import Op, Task, World

BLOCK_BYTES = 4096
SECTOR_BYTES = 512
ZERO_BLOCK = bytes(BLOCK_BYTES)

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
        self.fail_write = 0
        self.fail_sync = 0
        self.failed = False
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
        ranges = [(offset // BLOCK_BYTES * BLOCK_BYTES, -(-end // BLOCK_BYTES) * BLOCK_BYTES)]
        chosen: list[int] = []
        # Newest first: what lies under a chosen change must not come over it later.
        for serial in reversed(self.pending):
            change = self.pending[serial]
            if any(change.offset < stop and start < change.end for start, stop in ranges):
                chosen.append(serial)
                ranges.append((change.offset, change.end))
        self.make_durable(chosen[::-1])

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
        self.fail_write = self.fail_sync = 0
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


def write_op(file: SimFile, change: Change, *, durable: bool = False) -> DiskOp:
    """pwrite, or one that is durable when it returns."""
    rng = file.world.rng["disk"]
    serial = file._serial = file._serial + 1
    file.started[serial] = change

    def effect() -> None:
        file.started.pop(serial, None)
        if file.fail_write:
            number, file.fail_write = file.fail_write, 0
            if number == errno.ENOSPC:
                raise OutOfSpaceError(number, f"write {file.name}")
            raise StoreError(number, f"write {file.name}")
        file.apply(change)
        if durable:
            if file.failed:
                raise StoreError(errno.EIO, f"durable write {file.name}: it failed before")
            file.make_range_durable(change.offset, change.end)

    delay_ms = rng.choice((0, 0, 0, 1, 2)) + (rng.randrange(1, 8) if durable else 0)
    return DiskOp(delay_ms * file.slow_factor, effect)


def sync_op(file: SimFile) -> DiskOp:
    """fdatasync."""
    rng = file.world.rng["disk"]
    serials = list(file.pending)

    def effect() -> None:
        if file.fail_sync:
            file.fail_sync = 0
            file.failed = True
            for serial in serials:
                file.pending.pop(serial, None)
        if file.failed:
            raise StoreError(errno.EIO, f"fdatasync {file.name}")
        file.make_durable(serials)

    return DiskOp(rng.randrange(1, 12) * file.slow_factor, effect)


class SimStore:
    """The backing file port. A new one for each life, over the same file."""

    def __init__(self, file: SimFile, device_bytes: int) -> None:
        self.file = file
        self.device_bytes = device_bytes
        self.on_write: Callable[[int, int], None] | None = None

    def _write(self, change: Change, *, durable: bool = False) -> Any:
        assert 0 <= change.offset < change.end <= self.device_bytes, "outside the device"
        if self.on_write is not None:
            self.on_write(change.offset, change.end)
        return write_op(self.file, change, durable=durable)

    def pread(self, buffer: WriteBuffer, offset: int) -> Any:
        """Fill the buffer when it completes."""

        def effect() -> None:
            buffer[:] = self.file.read(offset, len(buffer))

        return DiskOp(self.file.world.rng["disk"].choice((0, 0, 1)), effect)

    def pwrite(self, buffer: ReadBuffer, offset: int) -> Any:
        """Into the cache."""
        return self._write(Change(offset, offset + len(buffer), bytes(buffer)))

    def pwrite_durable(self, buffer: ReadBuffer, offset: int) -> Any:
        """Onto the disk."""
        return self._write(Change(offset, offset + len(buffer), bytes(buffer)), durable=True)

    def zero(self, offset: int, length: int, may_trim: bool) -> Any:
        """Zeros into the cache."""
        return self._write(Change(offset, offset + length, None))

    def trim(self, offset: int, length: int) -> Any:
        """The same."""
        return self._write(Change(offset, offset + length, None))

    def fdatasync(self) -> Any:
        """Everything that completed before is durable."""
        return sync_op(self.file)

    def data_runs(self, offset: int, length: int) -> Any:
        """Where blocks exist, joined."""
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


class SimMeta:
    """The metadata port. A new one for each life, over the same file."""

    def __init__(self, file: SimFile, size_bytes: int) -> None:
        self.file = file
        self.size_bytes = size_bytes
        self._failed = False
        self.on_begin: Callable[[Superblock], None] | None = None
        self.on_store: Callable[[Superblock], None] | None = None

    def write_superblock(self, superblock: Superblock) -> Any:
        """Slot 0, sync, slot 1, sync."""
        return self._store_superblock(superblock)

    def _store_superblock(self, superblock: Superblock) -> Path:
        block = encode(superblock)
        if self.on_begin is not None and not self._failed:
            self.on_begin(superblock)
        for offset in SUPERBLOCK_SLOT_OFFSETS_BYTES:
            yield from self._store([(offset, block)])
        if self.on_store is not None:
            self.on_store(superblock)

    def write_blocks(self, blocks: Sequence[tuple[int, bytes]]) -> Any:
        """All of them, then one sync."""
        for offset, block in blocks:
            assert len(block) == META_BLOCK_BYTES, "whole blocks"
            assert LOG_OFFSET_BYTES <= offset <= self.size_bytes - META_BLOCK_BYTES, "in the file"
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
            raise StoreError(errno.EIO, f"write {self.file.name}") from error

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
