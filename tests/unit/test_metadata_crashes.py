"""Intent log and dirty map through random lives with power cuts.

A power cut keeps what was made durable and any part of what was on its way. Whatever remains must
name everything that the two copies may differ in.
"""

from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nbdmirror.core.dirtymap import DirtyMap, PageWrite
from nbdmirror.core.geometry import EXTENTS_PER_PAGE, Geometry
from nbdmirror.core.intentlog import HOT_REGIONS_MAX, Commit, IntentLog, empty_ring
from nbdmirror.limits import GIB, KIB, LOG_OFFSET_BYTES, MIB

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


class LogMachine(RuleBasedStateMachine):
    """Random life of a log with power cuts, against the promise it makes.

    `promised` are the regions for which a write was let through and which were not dropped since.
    """

    def __init__(self) -> None:
        super().__init__()
        self.geometry = Geometry(4 * GIB, 4 * KIB, MIB)
        self.log = IntentLog(self.geometry, MAP_ID)
        self.ring = Ring()
        self.seq = 0
        self.promised: set[int] = set()
        self.waiting: dict[int, int] = {}
        self.under_way: Commit | None = None

    @rule(first=st.integers(0, 4000), span=st.integers(1, 90))
    def write(self, first: int, span: int) -> None:
        self.seq += 1
        if not self.log.room_for(first, first + span - 1):
            return
        needed = self.log.touch(first, first + span - 1, self.seq)
        for region in range(first, first + span):
            if needed:
                self.waiting[region] = needed
            else:
                self.promised.add(region)

    @precondition(lambda self: self.under_way is None)
    @rule()
    def begin(self) -> None:
        self.under_way = self.log.begin_commit(GENERATION)

    @precondition(lambda self: self.under_way is not None)
    @rule(sectors=st.sets(st.integers(0, 7)))
    def fail(self, sectors: set[int]) -> None:
        assert self.under_way is not None
        self.ring.write(self.under_way, sectors)
        self.log.abort_commit(self.under_way)
        self.under_way = None

    @precondition(lambda self: self.under_way is not None)
    @rule()
    def end(self) -> None:
        assert self.under_way is not None
        self.ring.write(self.under_way)
        self.log.end_commit(self.under_way)
        self.under_way = None
        for region, needed in list(self.waiting.items()):
            if needed <= self.log.durable:
                del self.waiting[region]
                self.promised.add(region)

    @rule(count=st.integers(0, 500))
    def evict(self, count: int) -> None:
        gone = self.log.evictable(self.seq - 2, lambda r: r in self.waiting, count)
        self.log.drop(gone)
        self.promised -= set(gone)

    @rule(sectors=st.sets(st.integers(0, 7)))
    def power_cut(self, sectors: set[int]) -> None:
        if self.under_way is not None:
            self.ring.write(self.under_way, sectors)
        told = self.log.txn
        self.log = IntentLog(self.geometry, MAP_ID)
        loaded = self.log.load(bytes(self.ring.data), KNOWN, told)
        assert not loaded.damaged, loaded.reason
        assert loaded.hot >= self.promised
        self.promised.clear()
        self.waiting.clear()
        self.under_way = None

    @invariant()
    def promised_regions_are_hot(self) -> None:
        assert self.promised <= set(self.log.hot)


def test_every_written_region_is_found_after_a_power_cut() -> None:
    """A write that was let through is in no log, and the copies differ without anybody knowing."""
    LogMachine.TestCase.settings = settings(stateful_step_count=60)
    LogMachine.TestCase("runTest").runTest()


# 3 pages, the last one partial; region 31 lies across pages 0 and 1; the last extent is partial.
GEOMETRY = Geometry(300 * MIB + 512, 4 * KIB, 4 * MIB)
LAST = GEOMETRY.extent_count - 1
EXTENTS = st.one_of(
    st.integers(0, LAST), st.integers(EXTENTS_PER_PAGE - 3, EXTENTS_PER_PAGE + 3), st.just(LAST)
)


def new_map() -> DirtyMap:
    return DirtyMap(GEOMETRY, MAP_ID)


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


