"""The backing file of one node, behind the port `Store`.

Owns: the file descriptors of the data file, and the translation of what the system says into the
project's errors. Must never: retry a sync that failed, grow or shrink the file, give reserved space
of a preallocated file back to the file system, or touch the data to find out what it can do.

A writeback error is reported by Linux once per *open file description*, and after that the pages
count as clean ("fsyncgate"). So every sync in flight runs on a description of its own, opened
before the first write: two syncs at once cannot take an error from each other. And once one has
failed, with whatever errno, this store never reports a sync as done again.
"""

import contextlib
import ctypes
import errno
import os
import queue
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from nbdmirror.core.ports import ReadBuffer, WriteBuffer
from nbdmirror.errors import MetadataError, NotSupportedError, RefusedError, StoreError
from nbdmirror.files import (
    FILE_MODE,
    SPACE_ERRNOS,
    open_regular,
    store_error,
    sync_directory,
    write_all,
)
from nbdmirror.limits import GIB, KIB, MIB

SYNC_DESCRIPTIONS_COUNT: Final = 8
FALLOCATE_BYTES_MAX: Final = 1 * GIB
ZERO_WRITE_BYTES: Final = 1 * MIB
DATA_RUNS_COUNT_MAX: Final = 65_536
PROBE_BYTES: Final = 64 * KIB

# linux/falloc.h and linux/magic.h
FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10
PUNCH_HOLE: Final = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
ZERO_RANGE: Final = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
TMPFS_MAGIC: Final = 0x01021994
_STATFS_BYTES: Final = 256

_ABSENT_ERRNOS: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})
_ZEROS: Final = memoryview(bytes(ZERO_WRITE_BYTES))

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_fallocate.restype = ctypes.c_int


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). Raises OSError; a call that a signal interrupted is made again."""
    while _fallocate(descriptor, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _is_tmpfs(descriptor: int) -> bool:
    """Whether the file lives on tmpfs. f_type is the first word of struct statfs (64-bit Linux)."""
    answer = (ctypes.c_long * (_STATFS_BYTES // ctypes.sizeof(ctypes.c_long)))()
    return bool(_libc.fstatfs(descriptor, answer) == 0 and answer[0] == TMPFS_MAGIC)


def _scratch(directory: Path) -> int:
    """A nameless file in `directory`."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(directory, flags | os.O_TMPFILE, FILE_MODE)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT}:
            raise
    path = directory / f".probe-{secrets.token_hex(8)}"
    descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, FILE_MODE)
    path.unlink()
    return descriptor


def _offers(descriptor: int, mode: int) -> bool:
    """Whether fallocate with `mode` works here and leaves zeros behind."""
    written = b"\xff" * PROBE_BYTES
    try:
        with contextlib.suppress(OSError):  # a full disk: ask all the same
            os.pwrite(descriptor, written, 0)
        fallocate(descriptor, mode, 0, PROBE_BYTES)
    except OSError as error:
        # A full file system that knows the operation says so; the others say EOPNOTSUPP.
        return error.errno in SPACE_ERRNOS
    return not any(os.pread(descriptor, PROBE_BYTES, 0))


def probe(directory: Path) -> tuple[bool, bool]:
    """(ZERO_RANGE works, PUNCH_HOLE works) on the file system of `directory`.

    Tried on a scratch file. Where none can be made, neither is offered.
    """
    try:
        descriptor = _scratch(directory)
    except OSError:
        return False, False
    try:
        return _offers(descriptor, ZERO_RANGE), _offers(descriptor, PUNCH_HOLE)
    finally:
        os.close(descriptor)


