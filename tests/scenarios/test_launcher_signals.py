"""What a terminal or a service manager sends to the launcher and its group, and hands on to it."""

import os
import select
import signal

import pytest

from nbdmirror.core.superblock import DataState, choose
from nbdmirror.errors import RefusedError
from nbdmirror.metastore import FileMetaStore
from tests.support.fixtures import MakePair
from tests.support.load import Load
from tests.support.pair import Pair

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    """A pair in sync whose launchers lead a process group each."""
    pair = make_pair()
    for engine in pair.both:
        engine.enter = ("setsid",)
    return pair.up()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_group_stops_in_order(pair: Pair, number: int) -> None:
    """Breaks in the field: Ctrl-C or a closed terminal is a crash of the primary; its peer freezes,
    and whether the page cache can be trusted is asked at every start.
    """
    alpha, beta = pair.both
    load = Load(alpha.uri).start()
    load.wait(50)
    load.stop()
    assert alpha.launcher is not None
    os.killpg(alpha.launcher.pid, number)
    assert alpha.ended() == 0, alpha.log()
    meta = FileMetaStore.open_to_read(alpha.config.metadata_file, locked=True)
    state = choose(*meta.read_slots()).superblock.data_state
    meta.close()
    assert state is DataState.OUTDATED, "the peer was asked, and stays"
    load.assert_kept(beta.data)
    assert beta.command("promote")["role"] == "primary"


def test_an_engine_that_outlives_its_launcher_keeps_its_sockets(pair: Pair) -> None:
    """Breaks in the field: a launcher dies beside an engine that hangs, and the next launcher takes
    the sockets away from the engine that still has the mirror.
    """
    alpha, beta = pair.both
    assert alpha.launcher is not None
    before = alpha.config.export_unix.stat().st_ino
    alpha.freeze()
    descriptor = os.pidfd_open(alpha.pid)
    try:
        alpha.launcher.kill()
        alpha.launcher.wait(60)
        alpha.launcher = None
        assert alpha.start_refused() == RefusedError.exit_code
        assert "still has this mirror" in alpha.log()
        assert alpha.config.export_unix.stat().st_ino == before
        alpha.thaw()
        assert select.select([descriptor], [], [], 60)[0], "it ends with its launcher"
    finally:
        os.close(descriptor)
    alpha.pid = 0
    alpha.start()
    alpha.wait_state(lambda s: s["session"] is not None, "a session")
    assert beta.state()["session"] is not None


def test_a_witness_that_is_overridden_is_told(make_pair: MakePair) -> None:
    """Breaks in the field: a variable that was left over from a test makes a node believe a page
    cache that a power failure has emptied, and nobody ever learns why.
    """
    alpha = make_pair().create().alpha
    alpha.enter = ("env", "NBDMIRROR_BOOT_ID_FILE=/proc/sys/kernel/random/boot_id")
    alpha.start()
    assert "rule 12" in str(alpha.wait_event("witness")["reason"])
    alpha.stop()
    assert "NBDMIRROR_BOOT_ID_FILE=/proc/sys/kernel/random/boot_id stands for" in alpha.log()
