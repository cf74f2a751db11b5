"""The write-intent log: which regions may differ between the two copies after a crash.

Owns: the hot set in memory, its ring of snapshots on disk, and the judgement of what a crash left
in that ring. Must never: perform I/O, evict a region on its own, or take a damaged ring for a
clean one.

How it is written. Transaction n is a COMPLETE snapshot of the hot set in one 4 KiB block, at block
n % 64 of the ring; the first one is n = 1. A data write waits until a snapshot that names its
regions is durable; regions that are hot already cost nothing. A power cut can tear a block at
sector borders (512 bytes), so each sector carries its own checksum, and the number and checksum of
the whole snapshot it belongs to. With N the newest complete snapshot, exactly these pictures are
sound:

    block of                 holds
    N, N-1, ... N-62         its complete snapshot; all zeros where the number is below 1
    N+1 (= that of N-63)     the complete snapshot N-63 (or zeros), or any mix, sector by sector, of
                             it with snapshots numbered N+1: torn before it was acknowledged, and
                             therefore ignored

Everything else is damage, and damage means that every region may differ. Two attempts at N+1 (an
error, or two power cuts in a row) can mix sectors with the same number; the snapshot checksum tells
such a block from a complete one.
"""

import heapq
import struct
from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple, TypeAlias

from construct import Array, Bytes, Int8ub, Int16ub, Int32ub, Int64ub, Struct

from nbdmirror.core.checks import crc32c
from nbdmirror.core.geometry import Geometry
from nbdmirror.limits import (
    LOG_BLOCKS_COUNT,
    LOG_OFFSET_BYTES,
    LOG_SECTOR_BYTES,
    META_BLOCK_BYTES,
)

MAGIC: Final = 0x4E424C47  # "NBLG"
VERSION: Final = 1
SECTORS_PER_BLOCK: Final = META_BLOCK_BYTES // LOG_SECTOR_BYTES
RING_BYTES: Final = LOG_BLOCKS_COUNT * META_BLOCK_BYTES
_HEAD = struct.Struct(">IHBBQQ16s16sHHI")
_SNAPSHOT_CRC_AT: Final = _HEAD.size - 4
_CRC_AT: Final = LOG_SECTOR_BYTES - 4
REGIONS_PER_SECTOR: Final = (_CRC_AT - _HEAD.size) // 4
_BODY_BYTES: Final = REGIONS_PER_SECTOR * 4
HOT_REGIONS_MAX: Final = REGIONS_PER_SECTOR * SECTORS_PER_BLOCK

# The schema of record of one sector; the code below uses its struct twin, for speed.
SECTOR = Struct(
    "magic" / Int32ub,
    "version" / Int16ub,
    "sector_index" / Int8ub,
    "pad0" / Int8ub,
    "txn" / Int64ub,
    "peer_txn" / Int64ub,
    "map_id" / Bytes(16),
    "generation" / Bytes(16),
    "count" / Int16ub,
    "pad1" / Int16ub,
    "snapshot_crc" / Int32ub,
    "regions" / Array(REGIONS_PER_SECTOR, Int32ub),
    "crc" / Int32ub,
)
assert SECTOR.sizeof() == LOG_SECTOR_BYTES
# Nobody gets there by counting; refusing more keeps the next number representable.
TXN_MAX: Final = (1 << 63) - 1
_EMPTY_SECTOR: Final = bytes(LOG_SECTOR_BYTES)


@dataclass(slots=True)
class HotRegion:
    """One hot region: the newest write into it, and the log version that made it hot."""

    last_seq: int
    version: int


