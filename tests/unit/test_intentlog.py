"""The write-intent log: what a crash may leave is understood, everything else makes all dirty."""

from collections.abc import Iterable

import pytest

from nbdmirror.core.checks import crc32c
from nbdmirror.core.geometry import Geometry
from nbdmirror.core.intentlog import (
    HOT_REGIONS_MAX,
    REGIONS_PER_SECTOR,
    RING_BYTES,
    SECTOR,
    TXN_MAX,
    Commit,
    IntentLog,
    Loaded,
    empty_ring,
)
from nbdmirror.limits import KIB, LOG_OFFSET_BYTES, MIB, TIB

GEOMETRY = Geometry(TIB, 4 * KIB, 4 * MIB)
MAP_ID = b"x" * 16
GENERATION = b"g" * 16
KNOWN = frozenset({GENERATION})
ALL_SECTORS = range(8)


class Ring:
    """The ring on a disk that can stop in the middle of a block."""

    def __init__(self) -> None:
        self.data = bytearray(empty_ring())

    def write(self, commit: Commit, sectors: Iterable[int] = ALL_SECTORS) -> None:
        start = commit.offset - LOG_OFFSET_BYTES
        for index in sectors:
            part = slice(index * 512, (index + 1) * 512)
            self.data[start + part.start : start + part.stop] = commit.block[part]

    def load(
        self, known: frozenset[bytes] = KNOWN, expected_txn_min: int = 0
    ) -> tuple[IntentLog, Loaded]:
        log = IntentLog(GEOMETRY, MAP_ID)
        return log, log.load(bytes(self.data), known, expected_txn_min)


def committed(log: IntentLog, ring: Ring) -> Commit:
    commit = log.begin_commit(GENERATION)
    ring.write(commit)
    log.end_commit(commit)
    return commit


def history(count: int) -> tuple[IntentLog, Ring]:
    """A log with `count` transactions; number n has region n hot, and no other."""
    log, ring = IntentLog(GEOMETRY, MAP_ID), Ring()
    for number in range(1, count + 1):
        log.drop(list(log.hot))
        log.touch(number, number, number)
        log.peer_txn = number * 10
        committed(log, ring)
    return log, ring


def masks() -> Iterable[list[int]]:
    """Every set of sectors of a block."""
    return ([i for i in ALL_SECTORS if mask >> i & 1] for mask in range(256))


def resealed(sector: bytes) -> bytes:
    return sector[:508] + crc32c(sector[:508]).to_bytes(4, "big")


# --- format ----------------------------------------------------------------------------------


def test_sectors_follow_the_schema_of_record() -> None:
    """Writer and documentation describe two formats; the next version reads neither."""
    log = IntentLog(GEOMETRY, MAP_ID)
    log.peer_txn = 2**64 - 1
    regions = [n * 3 for n in range(250)]
    for region in reversed(regions):
        log.touch(region, region, 1)
    commit = log.begin_commit(GENERATION)
    assert commit.offset == LOG_OFFSET_BYTES + 4096
    assert len(commit.block) == 4096
    found: list[int] = []
    contents = b""
    for index in ALL_SECTORS:
        raw = commit.block[index * 512 : (index + 1) * 512]
        sector = SECTOR.parse(raw)
        assert (sector.magic, sector.version, sector.sector_index) == (0x4E424C47, 1, index)
        assert (sector.txn, sector.peer_txn) == (1, 2**64 - 1)
        assert (sector.map_id, sector.generation) == (MAP_ID, GENERATION)
        assert sector.crc == crc32c(raw[:508])
        assert SECTOR.build(sector) == raw
        contents += crc32c(raw[:60] + raw[64:508]).to_bytes(4, "big")
        found += sector.regions[: sector.count]
    assert found == regions
    last = SECTOR.parse(commit.block[-512:])
    assert last.snapshot_crc == crc32c(contents)


