"""Nobody reads what the engine says: it serves all the same."""

import contextlib
import os
import signal
from pathlib import Path

import nbd
import pytest

from tests.support.fixtures import MakePair

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]

KNOCKS_COUNT = 100


def fill(pipe: Path) -> int:
    """Leave no room in a named pipe; returns the descriptor that keeps it open, unread."""
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(descriptor, b"full\n" * 100)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(descriptor, b"\n")
    return descriptor


def test_a_stalled_journal_stops_nothing(make_pair: MakePair) -> None:
    """Breaks in the field: the journal's disk hangs, a client knocks at the secondary, and the
    mirror stands still on both nodes.
    """
    pair = make_pair().create()
    beta = pair.beta
    unread = fill(beta.log_path)
    try:
        pair.alpha.start()
        launcher = beta.launch()
        beta.wait_state(lambda _: True, "it answers")
        pair.synced()
        pair.alpha.command("promote")
        # Each is refused with lines of nbdkit's own, written in the middle of a callback.
        for _ in range(KNOCKS_COUNT):
            with pytest.raises(nbd.Error):
                nbd.NBD().connect_uri(beta.uri)
        handle = pair.alpha.connect()
        for number in range(100):
            handle.pwrite(b"x" * 4096, number * 4096)
        handle.shutdown()
        assert beta.state()["session"]["phase"] == "synced"
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(60) == 0
    finally:
        os.close(unread)
        beta.log_path.unlink()
        beta.log_path.touch()
