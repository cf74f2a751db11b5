"""Parsers of what lies on a disk or in a store: superblock, log, map, kept index, record.

Owns their seeds, seals and what has to hold of what they take. A damaged block may never mean
"clean", so the checks ask what was believed, not only what was raised.
"""

import struct
from collections.abc import Sequence
from random import Random
from typing import Final, cast

from nbdmirror.core import kept, record, superblock
from nbdmirror.core.checks import crc32c
from nbdmirror.core.dirtymap import DirtyMap
from nbdmirror.core.geometry import Geometry
from nbdmirror.core.intentlog import RING_BYTES, IntentLog, empty_ring
from nbdmirror.core.kept import Entry, Judge, Kept
from nbdmirror.core.ports import KeptFile
from nbdmirror.core.record import Record
from nbdmirror.core.superblock import ArbiterKind, DataState, Flags, PendingKind, Superblock
from nbdmirror.errors import ArbiterError, MetadataError, PeerProtocolError
from nbdmirror.limits import (
    LOG_OFFSET_BYTES,
    LOG_SECTOR_BYTES,
    MAP_PAGE_HEADER_BYTES,
    META_BLOCK_BYTES,
    MIB,
)  # fmt: skip
from tests.fuzz.mutate import Field, by_fields, changed_bytes, changed_json
from tests.fuzz.parser import Parser

ID: Final = b"m" * 16
MAP_ID: Final = b"p" * 16
GENERATION: Final = b"g" * 16
# Several pages of the map, the last of them a part of one.
GEOMETRY: Final = Geometry(200 * MIB + 512, 4096, 4 * MIB)
CRC_BYTES: Final = 4


# --- superblock --------------------------------------------------------------------------------


def a_superblock(**changes: object) -> Superblock:
    """A state of a node in the middle of its life."""
    values: dict[str, object] = {
        "mirror_id": ID, "mirror_name": "demo", "node_id": 1, "node_uuid": b"u" * 16,
        "device_bytes": GEOMETRY.device_bytes, "extent_bytes": 4096, "region_bytes": 4 * MIB,
        "map_id": MAP_ID, "arbiter": ArbiterKind.ETCD, "generation": GENERATION,
        "base": (b"b" * 16,), "history": (b"h" * 16,), "pending": b"q" * 16,
        "pending_kind": PendingKind.JOINT, "data_state": DataState.UPTODATE, "flags": Flags.ALONE,
        "own_txn": 5, "peer_txn": 6, "term": 2, "sequence": 9, "peer_uuid": b"v" * 16,
    } | changes  # fmt: skip
    return Superblock(**values)  # type: ignore[arg-type] # a table of keywords


def superblock_seeds() -> Sequence[bytes]:
    """Two slots each: equal, torn between, one empty."""
    now = superblock.encode(a_superblock())
    later = superblock.encode(a_superblock(sequence=10, flags=Flags.CLEAN))
    blank = superblock.encode(
        a_superblock(
            data_state=DataState.BLANK, generation=bytes(16), base=(), history=(),
            pending=bytes(16), pending_kind=PendingKind.NONE, sequence=0,
        )
    )  # fmt: skip
    return [now + now, later + now, now + bytes(META_BLOCK_BYTES), later + later, blank + blank]


def sealed_blocks(data: bytes) -> bytes:
    """The checksum of each whole block, in its last four bytes."""
    work = bytearray(data)
    for end in range(META_BLOCK_BYTES, len(work) + 1, META_BLOCK_BYTES):
        content = bytes(work[end - META_BLOCK_BYTES : end - CRC_BYTES])
        work[end - CRC_BYTES : end] = crc32c(content).to_bytes(CRC_BYTES, "big")
    return bytes(work)


def feed_superblock(data: bytes) -> bool:
    """What is chosen is one of the two, byte for byte."""
    slots = data[:META_BLOCK_BYTES], data[META_BLOCK_BYTES:]
    chosen = superblock.choose(*slots)
    assert superblock.encode(chosen.superblock) == slots[chosen.slot]
    assert chosen.fell_back or chosen.slot == 0, "slot 1 alone is a fall back"
    return True