class Commit(NamedTuple):
    """A snapshot to be made durable: `block` (4096 bytes) at `offset` of the metadata file."""

    version: int
    txn: int
    offset: int
    block: bytes
    peer_txn: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the ring on disk said. `damaged`: every region may differ, whatever `hot` says.

    `txn` and `peer_txn` are those of the newest complete snapshot, also of a damaged ring.
    """

    hot: frozenset[int]
    txn: int
    peer_txn: int
    damaged: bool
    reason: str


class _Sector(NamedTuple):
    txn: int
    peer_txn: int
    generation: bytes
    snapshot_crc: int
    regions: tuple[int, ...]
    content_crc: int


class _Snapshot(NamedTuple):
    txn: int
    peer_txn: int
    generation: bytes
    regions: list[int]


# One block as read: per sector what it holds, None where it was never written.
_Block: TypeAlias = list[_Sector | None]


def empty_ring() -> bytes:
    """The ring of a metadata file that was just created: nothing was ever hot. 256 KiB."""
    return bytes(RING_BYTES)


class IntentLog:
    """The hot set of one node. `version` counts changes of the set, `durable` is the one on disk.

    `txn` is the number of the newest durable snapshot. `peer_txn` is the highest number heard from
    the peer, `durable_peer_txn` the one that the newest durable snapshot carries. Only one commit
    is under way at a time. `capacity` is how many regions may be hot at once: what a snapshot
    holds, or less in the simulator, where devices are small.
    """

    def __init__(self, geometry: Geometry, map_id: bytes) -> None:
        assert len(map_id) == 16, "a map id has 16 bytes"
        self.geometry = geometry
        self.map_id = map_id
        self.hot: dict[int, HotRegion] = {}
        # The same regions in ascending order: sorting them anew took most of a commit.
        self._ordered: list[int] = []
        self.capacity = HOT_REGIONS_MAX
        self.version = 0
        self.durable = 0
        self.txn = 0
        self.peer_txn = 0
        self.durable_peer_txn = 0
        # No number at or below this one is used again, even if its snapshot was lost.
        self._used_txn = 0
        self._committing: Commit | None = None

    # --- the hot set ---------------------------------------------------------------------------

    def touch(self, first_region: int, last_region: int, seq: int) -> int:
        """Make regions first..last (both included) hot for write `seq`; the caller made room.

        Returns the version that must be durable before the data is written, 0 if it is already.
        """
        if first_region == last_region:
            region = self.hot.get(first_region)
            if region is not None:
                if seq > region.last_seq:  # noqa: PLR1730 - max() would double the cost
                    region.last_seq = seq
                version = region.version
                return version if version > self.durable else 0
        return self._touch_range(first_region, last_region, seq)

    def _touch_range(self, first_region: int, last_region: int, seq: int) -> int:
        assert 0 <= first_region <= last_region < self.geometry.region_count, last_region
        assert self.room_for(first_region, last_region), "the caller makes room first"
        fresh = self.version + 1
        needed = 0
        for index in range(first_region, last_region + 1):
            region = self.hot.get(index)
            if region is None:
                region = self.hot[index] = HotRegion(seq, fresh)
                insort(self._ordered, index)
                self.version = fresh
            elif seq > region.last_seq:
                region.last_seq = seq
            needed = max(needed, region.version)
        return needed if needed > self.durable else 0

    def room_for(self, first_region: int, last_region: int) -> bool:
        """Whether regions first..last (both included) fit into the hot set as it is."""
        span = last_region - first_region + 1
        free = self.capacity - len(self.hot)
        if span <= free:
            return True
        if span > self.capacity:
            return False
        return sum(r not in self.hot for r in range(first_region, last_region + 1)) <= free

    def evictable(self, stable_seq: int, busy: Callable[[int], bool], count: int) -> list[int]:
        """Up to `count` regions that may leave the set, least recently written first.

        Only those that are durably hot, whose last write is not above `stable_seq` and which are
        not busy. The caller has saved their dirty extents before it drops them.
        """
        candidates = (
            (region.last_seq, index)
            for index, region in self.hot.items()
            if region.last_seq <= stable_seq and region.version <= self.durable and not busy(index)
        )
        return [index for _, index in heapq.nsmallest(count, candidates)]

    def is_evictable(self, region: int, stable_seq: int) -> bool:
        """Whether a region (still) is what `evictable` returns."""
        hot = self.hot.get(region)
        return hot is not None and hot.last_seq <= stable_seq and hot.version <= self.durable

    def drop(self, regions: list[int]) -> None:
        """Take regions out of the set; on disk they stay hot until the next commit."""
        for index in regions:
            del self.hot[index]
        if regions:
            self._ordered = [index for index in self._ordered if index in self.hot]
            self.version += 1

    # --- writing -------------------------------------------------------------------------------

    def begin_commit(self, generation: bytes) -> Commit:
        """Snapshot the set as it is now. End with `end_commit` once durable, or `abort_commit`."""
        assert self._committing is None, "one commit at a time"
        txn = max(self.txn, self._used_txn) + 1
        self._committing = self._snapshot(txn, generation)
        return self._committing

    def end_commit(self, commit: Commit) -> None:
        """The block of `commit` is durable."""
        assert commit is self._committing, "not the commit that is under way"
        self._committing = None
        self.durable = max(self.durable, commit.version)
        self.txn = commit.txn
        self.durable_peer_txn = commit.peer_txn

    def abort_commit(self, commit: Commit) -> None:
        """The block of `commit` could not be written: its place holds anything, nothing counts.

        The next commit uses the same number and the same place again.
        """
        assert commit is self._committing, "not the commit that is under way"
        self._committing = None

    def begin_rebuild(self, generation: bytes) -> list[Commit]:
        """64 snapshots that make a damaged ring sound again; `end_commit` of the last ends it.

        Only after everything that the damage made dirty is durable in the map: between the first
        and the last of these blocks a crash may leave a ring that looks sound.
        """
        assert self._committing is None, "one commit at a time"
        first = max(self.txn, self._used_txn) + 1
        commits = [self._snapshot(first + n, generation) for n in range(LOG_BLOCKS_COUNT)]
        self._committing = commits[-1]
        return commits

    def _snapshot(self, txn: int, generation: bytes) -> Commit:
        packed = struct.pack(f">{len(self._ordered)}I", *self._ordered)
        sectors: list[tuple[bytes, bytes]] = []
        for index in range(SECTORS_PER_BLOCK):
            part = packed[index * _BODY_BYTES : (index + 1) * _BODY_BYTES]
            head = _HEAD.pack(
                *(MAGIC, VERSION, index, 0, txn, self.peer_txn),
                *(self.map_id, generation, len(part) // 4, 0, 0),
            )[:_SNAPSHOT_CRC_AT]
            sectors.append((head, part.ljust(_BODY_BYTES, b"\0")))
        snapshot_crc = _snapshot_crc(crc32c(body, crc32c(head)) for head, body in sectors)
        block = bytearray()
        for head, body in sectors:
            sector = head + snapshot_crc.to_bytes(4, "big") + body
            block += sector
            block += crc32c(sector).to_bytes(4, "big")
        offset = LOG_OFFSET_BYTES + txn % LOG_BLOCKS_COUNT * META_BLOCK_BYTES
        return Commit(self.version, txn, offset, bytes(block), self.peer_txn)

    # --- reading -------------------------------------------------------------------------------

    def load(
        self, ring: bytes, known_generations: frozenset[bytes], expected_txn_min: int = 0
    ) -> Loaded:
        """Judge the ring (256 KiB) and continue its numbering; `hot` stays empty.

        `known_generations` are those under which this node may have logged (`log_generations` of
        the superblock), `expected_txn_min` the number that the superblock remembers: a ring whose
        newest is lower was rolled back. The caller turns `Loaded.hot`, or everything when damaged,
        into durable dirty extents before the next commit, and rebuilds a damaged ring.
        """
        assert not self.hot, "load before the first touch"
        assert self._committing is None, "load before the first commit"
        blocks, problem = _read_ring(ring, self.map_id)
        newest = max(
            filter(None, (_complete(block, n) for n, block in enumerate(blocks))),
            key=lambda snapshot: snapshot.txn,
            default=_Snapshot(0, 0, b"", []),
        )
        if not problem:
            problem = _picture_problem(blocks, newest.txn)
        if not problem:
            problem = self._newest_problem(newest, known_generations, expected_txn_min)
        seen = (sector.txn for block in blocks for sector in block if sector is not None)
        self.txn = newest.txn
        self.peer_txn = self.durable_peer_txn = newest.peer_txn
        # A torn snapshot N+1 is written again under its number; after damage no number that
        # anybody may have seen is used again.
        self._used_txn = max(expected_txn_min, newest.txn, *seen) if problem else newest.txn
        hot = frozenset() if problem else frozenset(newest.regions)
        return Loaded(hot, newest.txn, newest.peer_txn, damaged=bool(problem), reason=problem)

    def _newest_problem(
        self, newest: _Snapshot, known_generations: frozenset[bytes], expected_txn_min: int
    ) -> str:
        if newest.txn < expected_txn_min:
            return (
                f"intent log: newest transaction {newest.txn}, but {expected_txn_min} was durable: "
                "the log was rolled back or lost"
            )
        if newest.txn and newest.generation not in known_generations:
            return f"intent log: written under unknown generation {newest.generation.hex()}"
        if any(a >= b for a, b in pairwise(newest.regions)):
            return f"intent log: transaction {newest.txn} is not in order"
        if newest.regions and newest.regions[-1] >= self.geometry.region_count:
            return f"intent log: region {newest.regions[-1]} lies outside the device"
        return ""


def _snapshot_crc(content_crcs: Iterable[int]) -> int:
    """What ties the sectors of one snapshot together: the CRC of their contents' CRCs."""
    return crc32c(b"".join(crc.to_bytes(4, "big") for crc in content_crcs))


