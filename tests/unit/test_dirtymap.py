"""The dirty map: its bits, its pages, and what it takes from disk and peer."""

from collections.abc import Callable

import pytest

from nbdmirror.core.checks import crc32c
from nbdmirror.core.dirtymap import PAGE, DirtyMap
from nbdmirror.core.geometry import EXTENTS_PER_PAGE, Geometry
from nbdmirror.errors import MetadataError, PeerProtocolError
from nbdmirror.limits import GIB, KIB, MAP_OFFSET_BYTES, MIB

GENERATION = b"g" * 16
MAP_ID = b"x" * 16
# 3 pages, the last one partial; region 31 lies across pages 0 and 1; the last extent is partial.
GEOMETRY = Geometry(300 * MIB + 512, 4 * KIB, 4 * MIB)
LAST = GEOMETRY.extent_count - 1


def new_map() -> DirtyMap:
    return DirtyMap(GEOMETRY, MAP_ID)


def saved_map() -> DirtyMap:
    """As after creation: every page is on disk."""
    dirty = new_map()
    for index in range(GEOMETRY.page_count):
        save(dirty, index)
    return dirty


def save(dirty: DirtyMap, index: int) -> bytes:
    write = dirty.begin_page(index, GENERATION)
    dirty.end_page(write)
    return write.block


def extents(dirty: DirtyMap) -> set[int]:
    """All dirty extents, by way of next_run."""
    found: set[int] = set()
    at = 0
    while (run := dirty.next_run(at, 1000)) is not None:
        found |= set(range(*run))
        at = run[1]
    return found


def bytes_of(extent: int) -> tuple[int, int]:
    return GEOMETRY.bytes_of_extents(extent, extent + 1)


def resealed(block: bytes) -> bytes:
    zeroed = block[:60] + bytes(4) + block[64:]
    return block[:60] + crc32c(zeroed).to_bytes(4, "big") + block[64:]


def patched(block: bytes, offset: int, data: bytes) -> bytes:
    return resealed(block[:offset] + data + block[offset + len(data) :])


# --- bits ------------------------------------------------------------------------------------


def test_one_byte_marks_its_extent() -> None:
    """A small write at the end of an extent is not copied back."""
    dirty = new_map()
    dirty.mark(4095, 4096)
    dirty.mark(8192, 8193)
    assert extents(dirty) == {0, 2}
    dirty.mark(4095, 4097)
    assert extents(dirty) == {0, 1, 2}
    assert dirty.count == 3


def test_the_last_byte_of_the_device_marks_the_last_extent() -> None:
    """The tail of a device that is no multiple of the extent is never copied."""
    dirty = new_map()
    dirty.mark(GEOMETRY.device_bytes - 1, GEOMETRY.device_bytes)
    assert extents(dirty) == {LAST}
    assert dirty.dirty_in(*bytes_of(LAST))
    assert dirty.next_run(LAST, 10) == (LAST, LAST + 1)
    assert dirty.next_run(LAST + 1, 10) is None


@pytest.mark.parametrize(
    "bad",
    [
        (-4096, -1),
        (-1, 4096),
        (10, 5),
        (0, GEOMETRY.device_bytes + 1),
        (GEOMETRY.device_bytes, GEOMETRY.device_bytes + 1),
    ],
)
def test_ranges_outside_the_device_are_our_own_mistake(bad: tuple[int, int]) -> None:
    """A stray bit beyond the device makes the page on disk bad at the next start."""
    dirty = new_map()
    with pytest.raises(AssertionError):
        dirty.mark(*bad)
    with pytest.raises(AssertionError):
        dirty.dirty_in(*bad)
    assert dirty.count == 0


def test_an_empty_range_marks_nothing() -> None:
    """A request of no bytes makes its neighbour dirty, or ends in a traceback."""
    dirty = new_map()
    dirty.mark(4096, 4096)
    dirty.mark(GEOMETRY.device_bytes, GEOMETRY.device_bytes)
    assert not dirty.any()
    dirty.clear(3, 3)


