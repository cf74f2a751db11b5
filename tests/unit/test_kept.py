"""What is kept of a copy that was given up: its file, what a crash leaves of it, and the image."""

import errno
import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbdmirror import kept as kept_module
from nbdmirror.core import keeping
from nbdmirror.core import kept as form
from nbdmirror.core.aftermath import Keep
from nbdmirror.core.checks import crc32c
from nbdmirror.core.geometry import Geometry
from nbdmirror.core.ports import Path as CorePath
from nbdmirror.core.superblock import ArbiterKind, DataState, Superblock
from nbdmirror.errors import (
    MetadataError,
    NoRoomToKeepError,
    OutOfSpaceError,
    RefusedError,
    StoreError,
)
from nbdmirror.kept import FileKept, Image, path_beside
from nbdmirror.limits import META_BLOCK_BYTES, MIB
from nbdmirror.metastore import create as create_metadata
from nbdmirror.store import FileStore

EXTENT = 4096
# The last extent is a short one.
SIZE = 2 * MIB + 512
GENERATION = b"g" * 16


def drive(path: CorePath) -> Any:
    """Run a path; nothing else runs beside it."""
    try:
        call = next(path)
        while True:
            try:
                value = call[0](*call[1:])
            except Exception as error:  # noqa: BLE001 - the path gets it
                call = path.throw(error)
            else:
                call = path.send(value)
    except StopIteration as stop:
        return stop.value


class FakeNode(SimpleNamespace):
    """As much of a node as keeping needs."""

    sb: Any

    def change(self, edit: Callable[[Any], Any], *, always: bool = False) -> CorePath:
        """The superblock has what memory has."""
        self.sb = edit(self.sb)
        self.sb.saved_bytes = self.saved_bytes
        yield from ()


def make_node(store: Any, file: Any, *, limit: int = MIB, size: int = SIZE) -> Any:
    """A node whose copy is given up and is being overwritten."""
    events: list[str] = []
    sb = SimpleNamespace(
        node_id=2, extent_bytes=EXTENT, device_bytes=size, mirror_id=b"m" * 16,
        node_uuid=b"n" * 16, generation=GENERATION, saved_bytes=0,
        data_state=DataState.INCONSISTENT,
    )  # fmt: skip
    shell = SimpleNamespace(
        random_bytes=lambda count: b"i" * count, emit=lambda kind, **_: events.append(kind)
    )
    return FakeNode(
        store=store, geometry=Geometry(size, EXTENT, MIB), sb=sb, shell=shell, saved_bytes=0,
        keep=Keep(limit, file), events=events,
    )  # fmt: skip