def _read_sector(data: memoryview, index: int, map_id: bytes) -> tuple[_Sector | None, str]:
    """One sector and what is wrong with it. (None, "") was never written."""
    if data == _EMPTY_SECTOR:
        return None, ""
    if crc32c(data[:_CRC_AT]) != int.from_bytes(data[_CRC_AT:], "big"):
        return None, "checksum"
    magic, version, at, pad0, txn, peer_txn, own_map, generation, count, pad1, snapshot_crc = (
        _HEAD.unpack_from(data)
    )
    if (magic, version, at, pad0, pad1) != (MAGIC, VERSION, index, 0, 0):
        return None, "not a sector of this log, version or place"
    if own_map != map_id:
        return None, f"it belongs to map {own_map.hex()}"
    if count > REGIONS_PER_SECTOR or not 1 <= txn <= TXN_MAX:
        return None, f"{count} regions in transaction {txn}"
    regions = struct.unpack_from(f">{count}I", data, _HEAD.size)
    content = crc32c(data[_HEAD.size : _CRC_AT], crc32c(data[:_SNAPSHOT_CRC_AT]))
    return _Sector(txn, peer_txn, generation, snapshot_crc, regions, content), ""


def _read_ring(ring: bytes, map_id: bytes) -> tuple[list[_Block], str]:
    """All sectors of all blocks, and the first problem found."""
    if len(ring) != RING_BYTES:
        return [], f"intent log: {len(ring)} bytes, expected {RING_BYTES}"
    view = memoryview(ring)
    problem = ""
    blocks: list[_Block] = []
    for number in range(LOG_BLOCKS_COUNT):
        block: _Block = []
        for index in range(SECTORS_PER_BLOCK):
            start = number * META_BLOCK_BYTES + index * LOG_SECTOR_BYTES
            sector, wrong = _read_sector(view[start : start + LOG_SECTOR_BYTES], index, map_id)
            block.append(sector)
            if wrong and not problem:
                problem = f"intent log: block {number}, sector {index}: {wrong}"
        blocks.append(block)
    return blocks, problem