def test_runs_are_bounded_and_stop_at_clean_extents() -> None:
    """A resync copies what is clean, or asks for more than a frame holds."""
    dirty = new_map()
    dirty.mark(*GEOMETRY.bytes_of_extents(10, 20))
    dirty.mark(*GEOMETRY.bytes_of_extents(32250, 32260))
    assert dirty.next_run(0, 4) == (10, 14)
    assert dirty.next_run(14, 100) == (14, 20)
    assert dirty.next_run(15, 5) == (15, 20)
    assert dirty.next_run(20, 100) == (32250, 32260)
    assert dirty.next_run(32260, 100) is None


def test_the_whole_device_is_every_extent_once() -> None:
    """A full sync stops before the end, or counts more than there is."""
    dirty = new_map()
    dirty.mark_region(GEOMETRY.region_count - 1)
    assert dirty.count == LAST + 1 - 75 * 1024
    dirty.mark_all()
    assert dirty.count == GEOMETRY.extent_count
    assert extents(dirty) == set(range(GEOMETRY.extent_count))
    dirty.clear(0, GEOMETRY.extent_count)
    assert not dirty.any()


# --- suspicion -------------------------------------------------------------------------------


def test_a_suspicion_ends_with_the_last_dirty_extent_of_its_region() -> None:
    """Known writes are compared for ever, or unsure ones are sent without comparing."""
    dirty = new_map()
    dirty.mark_region(2, suspect=True)
    dirty.mark_region(3)
    first = GEOMETRY.extents_of_region(2).start
    assert dirty.is_suspect(first)
    assert dirty.is_suspect(first + 1023)
    assert not dirty.is_suspect(first - 1)
    assert not dirty.is_suspect(first + 1024)
    dirty.clear(first, first + 1023)
    assert dirty.is_suspect(first)
    dirty.clear(first + 1023, first + 1030)
    assert not dirty.is_suspect(first)
    dirty.mark_all(suspect=True)
    assert dirty.is_suspect(0)
    assert dirty.is_suspect(LAST)


# --- pages -----------------------------------------------------------------------------------


def test_pages_follow_the_schema_of_record() -> None:
    """Writer and documentation describe two formats; the next version reads neither."""
    dirty = new_map()
    dirty.mark(*bytes_of(EXTENTS_PER_PAGE + 1))
    dirty.mark(*bytes_of(EXTENTS_PER_PAGE + 15))
    write = dirty.begin_page(1, GENERATION)
    assert write.offset == MAP_OFFSET_BYTES + 4096
    page = PAGE.parse(write.block)
    assert (page.magic, page.version, page.index, page.sequence) == (0x4E424D50, 1, 1, 1)
    assert (page.map_id, page.generation) == (MAP_ID, GENERATION)
    assert page.bits == b"\x40\x01" + bytes(4030) == dirty.page_bits(1)
    assert page.crc == crc32c(write.block[:60] + bytes(4) + write.block[64:])
    assert PAGE.build(page) == write.block


def test_a_new_map_is_not_on_disk_yet() -> None:
    """Creation leaves pages unwritten, and the first start finds them bad."""
    assert new_map().stale_pages() == [0, 1, 2]
    assert saved_map().stale_pages() == []


def test_a_set_bit_is_unsaved_until_its_page_is_durable() -> None:
    """A region leaves the log although the disk lacks its dirty extents."""
    dirty = saved_map()
    dirty.mark(*bytes_of(5))
    assert dirty.unsaved_pages() == dirty.stale_pages() == [0]
    write = dirty.begin_page(0, GENERATION)
    assert dirty.unsaved_pages() == [0]
    dirty.end_page(write)
    assert dirty.unsaved_pages() == []
    dirty.mark(*bytes_of(5))
    assert dirty.unsaved_pages() == []