class OnDisk:
    """A node with a real data file of random content, and what it held at first."""

    def __init__(self, directory: Path, *, limit: int = 4 * MIB) -> None:
        self.rng = random.Random(7)
        self.path = directory / "data"
        self.store = FileStore.create(self.path, SIZE, sparse=True)
        for _ in range(60):
            at = self.rng.randrange(SIZE // 512) * 512
            self.store.pwrite(self.rng.randbytes(min(9000, SIZE - at)), at)
        self.before = self.path.read_bytes()
        self.kept = path_beside(self.path)
        self.node = make_node(self.store, FileKept(self.kept), limit=limit)
        drive(keeping.begin(self.node, self.node.keep.file, 1, 2))

    def change(self) -> None:
        """One random change of the data file, the way the core makes it."""
        at = self.rng.randrange(SIZE // 512) * 512
        length = min(self.rng.choice((512, 4096, 70_000)), SIZE - at)
        if self.rng.random() < 0.7:
            drive(keeping.keep_before(self.node, at, at + length))
            self.store.pwrite(self.rng.randbytes(length), at)
        else:
            drive(keeping.keep_before_zeros(self.node, at, at + length))
            self.store.zero(at, length, True)

    def close(self) -> None:
        """Give the files back."""
        self.store.close()
        self.node.keep.file.close()


@pytest.fixture
def disk(tmp_path: Path) -> Any:
    """A copy that was given up, on a real disk."""
    made = OnDisk(tmp_path)
    yield made
    made.close()


def exported(disk: OnDisk, **how: bool) -> bytes:
    """The image, by way of a file."""
    target = disk.path.with_name("image")
    with Image.open(disk.kept) as image:
        image.export(target, partial=how.get("partial", False))
    content = target.read_bytes()
    target.unlink()
    return content


def test_the_image_is_what_the_copy_was(disk: OnDisk) -> None:
    """If it fails, what was given up comes back as a mix of two days."""
    assert exported(disk) == disk.before
    for _ in range(40):
        disk.change()
    assert disk.path.read_bytes() != disk.before
    assert exported(disk) == disk.before
    assert disk.node.keep.kept.used_bytes < 4 * MIB
    assert disk.kept.stat().st_blocks * 512 < disk.kept.stat().st_size, "it is sparse"


def test_the_image_is_read_beside_a_running_engine(disk: OnDisk) -> None:
    """If it fails, an export while the mirror serves holds writes of today."""
    with Image.open(disk.kept) as image:
        content = b""
        for _, piece in image.pieces():
            content += piece
            for _ in range(20):
                disk.change()
        assert content == disk.before
        assert image.facts()["extents"] == disk.node.keep.kept.count


def test_the_image_is_read_while_an_extent_changes(
    disk: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, an extent that changes in the middle of an export is exported as it is now."""
    read_all = kept_module.read_all
    with Image.open(disk.kept) as image:

        def busy(descriptor: int, path: Path, view: memoryview, offset: int) -> None:
            if path != disk.path:
                read_all(descriptor, path, view, offset)
                return
            for _ in range(10):
                disk.change()
            read_all(descriptor, path, view, offset)
            for _ in range(10):
                disk.change()

        monkeypatch.setattr(kept_module, "read_all", busy)
        assert b"".join(piece for _, piece in image.pieces()) == disk.before


def test_the_image_outlives_the_engine(disk: OnDisk) -> None:
    """If it fails, a restart forgets what is kept, and overwrites the rest unkept."""
    for _ in range(10):
        disk.change()
    node = make_node(disk.store, FileKept(disk.kept), limit=4 * MIB)
    node.sb.saved_bytes = disk.node.saved_bytes
    drive(keeping.load(node, node.keep.file))
    found, known = node.keep.kept, disk.node.keep.kept
    assert (found.count, found.used_bytes, found.saved) == (
        known.count, known.used_bytes, known.saved,
    )  # fmt: skip
    assert (found.damage, found.closed) == ("", False)
    disk.node.keep.file.close()
    disk.node = node
    for _ in range(20):
        disk.change()
    assert exported(disk) == disk.before


def flip(path: Path, offset: int) -> None:
    """Rot: one bit."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("what", ["header", "entry", "content", "count"])
def test_what_is_damaged_is_not_handed_out(disk: OnDisk, what: str) -> None:
    """If it fails, an operator restores from an image that silently is not what was given up."""
    # Two batches: what the second one vouches for is the first.
    drive(keeping.keep_before(disk.node, 0, MIB))
    drive(keeping.keep_before(disk.node, MIB, MIB + 300_000))
    kept = disk.node.keep.kept
    stored = next(e for e in range(256) if any(disk.before[e * EXTENT : (e + 1) * EXTENT]))
    places = {"header": 30, "entry": kept.entry_at(3) + 9, "content": kept.content_at(stored) + 7}
    node = make_node(disk.store, FileKept(disk.kept), limit=4 * MIB)
    node.sb.saved_bytes = disk.node.saved_bytes
    if what == "count":
        node.sb.saved_bytes += EXTENT
    else:
        flip(disk.kept, places[what])
        with pytest.raises(MetadataError, match="damaged"):
            exported(disk)
        assert not disk.path.with_name("image").exists()
    if what == "content":
        return  # found when it is read; the index is sound
    drive(keeping.load(node, node.keep.file))
    assert node.keep.kept.damage
    assert node.events == ["kept-damaged"]
    with pytest.raises(NoRoomToKeepError, match="kept discard"):
        drive(keeping.keep_before(node, SIZE - 512, SIZE))
    node.keep.file.close()


def test_a_lost_end_of_the_index_is_noticed(tmp_path: Path) -> None:
    """If it fails, an export takes today's writes for what was given up, and nobody is told."""
    disk = OnDisk(tmp_path)
    try:
        sb = Superblock(
            mirror_id=b"m" * 16, mirror_name="demo", node_id=2, node_uuid=b"n" * 16,
            device_bytes=SIZE, extent_bytes=EXTENT, region_bytes=MIB, map_id=b"p" * 16,
            arbiter=ArbiterKind.NONE, saved_bytes=5 * EXTENT,
        )  # fmt: skip
        create_metadata(tmp_path / "meta", sb, sb.geometry())
        drive(keeping.keep_before(disk.node, 0, 5 * EXTENT))
        disk.store.pwrite(b"t" * 5 * EXTENT, 0)
        assert exported(disk) == disk.before
        kept = disk.node.keep.kept
        disk.node.keep.file.pwrite(bytes(form.ENTRY_BYTES), kept.entry_at(4))
        with pytest.raises(MetadataError, match="entry 4 of at least 5"):
            exported(disk)
    finally:
        disk.close()


def test_a_bad_entry_is_damage_or_the_end_of_a_batch() -> None:
    """If it fails, a torn write stops a mirror, or rot of the index goes unseen."""
    geometry = Geometry(SIZE, EXTENT, MIB)

    def judged(entries: list[form.Entry | None], known: int = 0) -> tuple[int, int, str]:
        judge = form.Judge(form.Kept(None, geometry, form.UNKNOWN), known)  # type: ignore[arg-type]
        for entry in entries:
            judge.take(entry)
        return judge.kept.count, len(judge.tail()) if not judge.damage() else -1, judge.damage()

    first = [form.Entry(n, 0, 0, zeros=True) for n in range(3)]
    second = [form.Entry(n, 0, 3, zeros=True) for n in range(3, 6)]
    assert judged([*first, *second]) == (6, 3, "")
    assert judged([*first, *second], known=6) == (6, 0, "")
    assert judged([*first, second[0], None, second[2]]) == (4, 1, ""), "torn, and nobody relied on"
    assert judged([first[0], None, first[2], *second])[2], "rot"
    assert judged([*first], known=4)[2], "the end is missing"
    assert judged([*first, form.Entry(1, 0, 3, zeros=True)])[2], "twice"
    assert judged([form.Entry(10**6, 0, 0, zeros=True)])[2], "beyond the device"


class Step(Exception):  # noqa: N818 - the end of a life, not an error
    """The power goes here."""


class Power:
    """Counts the steps of two files, and cuts the power at one of them."""

    def __init__(self, cut_at: int) -> None:
        self.left = cut_at

    def step(self) -> None:
        """One system call begins."""
        if self.left == 0:
            raise Step
        self.left -= 1


class MemoryFile:
    """A file whose unsynced writes survive a power cut as somebody chooses."""

    def __init__(self, size: int, power: Power) -> None:
        self.durable = bytearray(size)
        self.cache = bytearray(size)
        self.pending: list[tuple[int, bytes]] = []
        self.power = power
        self.there = False

    def open(self) -> bool:
        return self.there

    def create(self, header: bytes, size: int) -> None:
        self.cache = bytearray(size)
        self.cache[: len(header)] = header
        self.durable = bytearray(self.cache)
        self.there = True

    def pread(self, buffer: Any, offset: int) -> None:
        buffer[:] = self.cache[offset : offset + len(buffer)]

    def pwrite(self, buffer: Any, offset: int) -> None:
        self.power.step()
        self.cache[offset : offset + len(buffer)] = buffer
        self.pending.append((offset, bytes(buffer)))

    def fdatasync(self) -> None:
        self.power.step()
        self.durable = bytearray(self.cache)
        self.pending.clear()

    def remove(self) -> None:
        self.there = False

    def lose_power(self, survives: tuple[bool, ...]) -> None:
        for kept, (offset, content) in zip(survives, self.pending, strict=False):
            if kept:
                self.durable[offset : offset + len(content)] = content
        self.pending.clear()
        self.cache = bytearray(self.durable)


def image_of(kept: form.Kept, file: MemoryFile, data: bytes) -> bytes:
    """The image, by the file alone."""
    judge = form.Judge(form.Kept(file, kept.geometry, kept.header), 0)
    drive(keeping.read_index(judge.kept, judge))
    assert not judge.damage()
    drive(keeping.settle_tail(judge.kept, judge.tail(), judge.end))
    image = bytearray(data)
    for extent in range(kept.geometry.extent_count):
        if judge.kept.saved[extent]:
            at = extent * EXTENT
            content = judge.kept.content_at(extent)
            image[at : at + EXTENT] = file.cache[content : content + EXTENT]
    return bytes(image)


def test_a_power_cut_at_any_step_loses_nothing() -> None:
    """If it fails, an extent is overwritten whose old content is not on the disk yet."""
    size = MIB
    cuts = 0
    for cut_at, survives in itertools.product(
        range(13), itertools.product((False, True), repeat=4)
    ):
        power = Power(1_000_000)
        data, file = MemoryFile(size, power), MemoryFile(0, power)
        rng = random.Random(3)
        data.durable[:] = data.cache[:] = rng.randbytes(size)
        before = bytes(data.cache)
        node = make_node(data, file, size=size, limit=4 * MIB)
        drive(keeping.begin(node, file, 0, 0))
        power.left = cut_at
        try:
            for at in (0, 40_000, 8_000):
                drive(keeping.keep_before(node, at, at + 9_000))
                data.pwrite(rng.randbytes(9_000), at)
                data.durable[:] = data.cache  # the worst: it is on the disk at once
        except Step:
            cuts += 1
        power.left = 1_000_000
        kept = node.keep.kept
        file.lose_power(survives)
        data.cache[:] = data.durable
        assert image_of(kept, file, bytes(data.cache)) == before, (cut_at, survives)
        # And again: what is opened is not made worse by that.
        assert image_of(kept, file, bytes(data.cache)) == before
    assert cuts > 100


class Failing(MemoryFile):
    """A file that fails one operation with an errno."""

    def __init__(self, operation: str, number: int) -> None:
        super().__init__(0, Power(1_000_000))
        self.operation, self.number = operation, number

    def _fail(self, operation: str) -> None:
        if operation == self.operation:
            kind = OutOfSpaceError if self.number == errno.ENOSPC else StoreError
            raise kind(self.number, operation)

    def pwrite(self, buffer: Any, offset: int) -> None:
        if offset >= MIB:
            self._fail("content")
        super().pwrite(buffer, offset)

    def fdatasync(self) -> None:
        self._fail("sync")
        super().fdatasync()


@pytest.mark.parametrize(("operation", "number"), [("content", errno.ENOSPC), ("sync", errno.EIO)])
def test_what_cannot_be_kept_is_not_overwritten(operation: str, number: int) -> None:
    """If it fails, a full disk turns into the loss of what was to be kept."""
    data, file = MemoryFile(SIZE, Power(10**6)), Failing(operation, number)
    data.cache[:] = os.urandom(SIZE)
    node = make_node(data, file)
    drive(keeping.begin(node, file, 0, 0))
    with pytest.raises(NoRoomToKeepError, match="kept limit"):
        drive(keeping.keep_before(node, 0, 512))
    assert node.keep.kept.count == 0
    file.operation = ""
    if operation == "sync":
        # A sync that failed is not tried again: what reached the disk is read first.
        with pytest.raises(NoRoomToKeepError):
            drive(keeping.keep_before(node, 0, 512))
        drive(keeping.give_space(node, 2 * MIB))
    drive(keeping.keep_before(node, 0, 512))
    assert node.keep.kept.count == 1


def test_an_image_that_cannot_be_closed_stops_the_write() -> None:
    """If it fails, an image that is not complete says that it is."""
    data, file = MemoryFile(SIZE, Power(10**6)), Failing("sync", errno.EIO)
    data.cache[:] = os.urandom(SIZE)
    node = make_node(data, file)
    drive(keeping.begin(node, file, 0, 0))
    node.sb.data_state = DataState.UPTODATE
    with pytest.raises(StoreError):
        drive(keeping.keep_before(node, 0, 512))
    assert not node.keep.kept.closed
    file.operation = ""
    drive(keeping.keep_before(node, 0, 512))
    assert node.keep.kept.closed, "the space was not the problem, but it is not kept all the same"
    assert any(file.durable[META_BLOCK_BYTES : 2 * META_BLOCK_BYTES])


def test_a_closed_image_is_exported_only_if_that_is_known(tmp_path: Path) -> None:
    """If it fails, an image with writes of today in it is taken for what was given up."""
    disk = OnDisk(tmp_path)
    try:
        drive(keeping.keep_before(disk.node, 0, 20_000))
        disk.store.pwrite(b"x" * 20_000, 0)
        disk.node.keep.limit_bytes = disk.node.keep.kept.used_bytes
        disk.node.sb.data_state = DataState.UPTODATE
        drive(keeping.keep_before(disk.node, 100_000, 160_000))
        disk.store.pwrite(b"y" * 60_000, 100_000)
        assert disk.node.events[-1] == "kept-closed"
        with pytest.raises(RefusedError, match="--partial"):
            exported(disk)
        partial = exported(disk, partial=True)
        assert partial[:20_000] == disk.before[:20_000]
        assert partial[100_000:160_000] == b"y" * 60_000
    finally:
        disk.close()


def test_nothing_is_overwritten_by_name(disk: OnDisk) -> None:
    """If it fails, a second image takes the place of the first, or an export that of a backup."""
    with pytest.raises(RefusedError, match="already"):
        FileKept(disk.kept).create(b"h" * META_BLOCK_BYTES, MIB)
    target = disk.path.with_name("image")
    target.write_bytes(b"precious")
    with Image.open(disk.kept) as image, pytest.raises(RefusedError, match="not overwritten"):
        image.export(target, partial=False)
    assert target.read_bytes() == b"precious"
    assert not list(disk.path.parent.glob(".kept*")), "nothing is left behind"


def test_discarded_is_gone(disk: OnDisk) -> None:
    """If it fails, the space is never given back, or an old image is found again."""
    disk.change()
    with Image.open(disk.kept) as image:
        drive(keeping.discard(disk.node))
        assert not disk.kept.exists()
        with pytest.raises(RefusedError, match="discarded meanwhile"):
            image.export(disk.path.with_name("image"), partial=False)
    assert (disk.node.saved_bytes, disk.node.sb.saved_bytes) == (0, 0)
    with pytest.raises(RefusedError, match="nothing is kept"):
        drive(keeping.discard(disk.node))
    with pytest.raises(RefusedError, match="nothing is kept"):
        Image.open(disk.kept)


def test_known_bytes() -> None:
    """If it fails, the next release cannot read what this one keeps, or reads it as another thing.

    The bytes of docs/disk-format.md.
    """
    header = form.Header(
        node_id=2, extent_bytes=4096, device_bytes=SIZE, mirror_id=b"m" * 16,
        node_uuid=b"n" * 16, image_id=b"i" * 16, generation=GENERATION, own_bytes=5, peer_bytes=6,
    )  # fmt: skip
    block = form.encode_header(header)
    assert block[:16] == b"NBDKEPT\0" + bytes([0, 1, 2, 0, 0, 0, 16, 0])
    assert block[16:24] == SIZE.to_bytes(8, "big")
    assert block[24:88] == b"m" * 16 + b"n" * 16 + b"i" * 16 + b"g" * 16
    assert block[88:104] == (5).to_bytes(8, "big") + (6).to_bytes(8, "big")
    assert form.decode_header(block) == header
    entry = form.Entry(7, crc32c(b"x"), 3, zeros=False)
    raw = form.encode_entry(header.image_id, 4, entry)
    assert len(raw) == 32
    assert raw[:8] == b"NBKE" + crc32c(b"x").to_bytes(4, "big")
    assert form.decode_entry(header.image_id, 4, raw) == entry
    for place, image in ((5, header.image_id), (4, b"j" * 16)):
        assert form.decode_entry(image, place, raw) is None
    for bit in range(32 * 8):
        torn = bytearray(raw)
        torn[bit // 8] ^= 1 << (bit % 8)
        assert form.decode_entry(header.image_id, 4, bytes(torn)) is None
