"""What only a store on real files can get wrong: names, space, errno, the life of a sync."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdmirror.errors import MetadataError, OutOfSpaceError, RefusedError, StoreError
from nbdmirror.store import SYNC_DESCRIPTIONS_COUNT, FileStore, _is_tmpfs
from tests.contract.conftest import (
    AnyStore,
    exchange_syncers,
    file_size_limit,
    restore_syncers,
)
from tests.contract.simulated import SimulatedStore

MIB = 1024 * 1024


@pytest.fixture
def small(tmp_path: Path, require_root: None) -> Iterator[Path]:
    """A file system of 4 MiB."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "nbdmirror-test", tmp_path], check=True
    )
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)  # a failed test holds files open


def test_only_a_plain_file_is_opened(tmp_path: Path) -> None:
    """If this fails, a link planted in the data directory makes the engine write elsewhere."""
    FileStore.create(tmp_path / "data", MIB, sparse=True).close()
    (tmp_path / "link").symlink_to("data")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "link", tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(RefusedError, match=str(path)):
            FileStore.open(path, MIB, sparse=True)
    with pytest.raises(StoreError, match="EISDIR"):
        FileStore.open(tmp_path, MIB, sparse=True)


def test_a_file_smaller_than_the_device_is_refused(tmp_path: Path) -> None:
    """If this fails, a truncated copy is served: reads fail late, in the middle of a failover."""
    FileStore.create(tmp_path / "data", MIB, sparse=True).close()
    os.truncate(tmp_path / "data", MIB - 1)
    with pytest.raises(MetadataError, match="restore"):
        FileStore.open(tmp_path / "data", MIB, sparse=True)


def test_a_file_cut_short_while_open_is_an_error(tmp_path: Path) -> None:
    """If this fails, a read past a truncation hangs or returns bytes of an earlier request."""
    store = FileStore.create(tmp_path / "data", MIB, sparse=True)
    os.truncate(tmp_path / "data", 4096)
    with pytest.raises(StoreError, match="cut short") as caught:
        store.pread(bytearray(8192), 0)
    assert caught.value.number == errno.EIO
    store.close()


def test_create_overwrites_nothing_and_is_private(tmp_path: Path) -> None:
    """If this fails, a second `create` destroys a mirror's data, or any user can read it."""
    FileStore.create(tmp_path / "data", MIB, sparse=False).close()
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o600
    with pytest.raises(RefusedError, match="not overwritten"):
        FileStore.create(tmp_path / "data", 2 * MIB, sparse=False)
    assert (tmp_path / "data").stat().st_size == MIB


def test_a_failed_create_leaves_nothing(tmp_path: Path) -> None:
    """If this fails, an operator's second try is refused because of the leftovers of the first."""
    with file_size_limit(MIB), pytest.raises(StoreError, match="EFBIG"):
        FileStore.create(tmp_path / "data", 2 * MIB, sparse=False)
    assert not list(tmp_path.iterdir())


def test_create_without_room_says_so(small: Path) -> None:
    """If this fails, a reserved file is promised that a full disk breaks in production."""
    with pytest.raises(OutOfSpaceError):
        FileStore.create(small / "data", 8 * MIB, sparse=False)
    assert not list(small.iterdir())


def test_a_reserved_file_keeps_its_space(tmp_path: Path) -> None:
    """If this fails, a trim by the client lets another program take the mirror's space."""
    store = FileStore.create(tmp_path / "data", 8 * MIB, sparse=False)
    blocks = (tmp_path / "data").stat().st_blocks
    assert blocks * 512 >= 8 * MIB
    store.pwrite(b"x" * (4 * MIB), 0)
    store.zero(0, 2 * MIB, True)
    if store.can_trim:
        store.trim(2 * MIB, 2 * MIB)
    assert (tmp_path / "data").stat().st_blocks >= blocks or _is_tmpfs(store.fileno())
    store.close()


