"""The dirty map: which extents the peer may lack, one bit each.

Owns: the bits in memory, the format of their pages on disk, and the knowledge which pages on disk
lack a bit that memory has. Must never: perform I/O, decide when a bit may be cleared, or take a
page that it cannot trust for a clean one.

Memory may be ahead of the disk in two ways. *Unsaved*: a bit was set that the page on disk lacks;
the page must be written before the regions it covers leave the intent log (rule 2). *Stale*: bits
were cleared only; after a crash they are dirty again, which costs time and nothing else. A page is
written from a snapshot (`begin_page`) and stays unsaved until that snapshot is durable
(`end_page`); a bit set meanwhile keeps it unsaved. Two snapshots of one page under way at once may
reach the disk in either order, so neither makes it saved.
"""

import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from bitarray import bitarray
from construct import Bytes, Const, Int16ub, Int32ub, Int64ub, Struct

from nbdmirror.core.checks import crc32c
from nbdmirror.core.geometry import EXTENTS_PER_PAGE, Geometry
from nbdmirror.errors import MetadataError, PeerProtocolError
from nbdmirror.limits import (
    MAP_OFFSET_BYTES,
    MAP_PAGE_HEADER_BYTES,
    MAP_PAGE_PAYLOAD_BYTES,
    META_BLOCK_BYTES,
)

MAGIC: Final = 0x4E424D50  # "NBMP"
VERSION: Final = 1
_HEAD = struct.Struct(">IHHIIQ16s16sII")
_CRC_AT: Final = _HEAD.size - 4
_SEQUENCE_MAX: Final = (1 << 63) - 1
assert _HEAD.size == MAP_PAGE_HEADER_BYTES

# The schema of record of one page; the code below uses its struct twin, for speed.
PAGE = Struct(
    "magic" / Int32ub,
    "version" / Int16ub,
    "pad0" / Const(0, Int16ub),
    "index" / Int32ub,
    "pad1" / Const(0, Int32ub),
    "sequence" / Int64ub,
    "map_id" / Bytes(16),
    "generation" / Bytes(16),
    "pad2" / Const(0, Int32ub),
    "crc" / Int32ub,
    "bits" / Bytes(MAP_PAGE_PAYLOAD_BYTES),
)
assert PAGE.sizeof() == META_BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class PageWrite:
    """A snapshot of page `index`: write `block` (4096 bytes) at `offset` of the metadata file."""

    index: int
    offset: int
    block: bytes
    version: int


