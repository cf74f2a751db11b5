"""The metadata file of one node, behind the port `MetaStore`.

Owns: the file, its exclusive lock for the whole life of the opener, and the order in which blocks
become durable. Must never: interpret what it stores beyond the superblock's sequence, overwrite an
existing file at creation, or report success after any write or sync of it failed. Metadata that
missed one write is a state that nobody decided: the side is lost, and a new engine reads what is
really there.
"""

import errno
import fcntl
import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from nbdmirror.core.dirtymap import DirtyMap
from nbdmirror.core.geometry import Geometry
from nbdmirror.core.intentlog import empty_ring
from nbdmirror.core.superblock import Superblock, choose, encode
from nbdmirror.errors import MetadataError, RefusedError, StoreError
from nbdmirror.files import FILE_MODE, open_regular, store_error, sync_directory, write_all
from nbdmirror.limits import (
    LOG_BLOCKS_COUNT,
    LOG_OFFSET_BYTES,
    MAP_OFFSET_BYTES,
    META_BLOCK_BYTES,
    MIB,
    SUPERBLOCK_SLOT_OFFSETS_BYTES,
)

PIECE_BYTES: Final = 1 * MIB
LOCKS_FILE: Final = Path("/proc/locks")
assert PIECE_BYTES % META_BLOCK_BYTES == 0


def holder(descriptor: int) -> int | None:
    """Process id of whoever holds the flock of this file, if the system tells.

    A line of /proc/locks: `1: FLOCK  ADVISORY  WRITE 1234 fe:01:5678 0 EOF` (proc_locks(5)).
    """
    status = os.fstat(descriptor)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        lines = LOCKS_FILE.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split()
        if len(words) >= 6 and words[1] == "FLOCK" and words[5] == device and int(words[4]) > 0:
            return int(words[4])
    return None


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        pid = holder(descriptor)
        raise RefusedError(
            f"{path} is locked by {f'process {pid}' if pid else 'another process'}: "
            "an engine of this mirror runs on this node; stop it first (`nbdmirror engine stop`)"
        ) from error
    except OSError as error:
        raise store_error(error, f"lock {path}") from error