@pytest.mark.parametrize(
    "again",
    [
        lambda dirty: dirty.mark(*bytes_of(6)),
        lambda dirty: dirty.mark(*GEOMETRY.bytes_of_extents(3, 9)),
        lambda dirty: dirty.mark_region(0),
        lambda dirty: dirty.mark_all(),
        lambda dirty: dirty.merge_page(0, b"\xff" + bytes(4031)),
    ],
)
def test_a_bit_set_while_its_page_is_written_keeps_it_unsaved(
    again: Callable[[DirtyMap], None],
) -> None:
    """The newest write is in memory only, and counts as saved."""
    dirty = saved_map()
    dirty.mark(*bytes_of(5))
    write = dirty.begin_page(0, GENERATION)
    again(dirty)
    dirty.end_page(write)
    assert 0 in dirty.unsaved_pages()
    save(dirty, 0)
    assert 0 not in dirty.unsaved_pages()


def test_clearing_is_stale_not_unsaved() -> None:
    """Every cleared extent costs a write before an eviction, or is never written back at all."""
    dirty = saved_map()
    dirty.mark(*bytes_of(5))
    save(dirty, 0)
    dirty.clear(5, 6)
    assert dirty.unsaved_pages() == []
    assert dirty.stale_pages() == [0]
    dirty.clear(5, 6)
    dirty.clear(40000, 40001)
    assert dirty.stale_pages() == [0]
    write = dirty.begin_page(0, GENERATION)
    dirty.mark(*bytes_of(7))
    dirty.clear(7, 8)
    dirty.end_page(write)
    assert dirty.stale_pages() == [0]
    save(dirty, 0)
    assert dirty.stale_pages() == []


def test_set_again_after_clearing_is_unsaved() -> None:
    """The page without the bit is on its way, and the bit counts as saved."""
    dirty = saved_map()
    dirty.mark(*bytes_of(5))
    save(dirty, 0)
    dirty.clear(5, 6)
    write = dirty.begin_page(0, GENERATION)
    dirty.mark(*bytes_of(5))
    dirty.end_page(write)
    assert dirty.unsaved_pages() == [0]


def test_a_failed_page_write_leaves_the_page_unsaved() -> None:
    """A page that may be torn on disk counts as what it was before."""
    dirty = saved_map()
    dirty.clear(0, 5)
    dirty.abort_page(dirty.begin_page(1, GENERATION))
    assert dirty.unsaved_pages() == [1]
    save(dirty, 1)
    assert dirty.unsaved_pages() == []


def test_overlapping_writes_of_one_page_save_nothing() -> None:
    """The older of two writes reaches the disk last and takes a bit away that counts as saved."""
    dirty = saved_map()
    older = dirty.begin_page(0, GENERATION)
    dirty.mark(*bytes_of(5))
    newer = dirty.begin_page(0, GENERATION)
    dirty.end_page(newer)
    assert dirty.unsaved_pages() == [0]
    dirty.end_page(older)
    assert dirty.unsaved_pages() == [0]
    save(dirty, 0)
    assert dirty.unsaved_pages() == []


def test_overlapping_writes_count_even_if_nothing_was_set_between() -> None:
    """The older write lands last, brings back a cleared extent, and nothing writes it again."""
    dirty = saved_map()
    dirty.mark(*bytes_of(5))
    save(dirty, 0)
    with_bit = dirty.begin_page(0, GENERATION)
    dirty.clear(5, 6)
    without = dirty.begin_page(0, GENERATION)
    dirty.end_page(without)
    dirty.end_page(with_bit)
    assert dirty.unsaved_pages() == []
    assert dirty.stale_pages() == [0]


def test_a_region_across_two_pages_needs_both() -> None:
    """Half of an evicted region is lost with the second page."""
    dirty = saved_map()
    dirty.mark_region(31)
    assert dirty.unsaved_pages_of_region(31) == [0, 1]
    save(dirty, 0)
    assert dirty.unsaved_pages_of_region(31) == [1]
    assert dirty.unsaved_pages_of_region(0) == []


