"""The arithmetic of one device: bytes, extents, regions and map pages.

Owns: every conversion between a byte range and the units of the dirty map (extent, page) and of the
intent log (region). Must never: know what is dirty or hot. Byte ranges are [offset, end), index
ranges are Python ranges; both are half open. The last extent, region and page may be partial.
"""

from dataclasses import dataclass, field
from typing import Final

from nbdmirror.errors import MetadataError
from nbdmirror.limits import (
    DEVICE_BYTES_MAX,
    DEVICE_BYTES_MIN,
    EXTENT_BYTES_MAX,
    EXTENT_BYTES_MIN,
    MAP_OFFSET_BYTES,
    MAP_PAGE_PAYLOAD_BYTES,
    META_BLOCK_BYTES,
    REGION_BYTES_MAX,
    REGION_BYTES_MIN,
)

SECTOR_BYTES: Final = 512
EXTENTS_PER_PAGE: Final = MAP_PAGE_PAYLOAD_BYTES * 8


def _require_power_of_two(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high or value & (value - 1):
        raise MetadataError(f"{name} is {value}; use a power of two from {low} to {high}")


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a device and of its units, in bytes; the counts follow from them.

    Raises MetadataError when a size is not one that the format can describe.
    """

    device_bytes: int
    extent_bytes: int
    region_bytes: int
    extent_count: int = field(init=False)
    region_count: int = field(init=False)
    page_count: int = field(init=False)
    extent_shift: int = field(init=False)
    region_shift: int = field(init=False)

    def __post_init__(self) -> None:
        if not DEVICE_BYTES_MIN <= self.device_bytes <= DEVICE_BYTES_MAX:
            raise MetadataError(
                f"device_bytes is {self.device_bytes}; "
                f"use a size from {DEVICE_BYTES_MIN} to {DEVICE_BYTES_MAX}"
            )
        if self.device_bytes % SECTOR_BYTES:
            raise MetadataError(
                f"device_bytes is {self.device_bytes}; use a multiple of {SECTOR_BYTES}"
            )
        _require_power_of_two("extent_bytes", self.extent_bytes, EXTENT_BYTES_MIN, EXTENT_BYTES_MAX)
        _require_power_of_two("region_bytes", self.region_bytes, REGION_BYTES_MIN, REGION_BYTES_MAX)
        extent_count = -(-self.device_bytes // self.extent_bytes)
        derive = object.__setattr__
        derive(self, "extent_count", extent_count)
        derive(self, "region_count", -(-self.device_bytes // self.region_bytes))
        derive(self, "page_count", -(-extent_count // EXTENTS_PER_PAGE))
        derive(self, "extent_shift", self.extent_bytes.bit_length() - 1)
        derive(self, "region_shift", self.region_bytes.bit_length() - 1)

    @property
    def metadata_bytes(self) -> int:
        """Size of the whole metadata file: superblocks, intent log and every map page."""
        return MAP_OFFSET_BYTES + self.page_count * META_BLOCK_BYTES

    @property
    def extents_per_region(self) -> int:
        """Extents in a full region; a power of two."""
        return self.region_bytes // self.extent_bytes

    def extents(self, offset: int, end: int) -> range:
        """Indexes of the extents that bytes [offset, end) touch, even in part."""
        assert 0 <= offset <= end <= self.device_bytes, (offset, end)
        if offset == end:
            return range(0)
        return range(offset >> self.extent_shift, ((end - 1) >> self.extent_shift) + 1)

    def regions(self, offset: int, end: int) -> range:
        """Indexes of the regions that bytes [offset, end) touch, even in part."""
        assert 0 <= offset <= end <= self.device_bytes, (offset, end)
        if offset == end:
            return range(0)
        return range(offset >> self.region_shift, ((end - 1) >> self.region_shift) + 1)

    def extents_of_region(self, region: int) -> range:
        """Extents of one region; fewer in the last one."""
        assert 0 <= region < self.region_count, region
        first = region * self.extents_per_region
        return range(first, min(first + self.extents_per_region, self.extent_count))

    def pages_of_region(self, region: int) -> range:
        """Map pages that hold the bits of one region. Pages and regions do not line up."""
        extents = self.extents_of_region(region)
        return range(extents.start // EXTENTS_PER_PAGE, (extents.stop - 1) // EXTENTS_PER_PAGE + 1)

    def extents_of_page(self, page: int) -> range:
        """Extents whose bits one map page holds; fewer in the last one."""
        assert 0 <= page < self.page_count, page
        first = page * EXTENTS_PER_PAGE
        return range(first, min(first + EXTENTS_PER_PAGE, self.extent_count))

    def bytes_of_extents(self, first: int, last_exclusive: int) -> tuple[int, int]:
        """Byte range (offset, end) of extents [first, last_exclusive), clipped to the device."""
        assert 0 <= first <= last_exclusive <= self.extent_count, (first, last_exclusive)
        offset = first << self.extent_shift
        end = last_exclusive << self.extent_shift
        return min(offset, self.device_bytes), min(end, self.device_bytes)