def superblock_fields() -> list[Field]:
    """Offset and size of every field of the first slot."""
    found, at = [], 0
    for sub in superblock._BODY.subcons:
        size = int(sub.sizeof())
        found.append((at, size))
        at += size
    return found


# --- intent log --------------------------------------------------------------------------------


def ring_of(commits: int) -> bytes:
    """A ring after so many commits."""
    log = IntentLog(GEOMETRY, MAP_ID)
    ring = bytearray(empty_ring())
    for n in range(commits):
        log.touch(n % GEOMETRY.region_count, n % GEOMETRY.region_count, n + 1)
        commit = log.begin_commit(GENERATION)
        at = commit.offset - LOG_OFFSET_BYTES
        ring[at : at + META_BLOCK_BYTES] = commit.block
        log.end_commit(commit)
    return bytes(ring)


RINGS: Final = tuple(ring_of(n) for n in (0, 3, 64, 70))
EDIT: Final = struct.Struct(">BBHB")
"""Which sector (block, place), where in it, how many bytes; they follow."""


def log_seeds() -> Sequence[bytes]:
    """The number of a ring, then edits: a whole ring for each input would be nothing but copies."""
    edits = [
        EDIT.pack(block, sector, at, len(new)) + new
        for block, sector, at, new in (
            (2, 0, 8, b"\0" * 7 + b"\x04"), (3, 7, 56, b"\0\x01"), (5, 1, 100, b"\xff" * 4),
            (6, 0, 0, b"\0" * 255), (63, 3, 60, b"\0\0\0\0"), (0, 2, 24, b"x" * 16),
        )
    ]  # fmt: skip
    return [bytes((n,)) + edit for n in (0, 1, 2, 3, 0x81, 0x83) for edit in (b"", *edits)]


def edited_ring(data: bytes) -> bytes:
    """The ring that an input stands for; with the high bit sectors get a checksum that fits."""
    number = data[0] if data else 0
    ring = bytearray(RINGS[number % len(RINGS)])
    at = 1
    while at + EDIT.size <= len(data):
        block, sector, place, count = EDIT.unpack_from(data, at)
        at += EDIT.size
        start = block % 64 * META_BLOCK_BYTES + sector % 8 * LOG_SECTOR_BYTES
        new = data[at : at + count][: LOG_SECTOR_BYTES - place % LOG_SECTOR_BYTES]
        where = start + place % LOG_SECTOR_BYTES
        ring[where : where + len(new)] = new
        at += count
        if number & 0x80:
            end = start + LOG_SECTOR_BYTES
            crc = crc32c(bytes(ring[start : end - CRC_BYTES]))
            ring[end - CRC_BYTES : end] = crc.to_bytes(CRC_BYTES, "big")
    return bytes(ring)


def feed_log(data: bytes) -> bool:
    """A ring is whole, or everything is dirty; never a part of it that looks like the whole."""
    ring = edited_ring(data)
    assert len(ring) == RING_BYTES
    log = IntentLog(GEOMETRY, MAP_ID)
    loaded = log.load(ring, frozenset((GENERATION,)))
    assert not log.hot
    assert loaded.damaged == bool(loaded.reason)
    assert all(0 <= region < GEOMETRY.region_count for region in loaded.hot)
    if loaded.damaged:
        assert not loaded.hot, "a part of a damaged log was believed"
    elif not (len(data) > 1 and data[0] & 0x80):
        changed = sum(a != b for a, b in zip(sectors(ring), sectors(base(data)), strict=True))
        assert changed <= 8, "sectors of several blocks were changed and nobody saw it"
    log.end_commit(log.begin_commit(GENERATION))
    return not loaded.damaged


def base(data: bytes) -> bytes:
    """The ring before its edits."""
    return RINGS[(data[0] if data else 0) % len(RINGS)]


def sectors(ring: bytes) -> list[bytes]:
    """All sectors of a ring."""
    return [ring[at : at + LOG_SECTOR_BYTES] for at in range(0, len(ring), LOG_SECTOR_BYTES)]


# --- dirty map ---------------------------------------------------------------------------------