def test_a_sparse_file_gives_space_back_only_where_allowed(tmp_path: Path) -> None:
    """If this fails, a client that asked to keep the space runs into a full disk later."""
    store = FileStore.create(tmp_path / "data", 8 * MIB, sparse=True)
    store.pwrite(b"x" * (4 * MIB), 0)
    store.fdatasync()
    full = (tmp_path / "data").stat().st_blocks
    store.zero(0, 2 * MIB, False)
    assert (tmp_path / "data").stat().st_blocks == full
    store.zero(0, 2 * MIB, True)
    assert (tmp_path / "data").stat().st_blocks < full
    store.close()


def test_adopt_keeps_the_content_and_reserves_the_holes(tmp_path: Path) -> None:
    """If this fails, adopting existing data changes it, or its holes break writes later."""
    path = tmp_path / "data"
    with path.open("wb") as file:
        file.write(b"precious")
        file.truncate(4 * MIB)
    FileStore.adopt(path, 4 * MIB, sparse=False).close()
    assert path.stat().st_blocks * 512 >= 4 * MIB
    assert path.read_bytes() == b"precious".ljust(4 * MIB, b"\0")


def test_writeback_that_finds_no_room_fails_for_ever(small: Path, ram: Path) -> None:
    """If this fails, a full disk met by the writeback is taken for a clean refusal."""
    store = FileStore.create(ram / "data", MIB, sparse=True)
    with (small / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, 4 * MIB)
    full = os.open(small / "full", os.O_CREAT | os.O_WRONLY)
    real = exchange_syncers(store, full)  # ENOSPC there, while the plain write has room
    with pytest.raises(StoreError, match=r"write and sync .*ENOSPC") as caught:
        store.pwrite_durable(b"x" * 4096, 0)
    assert not isinstance(caught.value, OutOfSpaceError)
    restore_syncers(store, real)
    with pytest.raises(StoreError, match="failed before"):
        store.fdatasync()
    store.close()
    os.close(full)


def test_a_write_without_room_fails_alone(small: Path) -> None:
    """If this fails, one write too many on a full disk costs the whole copy."""
    store = FileStore.create(small / "data", 8 * MIB, sparse=True)
    store.pwrite(b"x" * (3 * MIB), 0)
    refuses_for_want_of_room(store)
    assert not store.failed
    store.close()


def test_a_simulated_write_without_room_fails_alone() -> None:
    """If this fails, the simulator plays a full disk that no real one is like."""
    store = SimulatedStore(8 * MIB, can_trim=True, can_fast_zero=True)
    store.file.failing["write"] = errno.ENOSPC
    refuses_for_want_of_room(store)


def refuses_for_want_of_room(store: AnyStore) -> None:
    """No write, durable or not, finds room, and a sync is as good as before."""
    for write in (store.pwrite, store.pwrite_durable):
        with pytest.raises(OutOfSpaceError):
            write(b"y" * (3 * MIB), 4 * MIB)
    store.fdatasync()


def test_every_sync_has_a_description_of_its_own(tmp_path: Path) -> None:
    """If this fails, two syncs share one error report and one of them lies about lost writes."""
    store = FileStore.create(tmp_path / "data", MIB, sparse=True)
    syncers = [store._syncers.get_nowait() for _ in range(SYNC_DESCRIPTIONS_COUNT)]
    descriptors = [store.fileno(), *syncers]
    for position, descriptor in enumerate(descriptors):
        os.lseek(descriptor, position, os.SEEK_SET)  # duplicates would share the position
    assert [os.lseek(d, 0, os.SEEK_CUR) for d in descriptors] == list(range(len(descriptors)))
    for descriptor in syncers:
        store._syncers.put(descriptor)
    store.close()


def descriptors_of(path: Path) -> list[int]:
    """Which descriptors of this process lead to the file."""
    links = Path("/proc/self/fd").iterdir()
    return [int(link.name) for link in links if link.resolve() == path]


def test_descriptors_do_not_leak(tmp_path: Path) -> None:
    """If this fails, a child process keeps the data file open, or reopening runs out of numbers."""
    path = tmp_path / "data"
    store = FileStore.create(path, MIB, sparse=True)
    held = descriptors_of(path)
    assert len(held) == 1 + SYNC_DESCRIPTIONS_COUNT
    assert not any(os.get_inheritable(descriptor) for descriptor in held)
    store.close()
    assert descriptors_of(path) == []
