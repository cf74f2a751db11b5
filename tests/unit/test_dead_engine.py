"""Speaking for a dead engine: on real metadata files, under their real lock."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from nbdmirror import admin
from nbdmirror.config import Config, load
from nbdmirror.controller.dead_engine import dead_engine
from nbdmirror.core.superblock import DataState, Flags, PendingKind, Superblock, choose
from nbdmirror.errors import MetadataError, NbdMirrorError, RefusedError, StoreError
from nbdmirror.limits import MIB, SUPERBLOCK_SLOT_OFFSETS_BYTES
from nbdmirror.metastore import FileMetaStore

TEXT: Final = """
mirror = "demo"
key_file = "{root}/key"
arbiter = "none"
[paths]
data_dir = "{root}/data"
[node.alpha]
id = 1
address = "10.1.0.1:7789"
[node.beta]
id = 2
address = "10.1.0.2:7789"
"""
HOLDER: Final = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A node of a pair that was in sync until its engine died."""
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    key.chmod(0o600)
    file = tmp_path / "demo.toml"
    file.write_text(TEXT.replace("{root}", str(tmp_path)))
    made = load(file, "alpha")
    admin.create(made, MIB, join=False, adopt=False, sparse=True)
    store(made, flags=Flags.WAS_PRIMARY, own_txn=7)
    return made


def store(config: Config, **fields: Any) -> None:
    """As the engine stores it."""
    meta = FileMetaStore.open(config.metadata_file)
    sb = choose(*meta.read_slots()).superblock
    meta.write_superblock(replace(sb, sequence=sb.sequence + 1, **fields))
    meta.close()


def slots(config: Config) -> tuple[bytes, bytes]:
    """Both slots, as they are on disk."""
    meta = FileMetaStore.open_to_read(config.metadata_file, locked=False)
    try:
        return meta.read_slots()
    finally:
        meta.close()


def stored(config: Config) -> Superblock:
    """What the next engine will start with; both slots hold it."""
    first, second = slots(config)
    assert first == second
    chosen = choose(first, second)
    assert not chosen.fell_back
    return chosen.superblock


def test_the_next_engine_is_outdated_and_the_same_else(config: Config) -> None:
    """Breaks in the field: a node whose engine died under load comes back, believes that it is up
    to date, and serves without what its peer acknowledged meanwhile.
    """
    before = stored(config)
    with dead_engine(config) as dead:
        assert dead.generation == before.generation.hex()
        dead.require_leaving()
        assert stored(config) == before, "asking changes nothing"
        dead.mark_outdated()
    assert stored(config) == replace(
        before, data_state=DataState.OUTDATED, sequence=before.sequence + 1
    )
    # An engine can take it: the lock is free, and the sequence goes on.
    store(config, own_txn=8)


def test_it_is_marked_once(config: Config) -> None:
    """Breaks in the field: a word is said for a moment that is over."""
    with dead_engine(config) as dead:
        dead.mark_outdated()
        with pytest.raises(RefusedError, match="it is outdated"):
            dead.mark_outdated()
    with dead_engine(config) as dead, pytest.raises(RefusedError, match="it is outdated"):
        dead.require_leaving()


REFUSED: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("it is blank", {"data_state": DataState.BLANK}),
    ("it is inconsistent", {"data_state": DataState.INCONSISTENT}),
    ("it is outdated", {"data_state": DataState.OUTDATED}),
    ("it went on alone", {"flags": Flags.ALONE}),
    ("it went on alone", {"flags": Flags.ALONE | Flags.WAS_PRIMARY | Flags.CLEAN}),
    ("it went on alone", {"flags": Flags.PEER_OUTDATED}),
    ("it went on alone", {"flags": Flags.SPLIT}),
    ("pending", {"pending_kind": PendingKind.CLAIM, "pending": b"p" * 16}),
    ("pending", {"pending_kind": PendingKind.JOINT, "pending": b"p" * 16}),
)


@pytest.mark.parametrize(("words", "fields"), REFUSED)
def test_who_may_be_ahead_says_nothing(config: Config, words: str, fields: dict[str, Any]) -> None:
    """Breaks in the field: the only copy with the last writes is declared to be behind."""
    store(config, **fields)
    before = slots(config)
    with dead_engine(config) as dead:
        for act in (dead.require_leaving, dead.mark_outdated):
            with pytest.raises(RefusedError, match=f"no word for the dead engine: .*{words}"):
                act()
    assert slots(config) == before