def test_capacity_is_what_the_layout_leaves() -> None:
    """The hot set outgrows its block, and a region is hot in memory only."""
    assert (REGIONS_PER_SECTOR, HOT_REGIONS_MAX, RING_BYTES) == (111, 888, 256 * KIB)
    log, ring = IntentLog(GEOMETRY, MAP_ID), Ring()
    log.touch(5, 5 + HOT_REGIONS_MAX - 1, 1)
    committed(log, ring)
    assert ring.load()[1].hot == set(range(5, 5 + HOT_REGIONS_MAX))


# --- the hot set -----------------------------------------------------------------------------


def test_a_hot_region_is_free_only_once_durable() -> None:
    """The second write into a region overtakes the intent that the first one still waits for."""
    log, ring = IntentLog(GEOMETRY, MAP_ID), Ring()
    first = log.touch(3, 3, 1)
    assert first == 1
    assert log.touch(3, 3, 2) == first
    commit = log.begin_commit(GENERATION)
    assert log.touch(3, 3, 3) == first
    ring.write(commit)
    log.end_commit(commit)
    assert log.touch(3, 3, 4) == 0
    assert log.hot[3].last_seq == 4
    assert log.touch(3, 3, 2) == 0
    assert log.hot[3].last_seq == 4


def test_what_becomes_hot_during_a_commit_waits_for_the_next() -> None:
    """A group commit acknowledges an intent that its snapshot was too early for."""
    log, ring = IntentLog(GEOMETRY, MAP_ID), Ring()
    log.touch(3, 3, 1)
    commit = log.begin_commit(GENERATION)
    late = log.touch(4, 4, 2)
    ring.write(commit)
    log.end_commit(commit)
    assert log.touch(3, 3, 3) == 0
    assert log.touch(4, 4, 4) == late > log.durable
    assert ring.load()[1].hot == {3}
    committed(log, ring)
    assert log.touch(4, 4, 5) == 0
    assert ring.load()[1].hot == {3, 4}


def test_a_range_waits_for_its_youngest_region() -> None:
    """A write over a hot and a cold region goes ahead with one of its intents missing."""
    log, ring = IntentLog(GEOMETRY, MAP_ID), Ring()
    log.touch(3, 3, 1)
    committed(log, ring)
    assert log.touch(2, 4, 2) == 2
    assert {r: h.last_seq for r, h in log.hot.items()} == {2: 2, 3: 2, 4: 2}
    assert log.touch(3, 4, 2) == 2
    committed(log, ring)
    assert log.touch(2, 4, 3) == 0
    assert log.touch(1, 2, 3) == 3
    assert log.touch(1, 4, 3) == 3


def test_a_dropped_region_must_be_made_hot_again() -> None:
    """A region evicted and written again counts as hot, while the disk forgets it."""
    log, ring = history(1)
    log.drop([1])
    assert 1 not in log.hot
    needed = log.touch(1, 1, 9)
    assert needed > log.durable
    log.drop([1])
    committed(log, ring)
    assert ring.load()[1].hot == frozenset()


def test_dropping_can_be_waited_for() -> None:
    """A clean stop sets its mark while the disk still names hot regions."""
    log, _ = history(1)
    before = log.version
    log.drop([])
    assert log.version == before
    log.drop([1])
    assert log.version > log.durable


def test_a_failed_commit_counts_for_nothing() -> None:
    """The disk refused the intent, and the data is written all the same."""
    log, ring = history(2)
    needed = log.touch(9, 9, 9)
    commit = log.begin_commit(GENERATION)
    log.abort_commit(commit)
    assert (log.txn, log.durable_peer_txn) == (2, 20)
    assert log.touch(9, 9, 9) == needed
    again = committed(log, ring)
    assert (again.txn, again.offset) == (commit.txn, commit.offset)
    assert log.touch(9, 9, 9) == 0