class Disk:
    """Metadata of which a power cut keeps what was ended, and any part of what was under way."""

    def __init__(self, dirty: DirtyMap) -> None:
        self.ring = Ring()
        self.pages = [save(dirty, n) for n in range(GEOMETRY.page_count)]
        self.under_way: list[PageWrite] = []

    def commit(self, log: IntentLog) -> None:
        commit = log.begin_commit(GENERATION)
        self.ring.write(commit)
        log.end_commit(commit)


class MapMachine(RuleBasedStateMachine):
    """A node that writes alone, evicts, saves, resyncs and loses power.

    `lacking` is what the peer really lacks. The promise: memory names all of it, and so does what
    a power cut leaves, the saved pages and the regions hot in the log.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dirty = new_map()
        self.disk = Disk(self.dirty)
        self.log = IntentLog(GEOMETRY, MAP_ID)
        self.seq = 0
        self.model: set[int] = set()
        self.lacking: set[int] = set()

    @rule(first=EXTENTS, count=st.integers(1, 2000))
    def write_alone(self, first: int, count: int) -> None:
        offset, end = GEOMETRY.bytes_of_extents(first, min(first + count, LAST + 1))
        regions = GEOMETRY.regions(offset, end)
        assert len(self.log.hot) < HOT_REGIONS_MAX - len(regions)
        self.seq += 1
        if self.log.touch(regions.start, regions.stop - 1, self.seq):
            self.disk.commit(self.log)
        self.lacking |= set(GEOMETRY.extents(offset, end))
        self.dirty.mark(offset, end)
        self.model |= set(GEOMETRY.extents(offset, end))

    @rule(first=EXTENTS, count=st.integers(1, 40000))
    def copy(self, first: int, count: int) -> None:
        last = min(first + count, LAST + 1)
        self.lacking -= set(range(first, last))
        self.dirty.clear(first, last)
        self.model -= set(range(first, last))

    @rule(count=st.integers(1, 20))
    def evict(self, count: int) -> None:
        gone = [
            region
            for region in self.log.evictable(self.seq, lambda _: False, count)
            if not self.dirty.unsaved_pages_of_region(region)
        ]
        self.log.drop(gone)
        self.disk.commit(self.log)

    @rule(data=st.data())
    def begin_save(self, data: st.DataObject) -> None:
        if pages := self.dirty.stale_pages():
            index = data.draw(st.sampled_from(pages))
            self.disk.under_way.append(self.dirty.begin_page(index, GENERATION))

    @rule(data=st.data())
    def end_save(self, data: st.DataObject) -> None:
        if self.disk.under_way:
            at = data.draw(st.integers(0, len(self.disk.under_way) - 1))
            write = self.disk.under_way.pop(at)
            self.disk.pages[write.index] = write.block
            self.dirty.end_page(write)

    @rule(choices=st.lists(st.sampled_from(["lost", "written", "torn"]), max_size=8))
    def power_cut(self, choices: Iterable[str]) -> None:
        for write, choice in zip(self.disk.under_way, choices, strict=False):
            before = self.disk.pages[write.index]
            cut = {"lost": 0, "torn": 512, "written": 4096}[choice]
            self.disk.pages[write.index] = write.block[:cut] + before[cut:]
        self.disk.under_way.clear()
        told = self.log.txn
        self.dirty, self.log = new_map(), IntentLog(GEOMETRY, MAP_ID)
        self.dirty.load(self.disk.pages)
        loaded = self.log.load(bytes(self.disk.ring.data), KNOWN, told)
        assert not loaded.damaged
        for region in loaded.hot:
            self.dirty.mark_region(region, suspect=True)
        assert self.lacking <= extents(self.dirty)
        for index in self.dirty.unsaved_pages():
            self.disk.pages[index] = save(self.dirty, index)
        self.disk.commit(self.log)
        self.model = extents(self.dirty)

    @invariant()
    def memory_is_the_model(self) -> None:
        assert extents(self.dirty) == self.model >= self.lacking
        assert self.dirty.count == len(self.model)
        assert self.dirty.any() == bool(self.model)


def test_nothing_the_peer_lacks_is_forgotten_by_a_power_cut() -> None:
    """An acknowledged write is on one node only, and no map or log says so."""
    MapMachine.TestCase.settings = settings(stateful_step_count=40)
    MapMachine.TestCase("runTest").runTest()
