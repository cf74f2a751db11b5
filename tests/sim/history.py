"""What the clients were told: every write, and which values a sector may hold because of it.

Owns the per-sector window check. A write that was acknowledged makes every write that had *ended*
before it was issued unacceptable in its sectors; a write of unknown outcome stays possible until
such a write follows. A sector of 512 bytes carries the id of its write and its own number all
over, so that a torn, misplaced or stale sector shows.
"""

import struct

from tests.sim.disk import BLOCK_BYTES, SECTOR_BYTES, Blocks
from tests.sim.world import ViolationError

_TAG = struct.Struct(">QQ")
_REPEAT = SECTOR_BYTES // _TAG.size
_ZERO_SECTOR = bytes(SECTOR_BYTES)
SECTORS_PER_BLOCK = BLOCK_BYTES // SECTOR_BYTES

VALUES_COUNT_MAX = 20_000
_NOTHING = (0,) * SECTORS_PER_BLOCK

Bound = dict[int, int]


class Record:
    """One write of a client. Times are counts of events; `ended` is None while it is under way."""

    __slots__ = ("acked", "ended", "first", "issued", "last", "number", "powers", "zero")

    def __init__(
        self, number: int, sectors: range, *, zero: bool, issued: int, powers: tuple[int, int]
    ) -> None:
        self.number = number
        self.first, self.last = sectors.start, sectors.stop
        self.zero = zero
        self.issued = issued
        self.ended: int | None = None
        self.acked: int | None = None
        self.powers = powers

    @property
    def sectors(self) -> range:
        """The sectors it covers."""
        return range(self.first, self.last)


def payload(number: int, sectors: range) -> bytearray:
    """The bytes of write `number`."""
    return bytearray(b"".join(_TAG.pack(number, sector) * _REPEAT for sector in sectors))


class History:
    """All writes, and what follows from their outcomes."""

    def __init__(self) -> None:
        self.records: dict[int, Record] = {}
        # Per sector: zeroing writes under way, and when the last one ended.
        self._zeros_open: dict[int, int] = {}
        self._zeros_ended: dict[int, int] = {}
        # Per sector: the time of issue of the newest write that must not be lost.
        self.bound: Bound = {}
        # The same for what was promised to be durable, per node.
        self.flushed: tuple[Bound, Bound] = ({}, {})
        self.unflushed: tuple[list[Record], list[Record]] = ([], [])
        self._count = 0
        self._values: dict[tuple[int, bytes], tuple[int, ...]] = {}

    def issue(self, sectors: range, *, zero: bool, now: int, powers: tuple[int, int]) -> Record:
        """A client sends a write."""
        self._count += 1
        record = Record(self._count, sectors, zero=zero, issued=now, powers=powers)
        self.records[record.number] = record
        if zero:
            for sector in sectors:
                self._zeros_open[sector] = self._zeros_open.get(sector, 0) + 1
        return record

    def end(self, record: Record, now: int) -> None:
        """A write has ended, somehow."""
        record.ended = now
        if record.zero:
            for sector in record.sectors:
                self._zeros_open[sector] -= 1
                self._zeros_ended[sector] = now

    def demand(self, record: Record) -> None:
        """From now on it, or something not older, must be there."""
        bound, issued = self.bound, record.issued
        for sector in record.sectors:
            if bound.get(sector, -1) < issued:
                bound[sector] = issued

    def demanded(self, sectors: range) -> list[int]:
        """For each sector the time of issue of what must not be lost, -1 if there is nothing."""
        return [self.bound.get(sector, -1) for sector in sectors]

    def promise_durable(self, record: Record, node: int) -> None:
        """A flush or FUA that covers it was acknowledged for `node`."""
        flushed, issued = self.flushed[node], record.issued
        for sector in record.sectors:
            if flushed.get(sector, -1) < issued:
                flushed[sector] = issued

    # --- images ---------------------------------------------------------------------------------

    def value(self, blocks: Blocks, sector: int) -> int:
        """The number of the write a sector holds, 0 for zeros.

        Raises ViolationError when it holds what no client wrote there.
        """
        index, place = divmod(sector, SECTORS_PER_BLOCK)
        return self._block_values(blocks, index)[place]

    def _block_values(self, blocks: Blocks, index: int) -> tuple[int, ...]:
        """The same for the eight sectors of one block; what was read once is remembered."""
        block = blocks.get(index)
        if block is None:
            return _NOTHING
        values = self._values.get((index, block))
        if values is None:
            if len(self._values) > VALUES_COUNT_MAX:
                self._values.clear()
            first = index * SECTORS_PER_BLOCK
            values = self._values[index, block] = tuple(
                self.value_of(block[at * SECTOR_BYTES : (at + 1) * SECTOR_BYTES], first + at)
                for at in range(SECTORS_PER_BLOCK)
            )
        return values

    def value_of(self, data: bytes, sector: int) -> int:
        """The same for the bytes of one sector."""
        if data == _ZERO_SECTOR:
            return 0
        number, lba = _TAG.unpack_from(data)
        record = self.records.get(number)
        if (
            lba != sector
            or record is None
            or not record.first <= sector < record.last
            or data != _TAG.pack(number, sector) * _REPEAT
        ):
            raise ViolationError(f"A7 provenance: sector {sector} holds {data[:32].hex()}...")
        return int(number)

    def is_stale(self, number: int, sector: int, bound: int) -> bool:
        """Whether a value is older than a write that must not be lost."""
        if number:
            ended = self.records[number].ended
            return ended is not None and ended < bound
        return not self._zeros_open.get(sector) and self._zeros_ended.get(sector, -1) < bound

    def stale_sector(self, blocks: Blocks, record: Record) -> int | None:
        """The first sector of `record` where an image holds something older than it, if any."""
        last_index, values = -1, _NOTHING
        number, issued = record.number, record.issued
        for sector in range(record.first, record.last):
            index = sector // SECTORS_PER_BLOCK
            if index != last_index:
                last_index, values = index, self._block_values(blocks, index)
            found = values[sector % SECTORS_PER_BLOCK]
            if found != number and self.is_stale(found, sector, issued):
                return sector
        return None

    def missing(self, blocks: Blocks, bound: Bound) -> list[tuple[int, int]]:
        """(sector, value) of what an image lacks."""
        lacking: list[tuple[int, int]] = []
        last_index, values = -1, _NOTHING
        records = self.records
        for sector, wanted in bound.items():
            index = sector // SECTORS_PER_BLOCK
            if index != last_index:
                last_index, values = index, self._block_values(blocks, index)
            number = values[sector % SECTORS_PER_BLOCK]
            if number:
                ended = records[number].ended
                if ended is not None and ended < wanted:
                    lacking.append((sector, number))
            elif self.is_stale(0, sector, wanted):
                lacking.append((sector, 0))
        return lacking

    def rebase(self, blocks: Blocks) -> None:
        """An operator declared this image the truth."""
        self.bound.clear()
        for number, record in self.records.items():
            for sector in record.sectors:
                if not record.zero and self.value(blocks, sector) == number:
                    self.bound[sector] = record.issued
        self.limit_flushed()

    def limit_flushed(self) -> None:
        """What is no longer demanded is not demanded durable either."""
        for node in (0, 1):
            flushed = self.flushed[node]
            for sector in list(flushed):
                limit = self.bound.get(sector, -1)
                if limit < 0:
                    del flushed[sector]
                else:
                    flushed[sector] = min(flushed[sector], limit)
            self.unflushed[node].clear()