class FileStore:
    """`Store` over a regular file; safe to call from many threads at once.

    `can_trim`: trim() gives space back (sparse) or at least reads as zeros (preallocated).
    `can_fast_zero`: zero() never falls back to writing zeros, whatever `may_trim` says.
    `failed`: why no sync will ever succeed again, or "".
    """

    __slots__ = (
        "_descriptor",
        "_holes",
        "_syncers",
        "_zero_range",
        "can_fast_zero",
        "can_trim",
        "device_bytes",
        "failed",
        "path",
        "sparse",
    )

    def __init__(self, path: Path, descriptor: int, device_bytes: int, *, sparse: bool) -> None:
        zero_range, punch_hole = probe(path.parent)
        self.path = path
        self.device_bytes = device_bytes
        self.sparse = sparse
        self.failed = ""
        self._zero_range = zero_range
        # tmpfs reserves nothing worth keeping and has no ZERO_RANGE.
        self._holes = punch_hole and (sparse or _is_tmpfs(descriptor))
        self.can_fast_zero = zero_range
        self.can_trim = punch_hole if sparse else zero_range
        self._syncers: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._descriptor = descriptor
        try:
            for _ in range(SYNC_DESCRIPTIONS_COUNT):
                again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
                self._syncers.put(again)
        except OSError as error:
            self.close()
            raise store_error(error, f"open {path}") from error

    @classmethod
    def open(cls, path: Path, device_bytes: int, *, sparse: bool) -> "FileStore":
        """Open an existing data file of at least `device_bytes`.

        `sparse` is what its metadata says: False means that its space was reserved at creation.

        Raises:
            RefusedError: a symbolic link, or not a regular file.
            MetadataError: the file is smaller than the device.
            StoreError: the system refuses.
        """
        descriptor = open_regular(path, os.O_RDWR)
        size = os.fstat(descriptor).st_size
        if size < device_bytes:
            os.close(descriptor)
            raise MetadataError(
                f"{path} has {size} bytes, the device {device_bytes}: "
                "the data file was cut or is another one; restore it before this node is used"
            )
        return cls(path, descriptor, device_bytes, sparse=sparse)

    @classmethod
    def create(cls, path: Path, size: int, *, sparse: bool) -> "FileStore":
        """Make a new data file of `size` zero bytes, durably; its space is reserved unless sparse.

        Raises:
            RefusedError: something has that name already.
            StoreError: the system refuses; nothing is left behind.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(path, flags, FILE_MODE)
        except FileExistsError as error:
            raise RefusedError(
                f"{path} exists and is not overwritten; move it away, or adopt it as the data"
            ) from error
        except OSError as error:
            raise store_error(error, f"create {path}") from error
        try:
            os.ftruncate(descriptor, size)
            if not sparse:
                os.posix_fallocate(descriptor, 0, size)
            os.fsync(descriptor)
            sync_directory(path.parent)
            return cls(path, descriptor, size, sparse=sparse)
        except OSError as error:
            path.unlink()
            os.close(descriptor)
            raise store_error(error, f"reserve {size} bytes for {path}") from error
        except BaseException:
            path.unlink()
            raise

    @classmethod
    def adopt(cls, path: Path, size: int, *, sparse: bool) -> "FileStore":
        """Take an existing file as data: contents untouched, holes reserved unless sparse, synced.

        Raises:
            RefusedError, MetadataError: as open().
            StoreError: no room for what a sparse file lacks; adopt it with `sparse` then.
        """
        store = cls.open(path, size, sparse=sparse)
        try:
            if not sparse:
                fallocate(store.fileno(), FALLOC_FL_KEEP_SIZE, 0, size)
            os.fsync(store.fileno())
            sync_directory(path.parent)
        except OSError as error:
            store.close()
            raise store_error(error, f"reserve {size} bytes for {path}") from error
        return store

    def fileno(self) -> int:
        """The descriptor, for whoever looks at the file without changing it."""
        return self._descriptor

    def close(self) -> None:
        """Close every descriptor. The caller knows that no call is in flight."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        os.close(descriptor)
        with contextlib.suppress(queue.Empty):
            while True:
                os.close(self._syncers.get_nowait())

    def pread(self, buffer: WriteBuffer, offset: int) -> None:
        """Fill the whole buffer from `offset`.

        Raises:
            StoreError: the system's errno; EIO when the file ends before the buffer does.
        """
        try:
            done = os.preadv(self._descriptor, (buffer,), offset)
        except OSError as error:
            raise store_error(error, f"read {self.path}") from error
        if done != len(buffer):
            self._read_rest(memoryview(buffer), offset, done)

    def _read_rest(self, view: memoryview, offset: int, done: int) -> None:
        where = f"read {self.path} at {offset}"
        while done < len(view):
            try:
                got = os.preadv(self._descriptor, (view[done:],), offset + done)
            except OSError as error:
                raise store_error(error, where) from error
            if got == 0:
                raise StoreError(errno.EIO, f"{where}: the file was cut short")
            done += got

    def pwrite(self, buffer: ReadBuffer, offset: int) -> None:
        """Write the whole buffer at `offset`, into the page cache.

        Raises:
            OutOfSpaceError: the file system or the quota is full; part may have been written.
            StoreError: any other errno.
        """
        try:
            done = os.pwrite(self._descriptor, buffer, offset)
            if done != len(buffer):
                write_all(self._descriptor, memoryview(buffer)[done:], offset + done)
        except OSError as error:
            raise store_error(error, f"write {self.path}") from error

    def pwrite_durable(self, buffer: ReadBuffer, offset: int) -> None:
        """Write the whole buffer at `offset`; it is durable when this returns.

        Raises:
            OutOfSpaceError: there was no room for the write; the store is as good as before.
            StoreError: the write or its sync failed, and the store has failed for ever.
        """
        self._require_good()
        descriptor = self._syncers.get()
        try:
            view = memoryview(buffer)
            done = 0
            while done < len(view):
                count = os.pwritev(descriptor, (view[done:],), offset + done, os.RWF_DSYNC)
                if count == 0:
                    raise self._fail(errno.EIO, "write and sync without progress")
                done += count
        except OSError as error:
            number = error.errno or errno.EIO
            if number in SPACE_ERRNOS:
                # Was it the write that found no room, or the writeback? Asked by writing once
                # more without the sync: if that has room, it was the writeback.
                self.pwrite(buffer, offset)
            raise self._fail(number, "write and sync") from error
        finally:
            self._syncers.put(descriptor)

    def fdatasync(self) -> None:
        """All writes that returned before are durable. Once it failed, it fails for ever.

        Raises:
            StoreError: also for a full disk: what was acknowledged before is lost here.
        """
        self._require_good()
        descriptor = self._syncers.get()
        try:
            os.fdatasync(descriptor)
        except OSError as error:
            raise self._fail(error.errno or errno.EIO, "fdatasync") from error
        finally:
            self._syncers.put(descriptor)

    def _require_good(self) -> None:
        if self.failed:
            raise StoreError(errno.EIO, f"sync {self.path}: it failed before ({self.failed})")

    def _fail(self, number: int, call: str) -> StoreError:
        error = StoreError(number, f"{call} {self.path}")
        self.failed = self.failed or str(error)
        return error

    def zero(self, offset: int, length: int, may_trim: bool) -> None:  # noqa: FBT001 - NBD's flag
        """Make the range read as zeros.

        A sparse file gives space back only where the client allows it (`may_trim`); a preallocated
        one never does (on tmpfs it does: there is no other fast way).

        Raises:
            OutOfSpaceError, StoreError: part of the range may read as zeros already.
        """
        assert 0 <= offset <= offset + length <= self.device_bytes, (offset, length)
        if self._holes and may_trim and self._in_pieces(PUNCH_HOLE, offset, length):
            return
        if self._zero_range and self._in_pieces(ZERO_RANGE, offset, length):
            return
        end = offset + length
        while offset < end:
            count = min(ZERO_WRITE_BYTES, end - offset)
            self.pwrite(_ZEROS[:count], offset)
            offset += count

    def trim(self, offset: int, length: int) -> None:
        """Give the space back; the range reads as zeros afterwards.

        Raises:
            NotSupportedError: `can_trim` is False; nothing was done.
            StoreError: part of the range may read as zeros already.
        """
        assert 0 <= offset <= offset + length <= self.device_bytes, (offset, length)
        if not self.can_trim:
            raise NotSupportedError(
                f"{self.path}: this file system cannot discard a range so that it reads as zeros"
            )
        mode = PUNCH_HOLE if self.sparse else ZERO_RANGE
        if not self._in_pieces(mode, offset, length):
            # It was offered, and the peer may have done it: then it reads as zeros here, too.
            self.zero(offset, length, may_trim=True)

    def _in_pieces(self, mode: int, offset: int, length: int) -> bool:
        """fallocate the range in bounded pieces; False when another way has to do it."""
        end = offset + length
        while offset < end:
            count = min(FALLOCATE_BYTES_MAX, end - offset)
            try:
                fallocate(self._descriptor, mode, offset, count)
            except OSError as error:
                # A full file system may lack room for the extent tree where plain writes over
                # reserved blocks still succeed.
                if error.errno in _ABSENT_ERRNOS or error.errno in SPACE_ERRNOS:
                    return False
                raise store_error(error, f"fallocate {self.path} at {offset}") from error
            offset += count
        return True

    def data_runs(self, offset: int, length: int) -> Sequence[tuple[int, int]]:
        """(start, end) of the parts that may hold anything but zeros, ascending, not touching.

        A range in more than DATA_RUNS_COUNT_MAX pieces has its last run stretched to the end.

        Raises:
            StoreError: the system's errno.
        """
        assert 0 <= offset <= offset + length <= self.device_bytes, (offset, length)
        end = offset + length
        runs: list[tuple[int, int]] = []
        try:
            while offset < end:
                start = self._seek_data(offset)
                if start >= end:
                    break
                if len(runs) == DATA_RUNS_COUNT_MAX:
                    runs[-1] = (runs[-1][0], end)
                    break
                offset = min(os.lseek(self._descriptor, start, os.SEEK_HOLE), end)
                if offset > start:  # else: a hole was punched between the two calls
                    runs.append((start, offset))
        except OSError as error:
            raise store_error(error, f"seek {self.path}") from error
        return runs

    def _seek_data(self, offset: int) -> int:
        """Where data begins at or after `offset`; the device's end if nothing follows."""
        try:
            return os.lseek(self._descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self.device_bytes
            raise