def test_one_commit_at_a_time() -> None:
    """Two commits under way: the older snapshot reaches the disk last."""
    log, _ = history(1)
    commit = log.begin_commit(GENERATION)
    with pytest.raises(AssertionError, match="one commit"):
        log.begin_commit(GENERATION)
    with pytest.raises(AssertionError, match="one commit"):
        log.begin_rebuild(GENERATION)
    log.end_commit(commit)
    with pytest.raises(AssertionError, match="under way"):
        log.end_commit(commit)


def test_room_counts_only_cold_regions() -> None:
    """A full log refuses writes into regions that are hot, or takes one region too many."""
    log = IntentLog(GEOMETRY, MAP_ID)
    assert log.room_for(0, HOT_REGIONS_MAX - 1)
    assert not log.room_for(0, HOT_REGIONS_MAX)
    log.touch(0, HOT_REGIONS_MAX - 3, 1)
    assert log.room_for(0, HOT_REGIONS_MAX - 1)
    assert log.room_for(9000, 9001)
    assert not log.room_for(9000, 9002)
    assert not log.room_for(0, HOT_REGIONS_MAX)
    with pytest.raises(AssertionError, match="makes room"):
        log.touch(9000, 9002, 2)


def test_regions_outside_the_device_are_our_own_mistake() -> None:
    """A region that does not exist is logged, and the next start finds damage."""
    log = IntentLog(GEOMETRY, MAP_ID)
    with pytest.raises(AssertionError):
        log.touch(GEOMETRY.region_count, GEOMETRY.region_count, 1)


def test_eviction_takes_the_oldest_that_nothing_waits_for() -> None:
    """A region leaves the log while the peer has not flushed it, or while a write uses it."""
    log, ring = IntentLog(GEOMETRY, MAP_ID), Ring()
    for region, seq in ((1, 50), (2, 10), (3, 40), (4, 20), (5, 30)):
        log.touch(region, region, seq)
    assert log.evictable(100, lambda _: False, 9) == []
    committed(log, ring)
    log.touch(6, 6, 1)
    assert log.evictable(40, lambda _: False, 9) == [2, 4, 5, 3]
    assert log.evictable(40, lambda _: False, 2) == [2, 4]
    assert log.evictable(40, lambda region: region == 4, 2) == [2, 5]
    assert log.evictable(9, lambda _: False, 9) == []


# --- what a crash leaves ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5, 62, 63, 64, 65, 200])
def test_a_clean_ring_is_its_newest_snapshot(count: int) -> None:
    """At a wrap of the ring the log goes back 64 transactions, or reads as damage."""
    _, ring = history(count)
    log, loaded = ring.load(expected_txn_min=count)
    assert (loaded.damaged, loaded.reason) == (False, "")
    assert loaded.hot == ({count} if count else set())
    assert (loaded.txn, loaded.peer_txn) == (count, count * 10)
    assert (log.txn, log.peer_txn, log.durable_peer_txn) == (count, count * 10, count * 10)
    assert not log.hot
    assert log.begin_commit(GENERATION).txn == count + 1


@pytest.mark.parametrize("count", [0, 1, 62, 63, 64, 100])
def test_a_torn_block_was_never_acknowledged(count: int) -> None:
    """A power cut in a commit makes a full resync, or a hot set of two halves."""
    for sectors in masks():
        log, ring = history(count)
        log.touch(500, 800, 9)
        ring.write(log.begin_commit(GENERATION), sectors)
        reopened, loaded = ring.load(expected_txn_min=count)
        assert not loaded.damaged, (sectors, loaded.reason)
        if len(sectors) == 8:
            assert loaded.txn == count + 1
            assert loaded.hot == {*range(500, 801), *log.hot}
        else:
            assert loaded.txn == count
            assert loaded.hot == ({count} if count else set())
        assert reopened.begin_commit(GENERATION).txn == loaded.txn + 1


