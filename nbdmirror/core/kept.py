"""What is kept of a copy that was given up: the format of its file, and what memory knows of it.

Owns the bytes of the file `kept` and the judgement of what a crash left of them. Must never
perform I/O, or take an extent for kept whose entry it cannot trust. The order of the writes is
that of keeping.py.

The kept image is the copy as it was when it was given up. It is not stored as a whole: an extent
that was not changed since is read from the data file, one that was changed is in `kept`, where its
old content was made durable *before* the data file changed. The file is sparse:

    0        the header: which node, which generation, from which moment on; written once
    4096     zeros, or the closing mark: from some moment on extents changed without being kept
    8192     the index: 32 bytes for each kept extent, in the order in which they were kept
    ...      the contents, each at the place that its extent has in the device

An entry says where (its extent), what (a checksum of the content; all zeros needs no content), and
how many entries were durable when it was written. So a bad entry is told apart: one of those that
were durable is damage, and the image is not complete; one behind them is what a crash left of a
batch that nobody relied on, for no extent of it was changed.
"""

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bitarray import bitarray

from nbdmirror.core.checks import crc32c
from nbdmirror.core.geometry import Geometry
from nbdmirror.core.ports import KeptFile, Waiter
from nbdmirror.errors import MetadataError
from nbdmirror.limits import META_BLOCK_BYTES, MIB

MAGIC: Final = b"NBDKEPT\0"
MARK_MAGIC: Final = b"NBDSHUT\0"
VERSION: Final = 1
MARK_OFFSET_BYTES: Final = META_BLOCK_BYTES
INDEX_OFFSET_BYTES: Final = 2 * META_BLOCK_BYTES
# magic, version, node id, extent bytes, device bytes, mirror, node, image, generation, own, peer's
_HEAD = struct.Struct(">8sHBxIQ16s16s16s16sQQ")
# magic, checksum of the content, extent, entries durable before, flags; then its own checksum
_ENTRY = struct.Struct(">IIQQI")
ENTRY_MAGIC: Final = 0x4E424B45  # "NBKE"
ENTRY_BYTES: Final = _ENTRY.size + 4
ZEROS_FLAG: Final = 1
TAIL_ENTRIES_MAX: Final = 1024
_CRC_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Of which copy, and from which moment on. `own_bytes` and `peer_bytes`: what each side had
    written that the other one lacked, as far as was known then.
    """

    node_id: int
    extent_bytes: int
    device_bytes: int
    mirror_id: bytes
    node_uuid: bytes
    image_id: bytes
    generation: bytes
    own_bytes: int
    peer_bytes: int


UNKNOWN: Final = Header(
    node_id=0,
    extent_bytes=0,
    device_bytes=0,
    mirror_id=bytes(16),
    node_uuid=bytes(16),
    image_id=bytes(16),
    generation=bytes(16),
    own_bytes=0,
    peer_bytes=0,
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One kept extent; `durable`: how many entries were durable before this one was written."""

    extent: int
    content_crc: int
    durable: int
    zeros: bool


def _sealed(content: bytes) -> bytes:
    block = content.ljust(META_BLOCK_BYTES - _CRC_BYTES, b"\0")
    return block + crc32c(block).to_bytes(_CRC_BYTES, "big")


def encode_header(header: Header) -> bytes:
    """The first block of the file."""
    return _sealed(
        _HEAD.pack(
            MAGIC,
            VERSION,
            header.node_id,
            header.extent_bytes,
            header.device_bytes,
            header.mirror_id,
            header.node_uuid,
            header.image_id,
            header.generation,
            header.own_bytes,
            header.peer_bytes,
        )
    )


def decode_header(block: bytes) -> Header:
    """The header that a block holds.

    Raises:
        MetadataError: it is damaged, or of another format.
    """
    if len(block) != META_BLOCK_BYTES or not block.startswith(MAGIC):
        raise MetadataError("kept: this is no file of kept extents, or its header is damaged")
    content = block[:-_CRC_BYTES]
    if crc32c(content) != int.from_bytes(block[-_CRC_BYTES:], "big"):
        raise MetadataError("kept: the header is damaged (its checksum is wrong)")
    _, version, *facts = _HEAD.unpack_from(block)
    if version != VERSION:
        raise MetadataError(f"kept: format version {version}, this program knows {VERSION}")
    names = ("node_id", "extent_bytes", "device_bytes", "mirror_id", "node_uuid", "image_id",
             "generation", "own_bytes", "peer_bytes")  # fmt: skip
    return Header(**dict(zip(names, facts, strict=True)))


def encode_mark(image_id: bytes) -> bytes:
    """The closing mark. Any byte of it says what all of it says: a torn one counts."""
    return _sealed(MARK_MAGIC + image_id)


def encode_entry(image_id: bytes, slot: int, entry: Entry) -> bytes:
    """The 32 bytes of one entry at its place in the index."""
    flags = ZEROS_FLAG if entry.zeros else 0
    body = _ENTRY.pack(ENTRY_MAGIC, entry.content_crc, entry.extent, entry.durable, flags)
    return body + _entry_crc(image_id, slot, body)


