"""The power fails: what was not flushed is gone. ext4 per node, shut down without its journal."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fixtures import MakePair, Powered, powered_pair
from tests.support.load import Load

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.usefixtures("require_root")]


@pytest.fixture
def powered(tmp_path: Path, make_pair: MakePair) -> Iterator[Powered]:
    """A pair in sync, each node on a disk of its own whose power can be cut."""
    with powered_pair(tmp_path, make_pair, disk_bytes=96 << 20) as made:
        yield made


def test_primary_loses_power_other_takes_over(powered: Powered) -> None:
    """Breaks in the field: promise (a): an acknowledged write is lost with one server's power."""
    pair, disks = powered
    alpha, beta = pair.both
    load = Load(alpha.uri, depth=16).start()
    load.wait(500)
    disks["alpha"].cut()
    alpha.kill()
    load.ended()
    beta.command("promote")
    load.assert_kept(beta.data)
    load.start(beta.uri).wait(100)
    disks["alpha"].restore()
    alpha.start()
    pair.synced()
    load.wait(100)
    load.stop()
    assert not load.error
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def test_secondary_loses_power_and_returns(powered: Powered) -> None:
    """Breaks in the field: blocks that the secondary had acknowledged, not flushed, stay lost."""
    pair, disks = powered
    alpha, beta = pair.both
    load = Load(alpha.uri, depth=16).start()
    load.wait(500)
    disks["beta"].cut()
    beta.kill()
    alpha.wait_state(lambda s: s["frozen"], "frozen")
    alpha.command("alone")
    load.wait(100)
    disks["beta"].restore()
    beta.start()
    pair.synced()
    load.wait(100)
    load.stop()
    assert not load.error
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def test_both_lose_power_flushed_writes_are_there(powered: Powered) -> None:
    """Breaks in the field: promise (b): a flush does not survive the power of both."""
    pair, disks = powered
    alpha, beta = pair.both
    load = Load(alpha.uri, depth=16).start()
    load.wait(500)
    load.stop()
    handle = alpha.connect()
    handle.flush()
    after = Load(alpha.uri, first=2048, slots=512, depth=16, seed=3).start()
    after.wait(200)
    for name in ("alpha", "beta"):
        disks[name].cut()
    alpha.kill()
    beta.kill()
    after.ended()
    for disk in disks.values():
        disk.restore()
    for engine in pair.both:
        engine.start()
    pair.synced()
    # Written after the flush: any mixture, but the same on both.
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def test_resync_target_loses_power(powered: Powered) -> None:
    """Breaks in the field: a bit was cleared for a block that never got onto the target's disk."""
    pair, disks = powered
    alpha, beta = pair.both
    load = Load(alpha.uri, slots=3500, depth=16).start()
    beta.kill()
    alpha.wait_state(lambda s: s["frozen"], "frozen")
    alpha.command("alone")
    load.wait(3000)
    for _ in range(2):
        beta.start()
        alpha.wait_state(lambda s: s["session"] is not None and s["session"]["sending"], "copying")
        disks["beta"].cut()
        beta.kill()
        disks["beta"].restore()
        if alpha.wait_state(lambda s: s["session"] is None, "lost")["frozen"]:
            alpha.command("alone")
        load.wait(50)
    beta.start()
    pair.synced()
    load.stop()
    assert not load.error
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)
