"""The file `kept` beside the data file, behind the port `KeptFile`, and the image that it makes.

Owns: that file of one node, and reading the kept image while an engine goes on changing the data
file. Must never: change the data file, or hand out an image that is not what was given up, unless
it is asked for what is left of it.

How the image is read beside a running engine. The old content of an extent is in `kept`, and its
entry in the index, before the data file changes. So a piece of the data file is read first, the new
entries of the index after it: an extent without an entry then had not changed when it was read.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

from nbdmirror.core.checks import crc32c
from nbdmirror.core.geometry import Geometry
from nbdmirror.core.kept import (
    ENTRY_BYTES,
    MARK_OFFSET_BYTES,
    Entry,
    Header,
    Judge,
    Kept,
    decode_entry,
    decode_header,
)
from nbdmirror.core.ports import ReadBuffer, WriteBuffer
from nbdmirror.core.superblock import choose
from nbdmirror.errors import MetadataError, RefusedError, StoreError
from nbdmirror.files import FILE_MODE, open_regular, store_error, sync_directory, write_all
from nbdmirror.limits import KIB, META_BLOCK_BYTES, MIB, REGION_BYTES_DEFAULT
from nbdmirror.metastore import FileMetaStore

PIECE_BYTES: Final = 1 * MIB
INDEX_PIECE_BYTES: Final = 64 * KIB
HOLE_BYTES: Final = 4 * KIB


def path_beside(data_file: Path) -> Path:
    """Where what is kept of a data file goes."""
    return data_file.with_name("kept")


class FileKept:
    """`KeptFile` over a regular file; one call at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1

    def open(self) -> bool:
        """Use the file that is there; False if there is none.

        Raises:
            RefusedError: what is there is no plain file. StoreError: the system refuses.
        """
        self.close()
        try:
            self._descriptor = open_regular(self.path, os.O_RDWR)
        except StoreError as error:
            if error.number != errno.ENOENT:
                raise
            return False
        return True

    def create(self, header: bytes, size: int) -> None:
        """Make it, durably and under its name only when it is whole; never over another one.

        Raises:
            RefusedError: something has that name. StoreError: the system refuses.
        """
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}.new")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(temporary, flags, FILE_MODE)
            try:
                os.ftruncate(descriptor, size)
                write_all(descriptor, header + bytes(META_BLOCK_BYTES), 0)
                os.fsync(descriptor)
                self.path.hardlink_to(temporary)
                sync_directory(self.path.parent)
            except BaseException:
                os.close(descriptor)
                raise
            finally:
                temporary.unlink()
        except FileExistsError as error:
            raise RefusedError(f"{self.path} is there already; move it away") from error
        except OSError as error:
            raise store_error(error, f"create {self.path}") from error
        self.close()
        self._descriptor = descriptor

    def pread(self, buffer: WriteBuffer, offset: int) -> None:
        """Fill the whole buffer from `offset`."""
        read_all(self._descriptor, self.path, memoryview(buffer), offset)

    def pwrite(self, buffer: ReadBuffer, offset: int) -> None:
        """Write the whole buffer at `offset`, into the page cache."""
        try:
            write_all(self._descriptor, memoryview(buffer), offset)
        except OSError as error:
            raise store_error(error, f"write {self.path}") from error

    def fdatasync(self) -> None:
        """All writes that returned before are durable."""
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise StoreError(error.errno or errno.EIO, f"fdatasync {self.path}") from error

    def remove(self) -> None:
        """It is gone, durably."""
        remove(self.path)
        self.close()

    def close(self) -> None:
        """Give the descriptor back."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove the file, durably. Only where no engine keeps anything in it, or by that engine.

    Raises:
        StoreError: the system refuses.
    """
    try:
        path.unlink(missing_ok=True)
        sync_directory(path.parent)
    except OSError as error:
        raise store_error(error, f"remove {path}") from error


def read_all(descriptor: int, path: Path, view: memoryview, offset: int) -> None:
    """Fill a buffer. Raises StoreError; also where the file ends before."""
    while view:
        try:
            got = os.preadv(descriptor, (view,), offset)
        except OSError as error:
            raise store_error(error, f"read {path} at {offset}") from error
        if got == 0:
            raise StoreError(errno.EIO, f"read {path} at {offset}: the file was cut short")
        view, offset = view[got:], offset + got


