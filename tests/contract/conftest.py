"""Where the contract suites run: every implementation of a port, on every kind of file system.

An implementation is one line in `STORES` or `METAS`; it gets every test of its port's suite. The
simulated ones are those that the simulator gives the core.
"""

import errno
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import pytest

from nbdmirror.core.superblock import ArbiterKind, DataState, Superblock
from nbdmirror.metastore import FileMetaStore
from nbdmirror.metastore import create as create_metadata
from nbdmirror.store import SYNC_DESCRIPTIONS_COUNT, FileStore
from tests.contract.simulated import SimulatedMeta, SimulatedStore

AnyStore: TypeAlias = FileStore | SimulatedStore
AnyMeta: TypeAlias = FileMetaStore | SimulatedMeta
DEVICE_BYTES = 8 * 1024 * 1024
TMPFS = Path("/dev/shm")


def first_superblock() -> Superblock:
    """A node at birth, small enough for quick tests."""
    return Superblock(
        mirror_id=b"m" * 16,
        mirror_name="contract",
        node_id=1,
        node_uuid=b"u" * 16,
        device_bytes=DEVICE_BYTES,
        extent_bytes=4096,
        region_bytes=1024 * 1024,
        map_id=b"p" * 16,
        arbiter=ArbiterKind.NONE,
        generation=b"g" * 16,
        data_state=DataState.UPTODATE,
        sequence=1,
    )


def make_meta(directory: Path) -> FileMetaStore:
    """A fresh metadata file, opened and locked."""
    superblock = first_superblock()
    create_metadata(directory / "meta", superblock, superblock.geometry())
    return FileMetaStore.open(directory / "meta")


def reopened(meta: AnyMeta) -> AnyMeta:
    """The same file, closed and opened by the next engine."""
    meta.close()
    return FileMetaStore.open(meta.path) if isinstance(meta, FileMetaStore) else meta.reopened()


def simulated(_disk: Path, _ram: Path) -> SimulatedStore:
    """A disk that has every operation."""
    return SimulatedStore(DEVICE_BYTES, can_trim=True, can_fast_zero=True)


def simulated_plain(_disk: Path, _ram: Path) -> SimulatedStore:
    """A disk that can only be written."""
    return SimulatedStore(DEVICE_BYTES, can_trim=False, can_fast_zero=False)


def simulated_poor(_disk: Path, _ram: Path) -> SimulatedStore:
    """A disk that offered every operation and has lost them."""
    store = simulated(_disk, _ram)
    store.file.failing.update({"trim": errno.EOPNOTSUPP, "zero": errno.ENOSPC})
    return store


STORES: dict[str, Callable[[Path, Path], AnyStore]] = {
    "reserved": lambda disk, _: FileStore.create(disk / "data", DEVICE_BYTES, sparse=False),
    "sparse": lambda disk, _: FileStore.create(disk / "data", DEVICE_BYTES, sparse=True),
    "tmpfs": lambda _, ram: FileStore.create(ram / "data", DEVICE_BYTES, sparse=False),
    "tmpfs-sparse": lambda _, ram: FileStore.create(ram / "data", DEVICE_BYTES, sparse=True),
    "simulated": simulated,
    "simulated-plain": simulated_plain,
    "simulated-poor": simulated_poor,
}
METAS: dict[str, Callable[[Path, Path], AnyMeta]] = {
    "disk": lambda disk, _: make_meta(disk),
    "tmpfs": lambda _, ram: make_meta(ram),
    "simulated": lambda _disk, _ram: SimulatedMeta.create(first_superblock()),
}


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """Writes beyond it fail with EFBIG, by the kernel's hand."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def no_writes_beyond(meta: AnyMeta, limit_bytes: int) -> Iterator[None]:
    """Writes of this file beyond it fail with EFBIG."""
    if isinstance(meta, FileMetaStore):
        with file_size_limit(limit_bytes):
            yield
        return
    before, meta.file.limit_bytes = meta.file.limit_bytes, limit_bytes
    yield
    meta.file.limit_bytes = before


def exchange_syncers(store: FileStore, descriptor: int) -> list[int]:
    """Let every sync of the store go to another file; returns the real ones."""
    real = [store._syncers.get_nowait() for _ in range(SYNC_DESCRIPTIONS_COUNT)]
    for _ in real:
        store._syncers.put(os.dup(descriptor))
    return real


def restore_syncers(store: FileStore, real: list[int]) -> None:
    """Undo exchange_syncers()."""
    for descriptor in real:
        os.close(store._syncers.get_nowait())
        store._syncers.put(descriptor)


@contextmanager
def failing_syncs(store: AnyStore) -> Iterator[None]:
    """Every sync of the store fails meanwhile."""
    if isinstance(store, SimulatedStore):
        store.file.failing["sync"] = errno.EINVAL
        yield
        del store.file.failing["sync"]
        return
    pipe = os.pipe()
    real = exchange_syncers(store, pipe[0])  # fdatasync of a pipe: EINVAL
    yield
    restore_syncers(store, real)
    for descriptor in pipe:
        os.close(descriptor)


@pytest.fixture
def ram() -> Iterator[Path]:
    """A directory on tmpfs, gone afterwards."""
    directory = Path(tempfile.mkdtemp(dir=TMPFS, prefix="nbdmirror-test-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path, ram: Path) -> Iterator[AnyStore]:
    """Each implementation of Store in turn, of DEVICE_BYTES, all zeros."""
    made = STORES[request.param](tmp_path, ram)
    yield made
    made.close()


@pytest.fixture(params=METAS)
def meta(request: pytest.FixtureRequest, tmp_path: Path, ram: Path) -> Iterator[AnyMeta]:
    """Each implementation of MetaStore in turn, just created."""
    made = METAS[request.param](tmp_path, ram)
    yield made
    made.close()
