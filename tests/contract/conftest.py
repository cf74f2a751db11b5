"""Where the contract suites run: every implementation of a port, on every kind of file system.

An implementation is one line in `STORES` or `METAS`; it gets every test of its port's suite.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdmirror.core.superblock import ArbiterKind, DataState, Superblock
from nbdmirror.metastore import FileMetaStore
from nbdmirror.metastore import create as create_metadata
from nbdmirror.store import FileStore

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


STORES: dict[str, Callable[[Path, Path], FileStore]] = {
    "reserved": lambda disk, _: FileStore.create(disk / "data", DEVICE_BYTES, sparse=False),
    "sparse": lambda disk, _: FileStore.create(disk / "data", DEVICE_BYTES, sparse=True),
    "tmpfs": lambda _, ram: FileStore.create(ram / "data", DEVICE_BYTES, sparse=False),
    "tmpfs-sparse": lambda _, ram: FileStore.create(ram / "data", DEVICE_BYTES, sparse=True),
}
METAS: dict[str, Callable[[Path, Path], FileMetaStore]] = {
    "disk": lambda disk, _: make_meta(disk),
    "tmpfs": lambda _, ram: make_meta(ram),
}


@pytest.fixture
def ram() -> Iterator[Path]:
    """A directory on tmpfs, gone afterwards."""
    directory = Path(tempfile.mkdtemp(dir=TMPFS, prefix="nbdmirror-test-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path, ram: Path) -> Iterator[FileStore]:
    """Each implementation of Store in turn, of DEVICE_BYTES, all zeros."""
    made = STORES[request.param](tmp_path, ram)
    yield made
    made.close()


@pytest.fixture(params=METAS)
def meta(request: pytest.FixtureRequest, tmp_path: Path, ram: Path) -> Iterator[FileMetaStore]:
    """Each implementation of MetaStore in turn, just created."""
    made = METAS[request.param](tmp_path, ram)
    yield made
    made.close()