def map_seeds() -> Sequence[bytes]:
    """How it is used (a page of ours, a page of the peer), which page, then its bytes."""
    dirty = DirtyMap(GEOMETRY, MAP_ID)
    dirty.mark(0, 9000)
    dirty.mark(GEOMETRY.device_bytes - 512, GEOMETRY.device_bytes)
    pages = [dirty.begin_page(index, GENERATION).block for index in range(GEOMETRY.page_count)]
    own = [bytes((0, index)) + block for index, block in enumerate(pages)]
    return own + [bytes((1, n)) + block[MAP_PAGE_HEADER_BYTES:] for n, block in enumerate(pages)]


def sealed_page(data: bytes) -> bytes:
    """The checksum of a page of ours."""
    if len(data) != 2 + META_BLOCK_BYTES or data[0] & 1:
        return data
    block = data[2:]
    at = MAP_PAGE_HEADER_BYTES - CRC_BYTES
    crc = crc32c(block[MAP_PAGE_HEADER_BYTES:], crc32c(block[:at] + bytes(CRC_BYTES)))
    return data[:2] + block[:at] + crc.to_bytes(CRC_BYTES, "big") + block[at + CRC_BYTES :]


def feed_page(data: bytes) -> bool:
    """No bit is ever lost; a page that is not believed makes all of its extents dirty."""
    kind, index, block = (data[0], data[1], data[2:]) if len(data) > 1 else (0, 0, b"")
    dirty = DirtyMap(GEOMETRY, MAP_ID)
    dirty.mark(4096 * 3, 4096 * 5)
    before = dirty.count
    if kind & 1:
        try:
            dirty.merge_page(index, block)
        except PeerProtocolError:
            assert dirty.count == before, "a refused page changed the map"
            assert not dirty.suspect.any()
            raise
        taken = True
    else:
        taken = dirty.load_page(index % GEOMETRY.page_count, block)
        if not taken:
            extents = GEOMETRY.extents_of_page(index % GEOMETRY.page_count)
            run = dirty.next_run(extents.start, len(extents))
            assert run == (extents.start, extents.stop), "a bad page does not count as dirty"
    assert dirty.dirty_in(4096 * 3, 4096 * 5)
    assert before <= dirty.count <= GEOMETRY.extent_count
    dirty.next_run(0, GEOMETRY.extent_count)
    return taken


# --- what is kept ------------------------------------------------------------------------------

IMAGE: Final = b"k" * 16
NO_FILE: Final = cast("KeptFile", object())  # the judge looks at what it is given
SLOTS_MAX: Final = 64