class FileMetaStore:
    """`MetaStore` over a regular file; safe to call from many threads, one write at a time.

    `failed`: why nothing will ever be written again, or "".
    """

    __slots__ = ("_descriptor", "_one_writer", "_sequence", "failed", "path", "size_bytes")

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.failed = ""
        self.size_bytes = os.fstat(descriptor).st_size
        self._descriptor = descriptor
        # One sync at a time: two at once could take a writeback error from each other.
        self._one_writer = threading.Lock()
        self._sequence = self._check_size()

    @classmethod
    def open(cls, path: Path) -> "FileMetaStore":
        """Open and lock an existing file; the lock goes with close() or the end of the process.

        Damaged superblocks are no error here: `choose(*read_slots())` explains them.

        Raises:
            RefusedError: another process holds it (named if the system tells), or not a plain file.
            MetadataError: there is none, or its size does not fit the geometry that it records.
            StoreError: the system refuses.
        """
        return cls._opened(path, os.O_RDWR, locked=True)

    @classmethod
    def open_to_read(cls, path: Path, *, locked: bool) -> "FileMetaStore":
        """Open without the right to write; unless locked, an engine may be writing meanwhile.

        Raises:
            RefusedError, MetadataError, StoreError: as open().
        """
        return cls._opened(path, os.O_RDONLY, locked=locked)

    @classmethod
    def _opened(cls, path: Path, flags: int, *, locked: bool) -> "FileMetaStore":
        try:
            descriptor = open_regular(path, flags)
        except StoreError as error:
            if error.number != errno.ENOENT:
                raise
            raise MetadataError(
                f"{path} does not exist: restore it, or make it with `nbdmirror metadata create`"
            ) from error
        try:
            if locked:
                _lock(descriptor, path)
            return cls(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def _check_size(self) -> int:
        """The sequence of the newest superblock, 0 if there is none to be had."""
        if self.size_bytes <= MAP_OFFSET_BYTES or self.size_bytes % META_BLOCK_BYTES:
            raise MetadataError(
                f"{self.path} has {self.size_bytes} bytes, which is no metadata file of a mirror: "
                "it was cut or is another file"
            )
        try:
            superblock = choose(*self.read_slots()).superblock
        except MetadataError:
            return 0
        wanted = superblock.geometry().metadata_bytes
        if self.size_bytes != wanted:
            raise MetadataError(
                f"{self.path} has {self.size_bytes} bytes, its superblock needs {wanted}: "
                "it was cut or extended; restore it"
            )
        return superblock.sequence

    def fileno(self) -> int:
        """The descriptor, for whoever looks at the file without changing it."""
        return self._descriptor

    def close(self) -> None:
        """Give the lock back. The caller knows that no call is in flight."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def read_slots(self) -> tuple[bytes, bytes]:
        """The two superblock slots, 4 KiB each. Raises StoreError."""
        first, second = SUPERBLOCK_SLOT_OFFSETS_BYTES
        return self._read(first, META_BLOCK_BYTES), self._read(second, META_BLOCK_BYTES)

    def read_ring(self) -> bytes:
        """The whole intent log, 256 KiB. Raises StoreError."""
        return self._read(LOG_OFFSET_BYTES, LOG_BLOCKS_COUNT * META_BLOCK_BYTES)

    def read_map(self) -> Iterator[bytes]:
        """Every page of the dirty map, 4 KiB each, in order. Raises StoreError."""
        for offset in range(MAP_OFFSET_BYTES, self.size_bytes, PIECE_BYTES):
            piece = self._read(offset, min(PIECE_BYTES, self.size_bytes - offset))
            for start in range(0, len(piece), META_BLOCK_BYTES):
                yield piece[start : start + META_BLOCK_BYTES]

    def _read(self, offset: int, length: int) -> bytes:
        pieces: list[bytes] = []
        while length:
            try:
                piece = os.pread(self._descriptor, length, offset)
            except OSError as error:
                raise store_error(error, f"read {self.path} at {offset}") from error
            if not piece:
                raise StoreError(errno.EIO, f"read {self.path} at {offset}: the file was cut short")
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return b"".join(pieces)

    def write_superblock(self, superblock: Superblock) -> None:
        """Write it to slot 0, then to slot 1, each durable; returns when both are.

        Its sequence is the one after the last that was stored: a gap would look like a lost write.

        Raises:
            StoreError: nothing may be told; nothing is ever written again.
        """
        block = encode(superblock)
        with self._one_writer:
            self._require_good()
            assert superblock.sequence == self._sequence + 1, (superblock.sequence, self._sequence)
            for offset in SUPERBLOCK_SLOT_OFFSETS_BYTES:
                self._store(((offset, block),))
            self._sequence = superblock.sequence

    def write_blocks(self, blocks: Sequence[tuple[int, bytes]]) -> None:
        """Write (offset, 4 KiB block) pairs and make them durable with one sync.

        Raises:
            StoreError: some may be on disk; nothing is ever written again.
        """
        for offset, block in blocks:
            assert len(block) == META_BLOCK_BYTES, len(block)
            assert LOG_OFFSET_BYTES <= offset <= self.size_bytes - META_BLOCK_BYTES, offset
            assert offset % META_BLOCK_BYTES == 0, offset
        with self._one_writer:
            self._require_good()
            self._store(blocks)

    def _require_good(self) -> None:
        if self.failed:
            raise StoreError(errno.EIO, f"write {self.path}: it failed before ({self.failed})")

    def _store(self, blocks: Iterable[tuple[int, bytes]]) -> None:
        try:
            for offset, block in blocks:
                write_all(self._descriptor, block, offset)
            os.fdatasync(self._descriptor)
        except OSError as error:
            # A full disk, too: the blocks were allocated at creation, so this is no plain lack.
            failure = StoreError(error.errno or errno.EIO, f"write {self.path}")
            self.failed = str(failure)
            raise failure from error


def _image(superblock: Superblock, geometry: Geometry) -> Iterator[bytes]:
    """The whole file of a new mirror in order, in pieces: nothing is hot, nothing dirty."""
    head = bytearray(MAP_OFFSET_BYTES)
    for offset in SUPERBLOCK_SLOT_OFFSETS_BYTES:
        head[offset : offset + META_BLOCK_BYTES] = encode(superblock)
    ring = empty_ring()
    head[LOG_OFFSET_BYTES : LOG_OFFSET_BYTES + len(ring)] = ring
    yield bytes(head)
    clean = DirtyMap(geometry, superblock.map_id)
    pages_per_piece = PIECE_BYTES // META_BLOCK_BYTES
    for first in range(0, geometry.page_count, pages_per_piece):
        indexes = range(first, min(first + pages_per_piece, geometry.page_count))
        yield b"".join(clean.begin_page(index, superblock.generation).block for index in indexes)


def create(path: Path, superblock: Superblock, geometry: Geometry) -> None:
    """Make the metadata file, allocated in full and every byte written, under its final name.

    It appears whole or not at all, and it never replaces another file.

    Raises:
        RefusedError: something has that name already.
        StoreError: the system refuses; nothing is left behind.
    """
    assert superblock.geometry() == geometry, "the superblock describes this device"
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(temporary, flags, FILE_MODE)
        try:
            os.posix_fallocate(descriptor, 0, geometry.metadata_bytes)
            offset = 0
            for piece in _image(superblock, geometry):
                write_all(descriptor, piece, offset)
                offset += len(piece)
            os.fsync(descriptor)
            path.hardlink_to(temporary)  # unlike a rename, this never replaces
        finally:
            os.close(descriptor)
            temporary.unlink()
        try:
            sync_directory(path.parent)
        except OSError:
            path.unlink()
            raise
    except FileExistsError as error:
        raise RefusedError(
            f"{path} exists and is not overwritten: it is the memory of a mirror; "
            "move it away if that mirror is no longer wanted"
        ) from error
    except OSError as error:
        raise store_error(error, f"create {path}") from error
