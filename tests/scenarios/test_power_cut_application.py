"""The power fails under an application: ext4 on the export, SQLite in it, each commit synced.

Each commit that SQLite reports was flushed through file system, loop device, NBD and both nodes,
each of which lies on a disk of its own that loses what was not flushed (tests/support/powercut.py).
The ledger of what was reported is kept outside. An engine is stopped before its disk is cut, as a
machine without power does nothing more.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.application import FAILED, Attached, Writer, require_rows
from tests.support.fixtures import MakePair, Powered, powered_pair

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.usefixtures("require_root")]

DEVICE_BYTES = 48 << 20
DISK_BYTES = 96 << 20
COMMITS = 40


@pytest.fixture
def powered(tmp_path: Path, make_pair: MakePair) -> Iterator[Powered]:
    """A pair in sync, each node on a disk of its own whose power can be cut."""
    keys: dict[str, object] = {"ack_timeout_ms": 20_000}
    with powered_pair(
        tmp_path, make_pair, disk_bytes=DISK_BYTES, size=DEVICE_BYTES, engine=keys
    ) as made:
        yield made


def power_off(powered: Powered, *names: str) -> None:
    """These nodes do nothing more, and have what is on their platters."""
    pair, disks = powered
    lost = [engine for engine in pair.both if engine.name in names]
    for engine in lost:
        engine.freeze()
    for name in names:
        disks[name].cut()
    for engine in lost:
        engine.kill()


def test_commits_survive_the_power_of_one_node(powered: Powered, tmp_path: Path) -> None:
    """Breaks in the field: a server loses its power, the database opens on the other one, and a
    payment that was confirmed to the customer is not in it.
    """
    pair, disks = powered
    alpha, beta = pair.both
    ledger: list[int] = []
    with Attached(alpha, tmp_path / "a", make=True) as attached:
        writer = Writer(attached.database, "wal", ledger)
        writer.wait(COMMITS)
        power_off(powered, "alpha")
        assert writer.ended() == FAILED
    beta.wait_state(lambda s: s["session"] is None, "alpha is gone")
    beta.command("promote")
    with Attached(beta, tmp_path / "b") as attached:
        assert require_rows(attached.database, ledger) >= COMMITS
        ledger[:] = range(1, require_rows(attached.database, ledger) + 1)
        writer = Writer(attached.database, "wal", ledger)
        writer.wait(COMMITS // 2)
        disks["alpha"].restore()
        alpha.start()
        pair.synced()
        writer.wait(COMMITS // 2)
        assert writer.stop() == 0
        require_rows(attached.database, ledger)
        attached.check()
    beta.command("drain")
    pair.stop()
    pair.assert_equal()


def test_commits_survive_the_power_of_both_nodes(powered: Powered, tmp_path: Path) -> None:
    """Breaks in the field: the power of the whole house fails, both servers come back equal, and
    the database lacks commits that were fsynced.
    """
    pair, disks = powered
    alpha = pair.alpha
    ledger: list[int] = []
    with Attached(alpha, tmp_path / "a", make=True) as attached:
        writer = Writer(attached.database, "delete", ledger)
        writer.wait(COMMITS)
        power_off(powered, "alpha", "beta")
        assert writer.ended() == FAILED
    for disk in disks.values():
        disk.restore()
    for engine in pair.both:
        engine.start()
    pair.synced()
    pair.assert_equal()
    alpha.command("promote")
    pair.synced()
    with Attached(alpha, tmp_path / "a") as attached:
        assert require_rows(attached.database, ledger) >= COMMITS
        attached.check()
    alpha.command("drain")
    pair.stop()
    pair.assert_equal()