@pytest.mark.parametrize("count", [0, 70])
def test_two_attempts_at_one_number_never_mix(count: int) -> None:
    """Two power cuts in a row leave sectors of two snapshots that look like one.

    With one more region in front every later region moves by one place, so a mix of the two lacks
    the regions at the borders of its sectors.
    """
    for sectors in masks():
        log, ring = history(count)
        log.touch(300, 900, 9)
        first = log.begin_commit(GENERATION)
        ring.write(first, [0, 1, 2, 3, 4, 5, 6])
        log.abort_commit(first)
        log.touch(299, 299, 10)
        second = log.begin_commit(GENERATION)
        assert second.txn == first.txn
        ring.write(second, sectors)
        _, loaded = ring.load(expected_txn_min=count)
        assert not loaded.damaged, (sectors, loaded.reason)
        whole = len(sectors) == 8
        assert loaded.txn == (second.txn if whole else count)
        assert loaded.hot == (set(log.hot) if whole else {count} - {0})


def test_any_flipped_bit_makes_everything_dirty() -> None:
    """Rot in the log hides a region that was being written."""
    _, ring = history(70)
    sound = bytes(ring.data)
    for bit in range(0, RING_BYTES * 8, 4099):
        ring.data[bit // 8] ^= 1 << bit % 8
        assert ring.load()[1].damaged, bit
        ring.data[:] = sound
    assert not ring.load()[1].damaged


@pytest.mark.parametrize("count", [3, 70])
def test_any_lost_or_foreign_sector_makes_everything_dirty(count: int) -> None:
    """A write that went to the wrong place, or nowhere, is taken for a torn one."""
    _, ring = history(count)
    sound = bytes(ring.data)
    other = sound[4096 : 4096 + 512]
    for start in range(0, RING_BYTES, 512):
        for foreign in (bytes(512), other, resealed(b"\0" * 508 + b"....")):
            ring.data[start : start + 512] = foreign
            damaged = ring.load(expected_txn_min=count)[1].damaged
            assert damaged == (sound[start : start + 512] != foreign), start
            ring.data[:] = sound


def test_a_block_that_fell_behind_makes_everything_dirty() -> None:
    """A disk that loses writes is trusted with the rest of them."""
    _, old = history(80)
    _, ring = history(144)
    block = 100 % 64 * 4096
    ring.data[block : block + 4096] = old.data[block : block + 4096]
    _, loaded = ring.load()
    assert loaded.damaged
    assert loaded.hot == frozenset()
    assert loaded.txn == 144


def test_a_ring_that_was_rolled_back_makes_everything_dirty() -> None:
    """A restored snapshot of the metadata hides what was written since."""
    _, ring = history(70)
    log, loaded = ring.load(expected_txn_min=71)
    assert loaded.damaged
    assert "rolled back" in loaded.reason
    assert (loaded.txn, log.txn) == (70, 70)
    assert log.begin_commit(GENERATION).txn == 72


def test_zeros_are_fresh_only_where_nothing_was_logged() -> None:
    """A log zeroed by mistake counts as one that was never needed."""
    assert not Ring().load()[1].damaged
    assert Ring().load(expected_txn_min=1)[1].damaged


def test_a_log_of_another_line_makes_everything_dirty() -> None:
    """The log of an older generation, or of another device, is believed."""
    _, ring = history(5)
    assert ring.load(known=frozenset({b"h" * 16}))[1].damaged
    log = IntentLog(GEOMETRY, b"y" * 16)
    loaded = log.load(bytes(ring.data), KNOWN)
    assert loaded.damaged
    assert "belongs to map" in loaded.reason


@pytest.mark.parametrize("length", [0, 4096, RING_BYTES - 1, RING_BYTES + 1])
def test_a_ring_of_another_size_makes_everything_dirty(length: int) -> None:
    """A file cut short ends the start with a traceback, or reads as an empty log."""
    log = IntentLog(GEOMETRY, MAP_ID)
    loaded = log.load(bytes(length), KNOWN)
    assert (loaded.damaged, loaded.txn) == (True, 0)


def forged(regions: list[int], txn: int = 1, count: int | None = None, crc_flip: int = 0) -> Ring:
    """A ring whose checksums all fit, around a snapshot that we would never write."""
    contents = []
    for index in ALL_SECTORS:
        part = regions if index == 0 else []
        contents.append(
            {
                "magic": 0x4E424C47,
                "version": 1,
                "sector_index": index,
                "pad0": 0,
                "txn": txn,
                "peer_txn": 0,
                "map_id": MAP_ID,
                "generation": GENERATION,
                "count": len(part) if count is None else count,
                "pad1": 0,
                "snapshot_crc": 0,
                "regions": part + [0] * (REGIONS_PER_SECTOR - len(part)),
                "crc": 0,
            }
        )
    raw = [SECTOR.build(content) for content in contents]
    crc = crc32c(b"".join(crc32c(s[:60] + s[64:508]).to_bytes(4, "big") for s in raw)) ^ crc_flip
    block = b"".join(resealed(s[:60] + crc.to_bytes(4, "big") + s[64:]) for s in raw)
    ring = Ring()
    ring.write(Commit(1, txn, LOG_OFFSET_BYTES + txn % 64 * 4096, block, 0))
    return ring


def test_the_forger_can_forge() -> None:
    """The tests below refuse their blocks for the wrong reason."""
    assert forged([1, 2]).load()[1].hot == {1, 2}


def test_a_snapshot_is_complete_only_if_its_checksum_fits() -> None:
    """Sectors that agree about their number but not about their content make a snapshot."""
    loaded = forged([1, 2], crc_flip=1).load()[1]
    assert (loaded.damaged, loaded.txn, loaded.hot) == (False, 0, frozenset())


def test_swapped_sectors_make_everything_dirty() -> None:
    """Sectors in the wrong places are taken for a torn block, and the snapshot before is used."""
    _, ring = history(3)
    start = 3 * 4096
    first, second = ring.data[start : start + 512], ring.data[start + 512 : start + 1024]
    ring.data[start : start + 1024] = second + first
    assert ring.load()[1].damaged


@pytest.mark.parametrize(
    ("ring", "named"),
    [
        (forged([1, GEOMETRY.region_count]), "outside the device"),
        (forged([2, 1]), "not in order"),
        (forged([1, 1]), "not in order"),
        (forged([1], count=112), "112 regions"),
        (forged([1], txn=TXN_MAX + 1), "regions in transaction"),
        (forged([1], txn=TXN_MAX), "block 0 holds"),
        (forged([1], txn=2), "does not hold"),
    ],
)
def test_hostile_snapshots_with_good_checksums(ring: Ring, named: str) -> None:
    """A forged log crashes the start, or names a region that does not exist."""
    log, loaded = ring.load()
    assert loaded.damaged
    assert named in loaded.reason
    log.begin_commit(GENERATION)


# --- after damage ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 3, 63, 64, 150])
def test_a_rebuilt_ring_is_sound_and_ahead(count: int) -> None:
    """After one bad sector every start is a full resync, or a number told to the peer goes back."""
    _, ring = history(count)
    ring.data[10 * 4096 + 100] ^= 1
    log, loaded = ring.load(expected_txn_min=count)
    assert loaded.damaged
    commits = log.begin_rebuild(GENERATION)
    assert len({commit.offset for commit in commits}) == 64
    for commit in commits:
        ring.write(commit)
    log.end_commit(commits[-1])
    reopened, loaded = ring.load(expected_txn_min=log.txn)
    assert (loaded.damaged, loaded.hot) == (False, frozenset())
    assert reopened.txn == log.txn == commits[-1].txn > count
    reopened.touch(4, 4, 1)
    committed(reopened, ring)
    assert ring.load()[1].hot == {4}