def _complete(block: _Block, number: int) -> _Snapshot | None:
    """The snapshot that block `number` of the ring holds, if all of it is there."""
    sectors = [sector for sector in block if sector is not None]
    if len(sectors) != SECTORS_PER_BLOCK:
        return None
    first = sectors[0]
    if first.txn % LOG_BLOCKS_COUNT != number:
        return None
    if any(sector[:4] != first[:4] for sector in sectors):
        return None
    if _snapshot_crc(sector.content_crc for sector in sectors) != first.snapshot_crc:
        return None
    regions = [region for sector in sectors for region in sector.regions]
    return _Snapshot(first.txn, first.peer_txn, first.generation, regions)


def _picture_problem(blocks: list[_Block], newest: int) -> str:
    """Whether every block holds what the writing protocol can have left there."""
    torn_at = (newest + 1) % LOG_BLOCKS_COUNT
    for number, block in enumerate(blocks):
        if number == torn_at:
            before = max(newest + 1 - LOG_BLOCKS_COUNT, 0)
            found = {0 if sector is None else sector.txn for sector in block}
            if not found <= {newest + 1, before}:
                return f"intent log: block {number} holds transactions {sorted(found)}"
            if newest + 1 in found:
                continue
        txn = newest - (newest - number) % LOG_BLOCKS_COUNT
        if txn < 1:
            sound = all(sector is None for sector in block)
        else:
            snapshot = _complete(block, number)
            sound = snapshot is not None and snapshot.txn == txn
        if not sound:
            return f"intent log: block {number} does not hold transaction {max(txn, 0)}"
    return ""
