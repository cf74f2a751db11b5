"""What every implementation of the port `MetaStore` keeps, and what a file of it adds."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdmirror.core.dirtymap import DirtyMap
from nbdmirror.core.intentlog import IntentLog
from nbdmirror.core.superblock import choose, log_generations
from nbdmirror.errors import MetadataError, RefusedError, StoreError
from nbdmirror.limits import LOG_OFFSET_BYTES, MAP_OFFSET_BYTES, META_BLOCK_BYTES
from nbdmirror.metastore import FileMetaStore
from nbdmirror.metastore import create as create_metadata
from tests.contract.conftest import (
    file_size_limit,
    first_superblock,
    make_meta,
    no_writes_beyond,
    reopened,
)


def test_a_new_file_is_clean(meta: Any) -> None:
    """If this fails, a new mirror begins with a full resync, or trusts an empty file."""
    chosen = choose(*meta.read_slots())
    assert (chosen.superblock, chosen.slot, chosen.notes) == (first_superblock(), 0, ())
    geometry = chosen.superblock.geometry()
    log = IntentLog(geometry, chosen.superblock.map_id)
    loaded = log.load(meta.read_ring(), log_generations(chosen.superblock))
    assert (loaded.damaged, loaded.hot, loaded.txn) == (False, frozenset(), 0)
    dirty = DirtyMap(geometry, chosen.superblock.map_id)
    assert dirty.load(meta.read_map()) == []
    assert not dirty.any()


def test_a_superblock_is_in_both_slots(meta: Any) -> None:
    """If this fails, one bad sector takes a state back that somebody relied on."""
    wanted = replace(first_superblock(), sequence=2, term=7)
    meta.write_superblock(wanted)
    first, second = meta.read_slots()
    assert first == second
    assert choose(first, second).superblock == wanted


def test_a_gap_in_the_sequence_is_a_bug(meta: Any) -> None:
    """If this fails, a crash between the slots looks like a lost write and holds the node back."""
    for sequence in (1, 3):
        with pytest.raises(AssertionError):
            meta.write_superblock(replace(first_superblock(), sequence=sequence))


def test_one_state_follows_another(meta: Any) -> None:
    """If this fails, an engine can store its first change of state and no other after it."""
    for sequence in (2, 3, 4):
        meta.write_superblock(replace(first_superblock(), sequence=sequence))
        assert choose(*meta.read_slots()).superblock.sequence == sequence
    with pytest.raises(AssertionError):
        meta.write_superblock(replace(first_superblock(), sequence=4))


def test_blocks_are_read_back(meta: Any) -> None:
    """If this fails, intents or dirty pages land elsewhere and the resync copies too little."""
    log_block, page = b"l" * META_BLOCK_BYTES, b"p" * META_BLOCK_BYTES
    meta.write_blocks([(LOG_OFFSET_BYTES + META_BLOCK_BYTES, log_block), (MAP_OFFSET_BYTES, page)])
    assert meta.read_ring()[META_BLOCK_BYTES : 2 * META_BLOCK_BYTES] == log_block
    assert next(iter(meta.read_map())) == page
    assert choose(*meta.read_slots()).superblock == first_superblock()


def test_blocks_never_reach_the_superblocks(meta: Any) -> None:
    """If this fails, a wrong offset of the log destroys the identity of the node."""
    for offset in (0, LOG_OFFSET_BYTES - META_BLOCK_BYTES, LOG_OFFSET_BYTES + 1, 1 << 40):
        with pytest.raises(AssertionError):
            meta.write_blocks([(offset, bytes(META_BLOCK_BYTES))])


def test_what_was_written_is_there_after_reopening(meta: Any) -> None:
    """If this fails, the sequence starts again and the next state is refused as rolled back."""
    meta.write_superblock(replace(first_superblock(), sequence=2))
    again = reopened(meta)
    again.write_superblock(replace(first_superblock(), sequence=3))
    assert choose(*again.read_slots()).superblock.sequence == 3
    again.close()


def test_slot_0_is_written_first(meta: Any) -> None:
    """If this fails, a crash between the slots leaves a picture that is refused as impossible."""
    wanted = replace(first_superblock(), sequence=2)
    with no_writes_beyond(meta, 2 * META_BLOCK_BYTES), pytest.raises(StoreError, match="EFBIG"):
        meta.write_superblock(wanted)
    chosen = choose(*meta.read_slots())
    assert (chosen.superblock, chosen.slot, chosen.fell_back) == (wanted, 0, False)
    assert choose(meta.read_slots()[1], meta.read_slots()[1]).superblock == first_superblock()


def test_a_failed_write_fails_for_ever(meta: Any) -> None:
    """If this fails, an engine goes on with metadata that has a hole in its history."""
    block = [(MAP_OFFSET_BYTES, bytes(META_BLOCK_BYTES))]
    with no_writes_beyond(meta, META_BLOCK_BYTES), pytest.raises(StoreError, match="EFBIG"):
        meta.write_blocks(block)
    with pytest.raises(StoreError, match="failed before"):
        meta.write_blocks(block)
    with pytest.raises(StoreError, match="failed before"):
        meta.write_superblock(replace(first_superblock(), sequence=2))
    assert choose(*meta.read_slots()).superblock == first_superblock()


def test_a_second_opener_is_told_who_has_it(tmp_path: Path) -> None:
    """If this fails, two engines write one mirror's metadata."""
    meta = make_meta(tmp_path)
    with pytest.raises(RefusedError, match=rf"process {os.getpid()}\b"):
        FileMetaStore.open(meta.path)
    reader = FileMetaStore.open_to_read(meta.path, locked=False)
    assert reader.read_slots() == meta.read_slots()
    reader.close()
    meta.close()


def test_a_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """If this fails, a script started by the engine blocks the restart of the engine."""
    meta = make_meta(tmp_path)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False) as child:
        meta.close()
        FileMetaStore.open(tmp_path / "meta").close()
        child.communicate()


def test_a_file_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    """If this fails, a cut map counts as clean and the resync copies too little."""
    make_meta(tmp_path).close()
    path = tmp_path / "meta"
    size = path.stat().st_size
    for wrong in (size + META_BLOCK_BYTES, size - 1, size - META_BLOCK_BYTES, 0):
        os.truncate(path, wrong)
        with pytest.raises(MetadataError, match="bytes"):
            FileMetaStore.open(path)
    with pytest.raises(MetadataError, match="metadata create"):
        FileMetaStore.open(tmp_path / "other")


def test_create_overwrites_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    """If this fails, a second `create` wipes what a node knows, or half a file looks like one."""
    superblock = first_superblock()
    with file_size_limit(MAP_OFFSET_BYTES), pytest.raises(StoreError, match="EFBIG"):
        create_metadata(tmp_path / "meta", superblock, superblock.geometry())
    assert not list(tmp_path.iterdir())
    make_meta(tmp_path).close()
    before = (tmp_path / "meta").read_bytes()
    with pytest.raises(RefusedError, match="not overwritten"):
        create_metadata(tmp_path / "meta", superblock, superblock.geometry())
    assert (tmp_path / "meta").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "meta"]


def test_every_byte_is_written_at_creation(tmp_path: Path) -> None:
    """If this fails, marking a region for the first time can run out of space."""
    meta = make_meta(tmp_path)
    assert os.lseek(meta.fileno(), 0, os.SEEK_HOLE) == meta.size_bytes
    assert (tmp_path / "meta").stat().st_blocks * 512 >= meta.size_bytes
    meta.close()