def test_page_sequence_goes_on_after_a_restart() -> None:
    """Two versions of one page cannot be told apart by whoever examines a file."""
    dirty = saved_map()
    reopened = new_map()
    assert reopened.load([save(dirty, n) for n in range(3)]) == []
    assert PAGE.parse(save(reopened, 0)).sequence == 7


# --- pages from disk -------------------------------------------------------------------------


def sample_pages() -> tuple[DirtyMap, list[bytes]]:
    dirty = new_map()
    for first, last in ((0, 3), (32000, 33000), (LAST, LAST + 1)):
        dirty.mark(*GEOMETRY.bytes_of_extents(first, last))
    return dirty, [save(dirty, n) for n in range(3)]


def test_what_was_saved_is_loaded() -> None:
    """Dirty extents are forgotten by a restart."""
    dirty, pages = sample_pages()
    reopened = new_map()
    assert reopened.load(iter(pages)) == []
    assert extents(reopened) == extents(dirty)
    assert reopened.count == dirty.count
    assert reopened.stale_pages() == []
    assert [reopened.page_any(n) for n in range(3)] == [True, True, True]


def assert_page_is_suspect(dirty: DirtyMap, index: int) -> None:
    whole = GEOMETRY.extents_of_page(index)
    assert extents(dirty) == set(whole)
    assert dirty.is_suspect(whole.start)
    assert dirty.is_suspect(whole.stop - 1)
    assert index in dirty.unsaved_pages()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_page_never_written_is_bad(index: int) -> None:
    """A page of zeros, the commonest damage of all, reads as clean."""
    dirty = new_map()
    assert not dirty.load_page(index, bytes(4096))
    assert_page_is_suspect(dirty, index)


@pytest.mark.parametrize("block", [b"", bytes(4095), bytes(4097), b"\xff" * 4096])
def test_a_block_that_is_no_page_is_bad(block: bytes) -> None:
    """A file cut short ends the start with a traceback, or reads as clean."""
    dirty = new_map()
    assert not dirty.load_page(1, block)
    assert_page_is_suspect(dirty, 1)


def test_no_flipped_bit_is_accepted() -> None:
    """Rot clears a dirty extent."""
    dirty, pages = sample_pages()
    for bit in range(0, 4096 * 8, 7):
        rotten = bytearray(pages[1])
        rotten[bit // 8] ^= 1 << bit % 8
        assert not dirty.load_page(1, bytes(rotten)), bit


def test_no_torn_page_is_accepted() -> None:
    """A power cut in a page write leaves half of the bits."""
    dirty, pages = sample_pages()
    dirty.mark(*bytes_of(3))
    newer = dirty.begin_page(0, GENERATION).block
    for cut in range(0, 4097, 16):
        torn = newer[:cut] + pages[0][cut:]
        assert new_map().load_page(0, torn) == (torn in (newer, pages[0])), cut


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (0, b"NBLG"),
        (4, b"\0\2"),
        (6, b"\0\1"),
        (8, b"\0\0\0\1"),
        (12, b"\1"),
        (16, b"\x80"),
        (24, b"y"),
        (56, b"\1"),
    ],
)
def test_hostile_headers_with_good_checksums_are_bad(offset: int, data: bytes) -> None:
    """A page of another map, place or version is taken for this one."""
    _, pages = sample_pages()
    dirty = new_map()
    assert not dirty.load_page(2, patched(pages[2], offset, data))
    assert_page_is_suspect(dirty, 2)