class DirtyMap:
    """One bit per extent of a device; set = the peer may lack it.

    A new map is clean, and no page of it is on disk: the creator writes every page, whoever opens
    an existing file loads every page.

    `suspect` has one bit per region: what is dirty there is so because it might differ (hot at a
    crash, bad page, full sync), and is worth comparing before it is sent. It lives in memory only.
    """

    def __init__(self, geometry: Geometry, map_id: bytes) -> None:
        assert len(map_id) == 16, "a map id has 16 bytes"
        self.geometry = geometry
        self.map_id = map_id
        self.suspect = bitarray(geometry.region_count)
        self.suspect.setall(0)
        # Whole pages, so that a page is a slice of memory. Bits beyond the device stay zero.
        self._bits = bitarray(geometry.page_count * EXTENTS_PER_PAGE, endian="big")
        self._bits.setall(0)
        self._bytes = memoryview(self._bits)
        self._count = 0
        self._shift = geometry.extent_shift
        self._device_bytes = geometry.device_bytes
        self._region_shift = geometry.region_shift - geometry.extent_shift
        self._sequence = 0
        self._version = array("Q", bytes(8 * geometry.page_count))
        self._unsaved: set[int] = set()
        self._cleared: set[int] = set(range(geometry.page_count))
        self._writing: dict[int, int] = {}
        self._overlapped: set[int] = set()

    # --- bits ----------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Dirty extents."""
        return self._count

    def any(self) -> bool:
        """Whether anything is dirty."""
        return self._count > 0

    def mark(self, offset: int, end: int) -> None:
        """Make the extents that bytes [offset, end) touch dirty."""
        shift = self._shift
        first = offset >> shift
        if (end - 1) >> shift == first and 0 <= offset < end <= self._device_bytes:
            bits = self._bits
            if not bits[first]:
                bits[first] = 1
                self._count += 1
                page = first // EXTENTS_PER_PAGE
                self._version[page] += 1
                self._unsaved.add(page)
            return
        extents = self.geometry.extents(offset, end)
        self._set(extents.start, extents.stop)

    def mark_region(self, region: int, *, suspect: bool = False) -> None:
        """Make every extent of one region dirty; `suspect` if it only might differ."""
        extents = self.geometry.extents_of_region(region)
        self._set(extents.start, extents.stop)
        if suspect:
            self.suspect[region] = 1

    def mark_all(self, *, suspect: bool = False) -> None:
        """Make the whole device dirty; `suspect` if it only might differ."""
        self._set(0, self.geometry.extent_count)
        if suspect:
            self.suspect.setall(1)

    def clear(self, first: int, last_exclusive: int) -> None:
        """Make extents [first, last_exclusive) clean. When that is right is the caller's rule."""
        assert 0 <= first <= last_exclusive <= self.geometry.extent_count, (first, last_exclusive)
        cleared = self._bits.count(1, first, last_exclusive)
        if cleared:
            for page in _pages(first, last_exclusive):
                self._cleared.add(page)
            self._bits[first:last_exclusive] = 0
            self._count -= cleared
        if first < last_exclusive:
            self._settle_suspicion(first, last_exclusive)

    def dirty_in(self, offset: int, end: int) -> bool:
        """Whether bytes [offset, end) touch a dirty extent."""
        extents = self.geometry.extents(offset, end)
        return self._bits.find(1, extents.start, extents.stop) >= 0

    def next_run(self, from_extent: int, max_extents: int) -> tuple[int, int] | None:
        """The first dirty extents (first, last_exclusive) at or after `from_extent`.

        At most `max_extents` of them; None when there are none.
        """
        assert from_extent >= 0, from_extent
        assert max_extents > 0, max_extents
        count = self.geometry.extent_count
        first = self._bits.find(1, from_extent, count) if from_extent < count else -1
        if first < 0:
            return None
        limit = min(first + max_extents, count)
        end = self._bits.find(0, first, limit)
        return first, end if end >= 0 else limit

    def is_suspect(self, extent: int) -> bool:
        """Whether what is dirty around this extent is a suspicion, not a known write."""
        return bool(self.suspect[extent >> self._region_shift])

    def _set(self, first: int, last_exclusive: int) -> None:
        for page in _pages(first, last_exclusive):
            start = max(first, page * EXTENTS_PER_PAGE)
            stop = min(last_exclusive, (page + 1) * EXTENTS_PER_PAGE)
            missing = self._bits.count(0, start, stop)
            if missing:
                self._bits[start:stop] = 1
                self._note_set(page, missing)

    def _note_set(self, page: int, added: int) -> None:
        self._count += added
        self._version[page] += 1
        self._unsaved.add(page)

    def _settle_suspicion(self, first: int, last_exclusive: int) -> None:
        shift = self._region_shift
        regions = range(first >> shift, ((last_exclusive - 1) >> shift) + 1)
        if self.suspect.find(1, regions.start, regions.stop) < 0:
            return
        for region in regions:
            extents = self.geometry.extents_of_region(region)
            if self._bits.find(1, extents.start, extents.stop) < 0:
                self.suspect[region] = 0

    # --- pages: what the disk lacks --------------------------------------------------------------

    def unsaved_pages_of_region(self, region: int) -> list[int]:
        """Pages to write before this region may leave the intent log."""
        return [page for page in self.geometry.pages_of_region(region) if page in self._unsaved]

    def unsaved_pages(self) -> list[int]:
        """All pages that lack a set bit on disk, ascending."""
        return sorted(self._unsaved)

    def stale_pages(self) -> list[int]:
        """All pages that differ on disk in any way, ascending."""
        return sorted(self._unsaved | self._cleared)

    def begin_page(self, index: int, generation: bytes) -> PageWrite:
        """Snapshot a page. End with `end_page` once it is durable, or `abort_page`."""
        assert len(generation) == 16, "a generation has 16 bytes"
        self._sequence += 1
        head = _HEAD.pack(
            *(MAGIC, VERSION, 0, index, 0, self._sequence, self.map_id, generation, 0, 0)
        )
        bits = self.page_bits(index)
        crc = crc32c(bits, crc32c(head))
        block = head[:_CRC_AT] + crc.to_bytes(4, "big") + bits
        if self._writing.get(index):
            self._overlapped.add(index)
        self._writing[index] = self._writing.get(index, 0) + 1
        self._cleared.discard(index)
        offset = MAP_OFFSET_BYTES + index * META_BLOCK_BYTES
        return PageWrite(index, offset, block, self._version[index])

    def end_page(self, write: PageWrite) -> None:
        """The block of `write` is durable; the page is saved unless a bit was set meanwhile."""
        if self._end_write(write.index) and self._version[write.index] == write.version:
            self._unsaved.discard(write.index)

    def abort_page(self, write: PageWrite) -> None:
        """The block of `write` could not be written: the page on disk may hold anything."""
        self._end_write(write.index)
        self._unsaved.add(write.index)

    def _end_write(self, index: int) -> bool:
        """One write less under way; whether it was alone all the time."""
        left = self._writing[index] - 1
        assert left >= 0, "a page write ended twice"
        if left:
            self._writing[index] = left
            return False
        del self._writing[index]
        if index in self._overlapped:
            self._overlapped.discard(index)
            self._cleared.add(index)
            return False
        return True

    # --- pages: reading and merging --------------------------------------------------------------

    def load_page(self, index: int, block: bytes) -> bool:
        """Take over a page from disk. False if it cannot be trusted: all of it becomes suspect.

        Never clears a bit. A page of zeros is bad: creation writes every page in full.
        """
        bits = self._trusted_bits(index, block)
        if bits is None:
            extents = self.geometry.extents_of_page(index)
            self._set(extents.start, extents.stop)
            self._version[index] += 1
            self._unsaved.add(index)
            shift = self._region_shift
            self.suspect[extents.start >> shift : ((extents.stop - 1) >> shift) + 1] = 1
            return False
        was_clean = not self.page_any(index)
        self._merge(index, bits)
        if was_clean:
            self._unsaved.discard(index)
            self._cleared.discard(index)
        return True

    def load(self, blocks: Iterable[bytes]) -> list[int]:
        """Take over all pages, in order; returns the indexes of bad or missing ones.

        Raises MetadataError when there are more pages than the device has.
        """
        bad: list[int] = []
        index = 0
        for block in blocks:
            if index == self.geometry.page_count:
                raise MetadataError(f"dirty map: more than {index} pages; the file is of another")
            if not self.load_page(index, block):
                bad.append(index)
            index += 1
        for missing in range(index, self.geometry.page_count):
            self.load_page(missing, b"")
            bad.append(missing)
        return bad

    def doubt_saved(self) -> None:
        """No page with a bit counts as saved any more: it was read, and may be in a cache only."""
        for index in range(self.geometry.page_count):
            if self.page_any(index):
                self._unsaved.add(index)

    def merge_page(self, index: int, bits: bytes) -> None:
        """Add the dirty extents of a peer's page (4032 bytes of bits).

        What only the peer calls dirty is suspect here: after a crash its map is mostly whole
        regions that were hot, and the page does not say which bits are.

        Raises PeerProtocolError when page, length or bits do not fit this device.
        """
        if not 0 <= index < self.geometry.page_count:
            raise PeerProtocolError(f"map page {index} of {self.geometry.page_count}")
        if len(bits) != MAP_PAGE_PAYLOAD_BYTES:
            raise PeerProtocolError(f"map page of {len(bits)} bytes")
        if self._has_stray_bits(index, bits):
            raise PeerProtocolError(f"map page {index} has extents beyond the device")
        self._suspect_new(index, bits)
        self._merge(index, bits)

    def page_bits(self, index: int) -> bytes:
        """The bits of one page, 4032 bytes, first extent in the highest bit of the first byte."""
        assert 0 <= index < self.geometry.page_count, index
        start = index * MAP_PAGE_PAYLOAD_BYTES
        return bytes(self._bytes[start : start + MAP_PAGE_PAYLOAD_BYTES])

    def page_any(self, index: int) -> bool:
        """Whether a page has a dirty extent."""
        extents = self.geometry.extents_of_page(index)
        return self._bits.find(1, extents.start, extents.stop) >= 0

    def _merge(self, index: int, bits: bytes) -> None:
        start = index * EXTENTS_PER_PAGE
        stop = start + EXTENTS_PER_PAGE
        before = self._bits.count(1, start, stop)
        theirs = bitarray(bits, endian="big")
        merged = self._bits[start:stop] | theirs
        added = merged.count() - before
        if added:
            self._bits[start:stop] = merged
            self._note_set(index, added)

    def _suspect_new(self, index: int, bits: bytes) -> None:
        """Make the regions suspect in which `bits` has an extent that is clean here."""
        first = index * EXTENTS_PER_PAGE
        new = bitarray(bits, endian="big") & ~self._bits[first : first + EXTENTS_PER_PAGE]
        at = new.find(1)
        while at >= 0:
            region = (first + at) >> self._region_shift
            self.suspect[region] = 1
            at = new.find(1, self.geometry.extents_of_region(region).stop - first)

    def _has_stray_bits(self, index: int, bits: bytes) -> bool:
        extents = self.geometry.extents_of_page(index)
        if len(extents) == EXTENTS_PER_PAGE:
            return False
        return bitarray(bits, endian="big").find(1, len(extents)) >= 0

    def _trusted_bits(self, index: int, block: bytes) -> bytes | None:
        if len(block) != META_BLOCK_BYTES:
            return None
        magic, version, pad0, at, pad1, sequence, map_id, _, pad2, crc = _HEAD.unpack_from(block)
        head = block[:_CRC_AT] + bytes(4)
        bits = block[MAP_PAGE_HEADER_BYTES:]
        if crc32c(bits, crc32c(head)) != crc or (magic, version) != (MAGIC, VERSION):
            return None
        if (pad0, pad1, pad2) != (0, 0, 0) or at != index or map_id != self.map_id:
            return None
        if sequence > _SEQUENCE_MAX or self._has_stray_bits(index, bits):
            return None
        self._sequence = max(self._sequence, sequence)
        return bits


def _pages(first: int, last_exclusive: int) -> range:
    """Pages that hold the bits of extents [first, last_exclusive)."""
    if first == last_exclusive:
        return range(0)
    return range(first // EXTENTS_PER_PAGE, (last_exclusive - 1) // EXTENTS_PER_PAGE + 1)