class Image:
    """The kept image, to be read; also while an engine changes the data file under it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = self._kept = -1

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open what is kept at `path`, with the data file beside it.

        Raises:
            RefusedError: nothing is kept there. MetadataError: it is damaged. StoreError: the
            system refuses.
        """
        image = cls(path)
        try:
            image._open()
        except BaseException:
            image.close()
            raise
        return image

    def _open(self) -> None:
        try:
            self._kept = open_regular(self.path, os.O_RDONLY)
        except StoreError as error:
            if error.number != errno.ENOENT:
                raise
            raise RefusedError(
                f"nothing is kept on this node ({self.path} is not there): it has given no copy up"
            ) from error
        self._data = open_regular(self.path.with_name("data"), os.O_RDONLY)
        self.header: Header = decode_header(self._read(0, META_BLOCK_BYTES))
        # The size of a region says nothing here.
        region = max(REGION_BYTES_DEFAULT, self.header.extent_bytes)
        self.geometry = Geometry(self.header.device_bytes, self.header.extent_bytes, region)
        self._facts = Kept(FileKept(self.path), self.geometry, self.header)
        self._crcs: dict[int, Entry] = {}
        self._load()

    def close(self) -> None:
        """Give both files back."""
        for descriptor in (self._data, self._kept):
            if descriptor >= 0:
                os.close(descriptor)
        self._data = self._kept = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        read_all(self._kept, self.path, memoryview(buffer), offset)
        return bytes(buffer)

    # --- the index ------------------------------------------------------------------------------

    def _load(self) -> None:
        """All of the index. The last batch of an engine that was killed may be there in part."""
        judge = Judge(self._facts, self._known_count())
        for entry in self._entries(0):
            judge.take(entry)
            if entry is not None:
                self._crcs.setdefault(entry.extent, entry)
        if damage := judge.damage():
            raise MetadataError(f"{self.path}: {damage}: the image is not complete")
        tail = judge.tail()
        for number, entry in enumerate(tail):
            if not entry.zeros and crc32c(self._content(entry)) != entry.content_crc:
                self._facts.forget(tail[number:])
                break

    def _known_count(self) -> int:
        """How many entries the metadata remembers; 0 where it cannot be read."""
        try:
            meta = FileMetaStore.open_to_read(self.path.with_name("meta"), locked=False)
        except (MetadataError, RefusedError, StoreError):
            return 0
        try:
            sb = choose(*meta.read_slots()).superblock
        except MetadataError:
            return 0
        finally:
            meta.close()
        ours = sb.node_uuid == self.header.node_uuid
        return sb.saved_bytes // sb.extent_bytes if ours else 0

    def _entries(self, slot: int) -> Iterator[Entry | None]:
        """From a place of the index on; ends where a whole piece holds none."""
        most = self.geometry.extent_count
        while slot < most:
            count = min(INDEX_PIECE_BYTES // ENTRY_BYTES, most - slot)
            piece = self._read(self._facts.entry_at(slot), count * ENTRY_BYTES)
            if not any(piece):
                return
            for number in range(count):
                block = piece[number * ENTRY_BYTES : (number + 1) * ENTRY_BYTES]
                yield decode_entry(self.header.image_id, slot + number, block)
            slot += count

    def refresh(self) -> None:
        """Take in what was kept since."""
        for entry in self._entries(self._facts.count):
            if entry is None:
                return  # the end, or one that is being written: its extent has not changed yet
            if not self._facts.saved[entry.extent]:
                self._facts.note((entry,))
                self._crcs[entry.extent] = entry

    def _content(self, entry: Entry) -> bytes:
        length = self._facts.extent_length(entry.extent)
        return bytes(length) if entry.zeros else self._read(
            self._facts.content_at(entry.extent), length)  # fmt: skip

    # --- what it is -----------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether nothing has changed without being kept, up to now."""
        return not any(self._read(MARK_OFFSET_BYTES, META_BLOCK_BYTES))

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        self.refresh()
        return {
            "path": str(self.path),
            "generation": self.header.generation.hex(),
            "complete": self.complete,
            "extents": self._facts.count,
            "used_bytes": self._facts.used_bytes,
            "device_bytes": self.header.device_bytes,
            "own_bytes": self.header.own_bytes,
            "peer_bytes": self.header.peer_bytes,
        }

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """(offset, content) of the whole image, in order.

        Raises:
            MetadataError: the content of an extent is damaged. StoreError: the system refuses.
        """
        size = self.header.device_bytes
        for offset in range(0, size, PIECE_BYTES):
            buffer = bytearray(min(PIECE_BYTES, size - offset))
            read_all(self._data, self.path.with_name("data"), memoryview(buffer), offset)
            # Only now: what has no entry by now had not changed when it was read.
            self.refresh()
            self._lay_over(buffer, offset)
            yield offset, bytes(buffer)

    def _lay_over(self, buffer: bytearray, offset: int) -> None:
        end = offset + len(buffer)
        for extent in self.geometry.extents(offset, end):
            if not self._facts.saved[extent]:
                continue
            entry = self._crcs[extent]
            content = self._content(entry)
            at = self.geometry.bytes_of_extents(extent, extent + 1)[0]
            if crc32c(content) != entry.content_crc:
                raise MetadataError(
                    f"{self.path}: what is kept of bytes {at} to {at + len(content)} is damaged: "
                    "its checksum is wrong"
                )
            buffer[at - offset : at - offset + len(content)] = content

    def export(self, target: Path, *, partial: bool) -> int:
        """Write the image as a new sparse file, durably; returns its size.

        Raises:
            RefusedError: a file of that name is there, the image is not complete and `partial` does
            not say that this is known, or it was discarded meanwhile.
            MetadataError: it is damaged. StoreError: the system refuses; nothing is left behind.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(target, flags, FILE_MODE)
        except FileExistsError as error:
            raise RefusedError(f"{target} exists and is not overwritten; name another") from error
        except OSError as error:
            raise store_error(error, f"create {target}") from error
        try:
            self._fill(descriptor)
            self._require_whole(partial=partial)
            os.fsync(descriptor)
            sync_directory(target.parent)
        except BaseException as error:
            with contextlib.suppress(OSError):
                target.unlink()
            if isinstance(error, OSError):
                raise store_error(error, f"write {target}") from error
            raise
        finally:
            os.close(descriptor)
        return self.header.device_bytes

    def _fill(self, descriptor: int) -> None:
        os.ftruncate(descriptor, self.header.device_bytes)
        for offset, content in self.pieces():
            for at in range(0, len(content), HOLE_BYTES):
                block = content[at : at + HOLE_BYTES]
                if any(block):
                    write_all(descriptor, block, offset + at)

    def _require_whole(self, *, partial: bool) -> None:
        if os.fstat(self._kept).st_nlink == 0:
            raise RefusedError("kept: it was discarded meanwhile, so the image is of no worth")
        if not partial and not self.complete:
            raise RefusedError(
                "kept: the space that was given was used up, and extents have changed since that "
                "are not kept: the image has all that the resync overwrote, and today's content "
                "where later writes went; `--partial` exports it so"
            )