def kept_seeds() -> Sequence[bytes]:
    """How many entries the superblock remembers, the header, then the index."""
    header = kept.encode_header(
        kept.Header(
            node_id=1, extent_bytes=4096, device_bytes=GEOMETRY.device_bytes, mirror_id=ID,
            node_uuid=b"u" * 16, image_id=IMAGE, generation=GENERATION, own_bytes=1, peer_bytes=2,
        )
    )  # fmt: skip
    entries = [
        kept.encode_entry(IMAGE, n, Entry(n * 7, crc32c(bytes((n,))), n // 4 * 4, n % 3 == 0))
        for n in range(12)
    ]
    index = b"".join(entries)
    return [b"\0" + header, b"\x04" + header + index, b"\x0c" + header + index + bytes(64)]


def sealed_kept(data: bytes) -> bytes:
    """Checksums of header and entries; the image is the one that the header names, if it does."""
    head, index = bytearray(data[1 : 1 + META_BLOCK_BYTES]), bytearray(data[1 + META_BLOCK_BYTES :])
    if len(head) == META_BLOCK_BYTES:
        head[-CRC_BYTES:] = crc32c(bytes(head[:-CRC_BYTES])).to_bytes(CRC_BYTES, "big")
    for slot in range(len(index) // kept.ENTRY_BYTES):
        at = slot * kept.ENTRY_BYTES
        body = bytes(index[at : at + kept.ENTRY_BYTES - CRC_BYTES])
        if any(body):
            crc = kept._entry_crc(IMAGE, slot, body)
            index[at + kept.ENTRY_BYTES - CRC_BYTES : at + kept.ENTRY_BYTES] = crc
    return data[:1] + bytes(head) + bytes(index)


def feed_kept(data: bytes) -> bool:
    """Only entries that carry their own proof count, each extent once, in their order."""
    header = kept.decode_header(data[1 : 1 + META_BLOCK_BYTES])
    Geometry(header.device_bytes, header.extent_bytes, 4 * MIB)
    index = data[1 + META_BLOCK_BYTES :][: SLOTS_MAX * kept.ENTRY_BYTES]
    held = Kept(NO_FILE, GEOMETRY, header)
    judge = Judge(held, data[0])
    believed = []
    for slot in range(-(-len(index) // kept.ENTRY_BYTES)):
        block = index[slot * kept.ENTRY_BYTES :][: kept.ENTRY_BYTES]
        entry = kept.decode_entry(IMAGE, slot, block)
        if entry is not None:
            assert kept.encode_entry(IMAGE, slot, entry) == block
            believed.append(entry)
        judge.take(entry)
    assert held.count == held.saved.count() <= len(believed)
    damage = judge.damage()
    if not damage:
        tail = judge.tail()
        assert len(tail) == held.count - judge.durable
        held.forget(tail)
        assert held.count == judge.durable >= data[0]
    return not damage


def kept_fields() -> list[Field]:
    """Fields of the header and of the first entries, behind the byte in front."""
    head = [(0, 8), (8, 2), (10, 1), (12, 4), (16, 8), (24, 16), (40, 16), (56, 16), (72, 16)]
    entry = [(0, 4), (4, 4), (8, 8), (16, 8), (24, 4), (28, 4)]
    found: list[Field] = [(0, 1), *((1 + at, size) for at, size in head)]
    for slot in range(12):
        start = 1 + META_BLOCK_BYTES + slot * kept.ENTRY_BYTES
        found += [(start + at, size) for at, size in entry]
    return found


# --- the arbiter's record ----------------------------------------------------------------------


def feed_record(data: bytes) -> bool:
    """What is believed is this mirror's, and goes back as the same record."""
    held = record.decode(data, ID)
    assert held.mirror_id == ID
    assert record.decode(record.encode(held), ID) == held
    return True


def record_seeds() -> Sequence[bytes]:
    """Records that name nobody, somebody, another store."""
    first = Record(ID, 1, GENERATION)
    return [
        record.encode(each)
        for each in (first, first.next(b"n" * 16, 2), first.next(b"o" * 16, 0, moved=True))
    ]


def changed_edits(rng: Random, data: bytes, pool: Sequence[bytes]) -> bytes:
    """One more edit of the ring at a field of a sector, or any byte of the script."""
    if rng.random() < 0.3:
        return changed_bytes(rng, data, pool)
    fields = ((0, 4), (4, 2), (6, 1), (7, 1), (8, 8), (16, 8), (24, 16), (40, 16), (56, 2), (60, 4))
    at, size = rng.choice((*fields, (64 + 4 * rng.randrange(110), 4)))
    value = rng.choice(
        (
            rng.randbytes(size),
            bytes(size),
            b"\xff" * size,
            (rng.randrange(80)).to_bytes(size, "big"),
        )
    )
    edit = EDIT.pack(rng.randrange(64), rng.randrange(8), at, size) + value
    return (data or b"\0") + edit if rng.random() < 0.8 else data[:1] + edit


PARSERS: Final = (
    Parser("superblock", superblock_seeds, feed_superblock, (MetadataError,), sealed_blocks,
           by_fields(superblock_fields(), META_BLOCK_BYTES), weight=2),
    Parser("intent-log", log_seeds, feed_log, (MetadataError,), mutate=changed_edits, weight=2),
    Parser("dirty-map", map_seeds, feed_page, (MetadataError, PeerProtocolError), sealed_page,
           by_fields([(0, 1), (1, 1), *((2 + a, s) for a, s in ((0, 4), (4, 2), (6, 2), (8, 4),
                      (12, 4), (16, 8), (24, 16), (40, 16), (56, 4), (60, 4), (4090, 6)))]),
           weight=3),
    Parser("kept", kept_seeds, feed_kept, (MetadataError,), sealed_kept, by_fields(kept_fields()),
           weight=2),
    Parser("record", record_seeds, feed_record, (ArbiterError,), mutate=changed_json, weight=2),
)  # fmt: skip