def test_bits_beyond_the_device_make_a_page_bad() -> None:
    """The resync copies an extent that does not exist."""
    _, pages = sample_pages()
    end = GEOMETRY.extent_count - 2 * EXTENTS_PER_PAGE
    for stray in (end, end + 1, EXTENTS_PER_PAGE - 1):
        byte = 64 + stray // 8
        data = bytes([pages[2][byte] | 0x80 >> stray % 8])
        dirty = new_map()
        assert not dirty.load_page(2, patched(pages[2], byte, data))
        assert dirty.count == end


def test_loading_never_clears() -> None:
    """A mark made before a page was read is lost to an older page."""
    _, pages = sample_pages()
    dirty = saved_map()
    dirty.mark(*bytes_of(100))
    assert dirty.load_page(0, pages[0])
    assert 100 in extents(dirty)
    assert dirty.unsaved_pages() == [0]


def test_missing_pages_are_bad_and_too_many_are_refused() -> None:
    """A file of another device's size is taken for this one."""
    _, pages = sample_pages()
    dirty = new_map()
    assert dirty.load(pages[:1]) == [1, 2]
    assert dirty.count == GEOMETRY.extent_count - EXTENTS_PER_PAGE + 259
    with pytest.raises(MetadataError, match="more than 3 pages"):
        new_map().load([*pages, pages[2]])


# --- pages from the peer ---------------------------------------------------------------------


def test_merging_is_the_union() -> None:
    """Rule 13: an extent that only one side knows to differ is not copied."""
    dirty, _ = sample_pages()
    other = new_map()
    other.mark(*GEOMETRY.bytes_of_extents(2, 6))
    other.merge_page(0, dirty.page_bits(0))
    assert extents(other) == {*range(6), *range(32000, 32256)}
    assert other.count == 262
    assert other.unsaved_pages() == [0]


def test_what_only_the_peer_calls_dirty_is_suspect() -> None:
    """The regions that were hot at a peer's crash are copied whole instead of compared."""
    crashed = new_map()
    crashed.mark_region(3, suspect=True)
    crashed.mark_region(31, suspect=True)
    source = new_map()
    source.mark(*GEOMETRY.bytes_of_extents(0, 6))
    for index in range(GEOMETRY.page_count):
        source.merge_page(index, crashed.page_bits(index))
    suspects = [region for region in range(GEOMETRY.region_count) if source.suspect[region]]
    assert suspects == [3, 31]


def test_what_both_call_dirty_stays_a_known_write() -> None:
    """Extents that the source wrote alone are compared over the network before they are sent."""
    source = new_map()
    source.mark(*GEOMETRY.bytes_of_extents(0, 6))
    source.merge_page(0, source.page_bits(0))
    assert not source.is_suspect(0)


def test_merging_nothing_new_saves_a_write() -> None:
    """Every contact of the two nodes writes the whole map."""
    dirty, _ = sample_pages()
    dirty.merge_page(0, dirty.page_bits(0))
    dirty.merge_page(2, bytes(4032))
    assert dirty.unsaved_pages() == []


@pytest.mark.parametrize(
    ("index", "bits", "named"),
    [
        (3, bytes(4032), "map page 3 of 3"),
        (-1, bytes(4032), "map page -1"),
        (0, bytes(4031), "4031 bytes"),
        (0, bytes(4033), "4033 bytes"),
        (2, b"\xff" * 4032, "beyond the device"),
    ],
)
def test_a_peers_impossible_page_is_refused(index: int, bits: bytes, named: str) -> None:
    """A peer of another size, or a hostile one, writes into this node's map."""
    dirty = new_map()
    with pytest.raises(PeerProtocolError, match=named):
        dirty.merge_page(index, bits)
    assert not dirty.any()


def test_geometry_of_these_tests() -> None:
    """The edge cases above are not the ones they claim to be."""
    assert GEOMETRY.page_count == 3
    assert list(GEOMETRY.pages_of_region(31)) == [0, 1]
    assert GEOMETRY.device_bytes % GEOMETRY.extent_bytes == 512
    assert Geometry(GIB, 4 * KIB, 4 * MIB).page_count == 9
