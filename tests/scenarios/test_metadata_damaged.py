"""Metadata that is torn, damaged or gone: never "clean", never guessed."""

import os
import random
from pathlib import Path

import pytest

from nbdmirror import admin
from nbdmirror.errors import RefusedError
from nbdmirror.limits import (
    LOG_BLOCKS_COUNT,
    LOG_OFFSET_BYTES,
    MAP_OFFSET_BYTES,
    META_BLOCK_BYTES,
    SUPERBLOCK_SLOT_OFFSETS_BYTES,
)
from tests.support.load import Load
from tests.support.pair import Pair

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]


def damage(path: Path, offset: int, count: int = META_BLOCK_BYTES) -> None:
    """Write garbage over part of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(random.Random(3).randbytes(count))


def killed_alone(pair: Pair) -> Load:
    """Alpha ALONE with dirty extents, both killed; returns the load that alpha acknowledged."""
    alpha, beta = pair.both
    load = Load(alpha.uri, depth=8).start()
    load.wait(50)
    beta.kill()
    alpha.wait_state(lambda s: s["frozen"], "frozen")
    alpha.command("alone")
    load.wait(200)
    alpha.kill()
    load.ended()
    return load


def back_in_sync(pair: Pair, load: Load) -> None:
    """Start both, and see that nothing was lost and nothing differs."""
    for engine in pair.both:
        if not engine.pid:
            engine.start()
    pair.synced()
    pair.stop()
    pair.assert_equal()
    load.assert_kept(pair.alpha.data, pair.beta.data)


@pytest.mark.parametrize("slot", [0, 1])
def test_one_torn_slot_falls_back(pair: Pair, slot: int) -> None:
    """Breaks in the field: a torn superblock stops the node, or makes it forget what it knew."""
    alpha, beta = pair.both
    load = killed_alone(pair)
    damage(alpha.config.metadata_file, SUPERBLOCK_SLOT_OFFSETS_BYTES[slot], 512)
    alpha.start()
    beta.start()
    if alpha.state()["fell_back"]:
        # A newer state may have existed and been relied on: an operator has to say that it did not.
        with pytest.raises(RefusedError, match="metadata"):
            alpha.command("promote")
        alpha.wait_state(lambda s: "fall back" in s["refusal"], "refused with the reason")
        alpha.command("promote", force=True)
    back_in_sync(pair, load)


def test_both_slots_torn_is_refused(pair: Pair) -> None:
    """Breaks in the field: a node without a past starts as if it had one."""
    alpha = pair.alpha
    killed_alone(pair)
    for offset in SUPERBLOCK_SLOT_OFFSETS_BYTES:
        damage(alpha.config.metadata_file, offset)
    assert alpha.start_refused() == 12
    assert str(alpha.config.metadata_file) in alpha.log() or "metadata" in alpha.log()


def test_damaged_map_means_dirty(pair: Pair) -> None:
    """Breaks in the field: an unreadable map counts as "nothing changed", and the copies differ."""
    load = killed_alone(pair)
    damage(pair.alpha.config.metadata_file, MAP_OFFSET_BYTES)
    back_in_sync(pair, load)
    notes = [str(e) for e in pair.alpha.events if e["event"] == "metadata"]
    assert any("dirty map" in note for note in notes), notes


def test_damaged_intent_log_means_dirty(pair: Pair) -> None:
    """Breaks in the field: writes that were in flight at the crash differ for ever."""
    load = killed_alone(pair)
    damage(pair.alpha.config.metadata_file, LOG_OFFSET_BYTES, LOG_BLOCKS_COUNT * META_BLOCK_BYTES)
    back_in_sync(pair, load)
    notes = [str(e) for e in pair.alpha.events if e["event"] == "metadata"]
    assert any("everything is dirty" in note for note in notes), notes


def test_data_file_that_was_cut_is_refused(pair: Pair) -> None:
    """Breaks in the field: a truncated image is served with an end that is not there."""
    alpha = pair.alpha
    pair.stop()
    os.truncate(alpha.data, pair.size // 2)
    assert alpha.start_refused() == 12
    assert "was cut" in alpha.log()


def test_blank_disk_returns_as_joiner(pair: Pair) -> None:
    """Breaks in the field: a replaced disk cannot come back, comes back unasked, or wins."""
    alpha, beta = pair.both
    load = Load(alpha.uri, depth=8).start()
    load.wait(200)
    beta.kill()
    alpha.wait_state(lambda s: s["frozen"], "frozen")
    alpha.command("alone")
    beta.data.unlink()
    beta.config.metadata_file.unlink()
    admin.create(beta.config, pair.size, join=True, adopt=False, sparse=False)
    load.wait(50)
    beta.start()
    alpha.wait_state(lambda s: "accept-peer" in s["refusal"], "the new identity refused")
    alpha.command("accept-peer")
    pair.synced()
    load.stop()
    assert not load.error
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)