def test_the_creator_says_nothing_before_it_was_in_sync(config: Config, tmp_path: Path) -> None:
    """Breaks in the field: a new mirror loses its only copy when its engine dies at the start."""
    for each in (config.metadata_file, config.data_file):
        each.unlink()
    admin.create(config, MIB, join=False, adopt=False, sparse=True)
    with dead_engine(config) as dead, pytest.raises(RefusedError, match="it went on alone"):
        dead.require_leaving()
    assert tmp_path.exists()


def test_a_copy_that_fell_back_says_nothing(config: Config) -> None:
    """Breaks in the field: metadata of long ago speak for what happened since."""
    with config.metadata_file.open("r+b") as file:
        file.seek(SUPERBLOCK_SLOT_OFFSETS_BYTES[0] + 100)
        file.write(b"rot")
    before = slots(config)
    with dead_engine(config) as dead:
        for act in (dead.require_leaving, dead.mark_outdated):
            with pytest.raises(RefusedError, match="what it did last is not known"):
                act()
    assert slots(config) == before


def spoil_both(config: Config) -> None:
    """Neither slot can be read."""
    with config.metadata_file.open("r+b") as file:
        for offset in SUPERBLOCK_SLOT_OFFSETS_BYTES:
            file.seek(offset)
            file.write(b"rot")


@pytest.mark.parametrize("spoil", [spoil_both, lambda config: config.metadata_file.unlink()])
def test_metadata_that_cannot_be_read_are_an_error_of_ours(
    config: Config, spoil: Callable[[Config], None]
) -> None:
    """Breaks in the field: the controller ends at the moment when its engine has died."""
    spoil(config)
    for _ in range(2):  # the second time: the lock of the first one is gone
        with pytest.raises(MetadataError), dead_engine(config):
            pass


def test_beside_another_process_nothing_is_said(config: Config) -> None:
    """Breaks in the field: an engine that is believed dead, and is not, is declared behind while it
    acknowledges.
    """
    before = slots(config)
    engine = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(config.metadata_file)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert engine.stdin is not None
    assert engine.stdout is not None
    with engine:
        assert engine.stdout.readline() == b"held\n"
        with pytest.raises(RefusedError, match=f"locked by process {engine.pid}"):
            dead_engine(config).__enter__()
        assert slots(config) == before
        engine.stdin.close()
    with dead_engine(config) as dead:
        dead.require_leaving()


def test_while_it_is_spoken_for_no_engine_starts(config: Config) -> None:
    """Breaks in the field: the engine comes back between question and mark, and its metadata are
    written by two.
    """
    with dead_engine(config):
        with pytest.raises(RefusedError, match="is locked by process"):
            FileMetaStore.open(config.metadata_file)
        with pytest.raises(RefusedError, match="is locked by process"):
            dead_engine(config).__enter__()
    with pytest.raises(ZeroDivisionError), dead_engine(config):
        raise ZeroDivisionError
    FileMetaStore.open(config.metadata_file).close()


@pytest.mark.parametrize("good_writes_count", [0, 1])
def test_what_could_not_be_stored_is_not_said(
    config: Config, monkeypatch: pytest.MonkeyPatch, good_writes_count: int
) -> None:
    """Breaks in the field: the peer goes on because this copy is behind, and this copy does not
    know it.
    """
    before = stored(config)
    left = [good_writes_count]
    whole = os.fdatasync

    def fdatasync(descriptor: int) -> None:
        if not left[0]:
            raise OSError(5, "Input/output error")
        left[0] -= 1
        whole(descriptor)

    with dead_engine(config) as dead:
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        with pytest.raises(StoreError) as caught:
            dead.mark_outdated()
        assert isinstance(caught.value, NbdMirrorError)
        with pytest.raises(StoreError):
            dead.mark_outdated()
    first, second = (choose(each, each).superblock for each in slots(config))
    if good_writes_count:
        assert first.data_state is DataState.OUTDATED
    else:
        assert second == before, "the second slot comes after the first one is durable"
    assert not choose(*slots(config)).fell_back, "the next engine starts with one of the two"
