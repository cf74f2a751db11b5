"""The arithmetic of extents, regions and pages against counting one byte range at a time."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.core.geometry import EXTENTS_PER_PAGE, Geometry
from nbdmirror.errors import MetadataError
from nbdmirror.limits import DEVICE_BYTES_MAX, GIB, KIB, MIB, TIB


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    sectors = draw(st.integers(MIB // 512, 3 * GIB // 512))
    extent = draw(st.sampled_from([4 * KIB, 64 * KIB, MIB]))
    region = draw(st.sampled_from([MIB, 4 * MIB, 256 * MIB]))
    return Geometry(sectors * 512, extent, region)


@given(geometries(), st.data())
def test_ranges_cover_what_they_touch_and_no_more(geometry: Geometry, data: st.DataObject) -> None:
    """A write whose last byte reaches into the next extent is not marked there, and is lost."""
    offset = data.draw(st.integers(0, geometry.device_bytes - 1))
    end = data.draw(st.integers(offset + 1, geometry.device_bytes))
    for indexes, size, count in (
        (geometry.extents(offset, end), geometry.extent_bytes, geometry.extent_count),
        (geometry.regions(offset, end), geometry.region_bytes, geometry.region_count),
    ):
        assert indexes.start * size <= offset < (indexes.start + 1) * size
        assert (indexes.stop - 1) * size < end <= indexes.stop * size
        assert indexes.stop <= count
    extents = geometry.extents(offset, end)
    covered = geometry.bytes_of_extents(extents.start, extents.stop)
    assert covered[0] <= offset
    assert end <= covered[1] <= geometry.device_bytes


@given(geometries())
def test_regions_and_pages_tile_the_extents(geometry: Geometry) -> None:
    """An extent that belongs to no page or region is never saved or never logged."""
    for tiles in (
        [geometry.extents_of_region(r) for r in range(geometry.region_count)],
        [geometry.extents_of_page(p) for p in range(geometry.page_count)],
    ):
        assert tiles[0].start == 0
        assert tiles[-1].stop == geometry.extent_count
        assert all(a.stop == b.start for a, b in pairwise(tiles))
        assert all(len(tile) > 0 for tile in tiles)


@given(geometries(), st.data())
def test_pages_of_region_hold_all_its_extents(geometry: Geometry, data: st.DataObject) -> None:
    """A region across two pages is evicted with only one of them saved."""
    region = data.draw(st.integers(0, geometry.region_count - 1))
    extents = geometry.extents_of_region(region)
    pages = {extent // EXTENTS_PER_PAGE for extent in (extents[0], extents[-1])}
    assert set(geometry.pages_of_region(region)) == set(range(min(pages), max(pages) + 1))


def test_a_region_can_lie_across_two_pages() -> None:
    """The case above is real: pages hold 32256 extents, no power of two."""
    geometry = Geometry(GIB, 4 * KIB, 4 * MIB)
    assert EXTENTS_PER_PAGE == 32256
    assert list(geometry.pages_of_region(31)) == [0, 1]


def test_sizes_of_a_terabyte() -> None:
    """The file is allocated too small, and the last pages do not exist."""
    geometry = Geometry(TIB, 4 * KIB, 4 * MIB)
    assert (geometry.extent_count, geometry.region_count) == (2**28, 2**18)
    assert geometry.page_count == 8323
    assert geometry.metadata_bytes == MIB + 8323 * 4096


def test_empty_ranges_touch_nothing() -> None:
    """A request of no bytes at the end of the device names an extent that does not exist."""
    geometry = Geometry(MIB, 4 * KIB, MIB)
    assert len(geometry.extents(MIB, MIB)) == 0
    assert len(geometry.regions(4096, 4096)) == 0
    assert geometry.bytes_of_extents(256, 256) == (MIB, MIB)


def test_the_last_extent_is_clipped() -> None:
    """A copy of the last extent reads beyond the end of the backing file."""
    geometry = Geometry(MIB + 512, 64 * KIB, MIB)
    assert geometry.extent_count == 17
    assert geometry.bytes_of_extents(16, 17) == (MIB, MIB + 512)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ((MIB - 512, 4 * KIB, MIB), "device_bytes is 1048064"),
        ((DEVICE_BYTES_MAX + 512, 4 * KIB, MIB), "device_bytes"),
        ((MIB + 1, 4 * KIB, MIB), "multiple of 512"),
        ((GIB, 2 * KIB, MIB), "extent_bytes is 2048"),
        ((GIB, 12 * KIB, MIB), "power of two"),
        ((GIB, 2 * MIB, 4 * MIB), "extent_bytes"),
        ((GIB, 0, 4 * MIB), "extent_bytes is 0"),
        ((GIB, 4 * KIB, 512 * KIB), "region_bytes"),
        ((GIB, 4 * KIB, 3 * MIB), "region_bytes is 3145728"),
        ((GIB, 4 * KIB, GIB), "region_bytes"),
    ],
)
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int], named: str) -> None:
    """A damaged or hostile size is divided by, or memory is taken for it."""
    with pytest.raises(MetadataError, match=named):
        Geometry(*sizes)


@pytest.mark.parametrize("bad", [(-1, 0), (8, 4), (0, MIB + 1)])
def test_ranges_outside_the_device_are_our_own_mistake(bad: tuple[int, int]) -> None:
    """A range that was never checked reaches the map and marks an extent that does not exist."""
    geometry = Geometry(MIB, 4 * KIB, MIB)
    with pytest.raises(AssertionError):
        geometry.extents(*bad)
    with pytest.raises(AssertionError):
        geometry.regions(*bad)