def _entry_crc(image_id: bytes, slot: int, body: bytes) -> bytes:
    # With image and place: an entry of another image, or at another place, is none.
    seed = crc32c(image_id + slot.to_bytes(8, "big"))
    return crc32c(body, seed).to_bytes(_CRC_BYTES, "big")


def decode_entry(image_id: bytes, slot: int, block: bytes) -> Entry | None:
    """The entry at a place of the index; None for what is none, or damaged."""
    body = block[: _ENTRY.size]
    if len(block) != ENTRY_BYTES or block[_ENTRY.size :] != _entry_crc(image_id, slot, body):
        return None
    magic, content_crc, extent, durable, flags = _ENTRY.unpack(body)
    if magic != ENTRY_MAGIC or durable > slot or flags not in (0, ZEROS_FLAG):
        return None
    return Entry(extent, content_crc, durable, bool(flags))


def content_offset_bytes(geometry: Geometry) -> int:
    """Where the contents begin."""
    end = INDEX_OFFSET_BYTES + ENTRY_BYTES * geometry.extent_count
    return -(-end // MIB) * MIB


class Kept:
    """What memory knows of the file.

    `closed`: extents change without being kept, the image is not complete any more. `problem`: why
    nothing can be kept at this moment. `damage`: why the file is not to be believed.
    """

    def __init__(self, file: KeptFile, geometry: Geometry, header: Header) -> None:
        self.file = file
        self.geometry = geometry
        self.header = header
        self.saved = bitarray(geometry.extent_count)
        self.saved.setall(0)
        self.count = 0
        self.used_bytes = 0
        self.closed = False
        self.problem = ""
        self.damage = ""
        self.busy = False
        self.waiters: list[Waiter] = []
        self._content_offset = content_offset_bytes(geometry)

    @property
    def size_bytes(self) -> int:
        """How long the file is; most of it is holes."""
        return self._content_offset + self.geometry.device_bytes

    def content_at(self, extent: int) -> int:
        """Where the content of an extent is."""
        return self._content_offset + self.geometry.bytes_of_extents(extent, extent + 1)[0]

    def entry_at(self, slot: int) -> int:
        """Where an entry is."""
        return INDEX_OFFSET_BYTES + slot * ENTRY_BYTES

    def extent_length(self, extent: int) -> int:
        """The last extent of a device may be shorter."""
        offset, end = self.geometry.bytes_of_extents(extent, extent + 1)
        return end - offset

    def cost(self, entry: Entry) -> int:
        """What one entry takes of the space that is given."""
        return ENTRY_BYTES + (0 if entry.zeros else self.extent_length(entry.extent))

    def note(self, entries: Sequence[Entry]) -> None:
        """These are durable now, in the order of the index."""
        for entry in entries:
            self.saved[entry.extent] = 1
            self.used_bytes += self.cost(entry)
        self.count += len(entries)

    def unsaved(self, offset: int, end: int, count_max: int) -> list[tuple[int, int]]:
        """Runs (first, last exclusive) of extents of a byte range that are not kept yet."""
        extents = self.geometry.extents(offset, end)
        runs: list[tuple[int, int]] = []
        at = extents.start
        while count_max > 0:
            first = self.saved.find(0, at, extents.stop)
            if first < 0:
                break
            limit = min(extents.stop, first + count_max)
            last = self.saved.find(1, first, limit)
            last = limit if last < 0 else last
            runs.append((first, last))
            count_max -= last - first
            at = last
        return runs

    def forget(self, entries: Sequence[Entry]) -> None:
        """The last ones of the index are none after all."""
        for entry in entries:
            self.saved[entry.extent] = 0
            self.used_bytes -= self.cost(entry)
        self.count -= len(entries)


class Judge:
    """Tells what a crash left of an index from damage, an entry at a time, in their order.

    What can be used is noted in `kept` on the way. `known_count`: what the superblock remembers.
    """

    def __init__(self, kept: Kept, known_count: int) -> None:
        self.kept = kept
        self.durable = known_count
        self.slots = 0
        self.end = 0
        self._twice = False
        # An entry is at most one batch ahead of what it knows to be durable.
        self._last: deque[Entry] = deque(maxlen=TAIL_ENTRIES_MAX)

    def take(self, entry: Entry | None) -> None:
        """The next one."""
        slot = self.slots
        self.slots += 1
        if entry is None:
            return
        self.end = self.slots
        self.durable = max(self.durable, entry.durable)
        kept = self.kept
        if slot != kept.count:
            return  # behind a bad one
        if entry.extent >= kept.geometry.extent_count or kept.saved[entry.extent]:
            self._twice = True
            return
        kept.note((entry,))
        self._last.append(entry)

    def damage(self) -> str:
        """Why the image cannot be complete, or ""."""
        if self._twice:
            return "the index names an extent twice, or one beyond the device"
        if self.kept.count < self.durable:
            return f"entry {self.kept.count} of at least {self.durable} is damaged or missing"
        if self.kept.count - self.durable > len(self._last):
            return f"the last {self.kept.count - self.durable} entries do not say what was durable"
        return ""

    def tail(self) -> list[Entry]:
        """Those that nothing behind them vouches for."""
        count = self.kept.count - self.durable
        return list(self._last)[len(self._last) - count :] if count else []
