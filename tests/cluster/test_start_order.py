"""Who serves after both nodes were down, in every order; and what keeps an engine from starting.

A client writes numbered blocks and remembers which ones were acknowledged: whoever serves in the
end has all of them.
"""

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import nbd
import pytest

from tests.support.cluster import Cluster, ClusterNode
from tests.support.pair import LAUNCH, ROOT

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]

BLOCK_BYTES = 4096
BLOCKS_COUNT = 1024
SLOTS = (0, 32 << 10)  # where the two superblocks of the metadata are


class Writes:
    """A client that writes until its node is gone, and what was acknowledged: block and content."""

    def __init__(self, node: ClusterNode) -> None:
        self.acknowledged: dict[int, bytes] = {}
        self.some = threading.Event()
        self._client = node.connect()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with suppress(nbd.Error):
            for number in itertools.count():
                block = number % BLOCKS_COUNT
                content = (b"%015d\n" % number) * (BLOCK_BYTES // 16)
                # From here on either is right, until it is acknowledged.
                self.acknowledged.pop(block, None)
                self._client.pwrite(content, block * BLOCK_BYTES)
                self.acknowledged[block] = content
                if number > BLOCKS_COUNT // 4:
                    self.some.set()

    def ended(self) -> None:
        """Wait until it has noticed."""
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert len(self.acknowledged) > BLOCKS_COUNT // 8

    def require_all(self, node: ClusterNode) -> None:
        """Everything that was acknowledged is there."""
        client = node.connect()
        for block, content in self.acknowledged.items():
            assert client.pread(BLOCK_BYTES, block * BLOCK_BYTES) == content, block


@contextmanager
def written(node: ClusterNode) -> Iterator[Writes]:
    """The body ends whatever serves there, while it is written to."""
    writes = Writes(node)
    assert writes.some.wait(60)
    yield writes
    writes.ended()


def test_after_clean_stops() -> None:
    """Breaks in the field: after maintenance an old copy serves, or the newest one waits for a node
    that is switched off.
    """
    with Cluster() as c:
        c.start()
        c.alpha.order("stop")
        c.beta.is_now("ALONE")
        c.beta.connect().pwrite(b"n" * 512, 0)
        c.beta.order("stop")
        c.beta.rests("STOP", "stopped")

        # The one that stopped first is stale: it waits, says why, and is filled.
        c.alpha.order("start")
        status = c.alpha.rests("WAIT", "waits for contact")
        assert status["reason"] == "beta is stopped: `nbdmirror start` there"
        assert "start the other node" in status["remedy"]
        assert "`nbdmirror prim --force`" in status["remedy"]
        assert "known to be behind" in str(status["explain"])
        # Its controller is started again meanwhile: as before.
        c.alpha.kill()
        c.alpha.up()
        c.alpha.wait(lambda s: s["role"] == "WAIT" and s["peer"]["heard"], "as before")
        c.beta.order("start")
        c.in_sync(c.beta)
        assert c.beta.connect().pread(512, 0) == b"n" * 512

        # The other order: the one that stopped last serves at once.
        c.alpha.order("stop")
        c.alpha.rests("STOP", "stopped")
        c.beta.is_now("ALONE")
        c.beta.order("stop")
        c.beta.rests("STOP", "stopped")
        c.beta.order("start")
        c.beta.is_now("ALONE")
        c.alpha.order("start")
        c.in_sync(c.beta)
        c.assert_equal()


@pytest.mark.parametrize("first", ["alpha", "beta"])
def test_both_nodes_are_lost_at_once(first: str) -> None:
    """Breaks in the field: after a power failure of the rack both serve, or nobody, or writes are
    missing; or the first server that is up serves without knowing what the other one has.
    """
    with Cluster() as c:
        c.start()
        with written(c.alpha) as writes:
            for node in c.both:
                node.lose()
        one, other = (c.alpha, c.beta) if first == "alpha" else (c.beta, c.alpha)
        one.up()
        status = one.wait(lambda s: s["row"] == "waits", "it waits for the other one")
        assert status["role"] == "WAIT"
        assert "start the other node" in status["remedy"]
        assert "`nbdmirror prim" in status["remedy"]
        other.up()
        # By election: the last primary.
        c.in_sync(c.alpha)
        writes.require_all(c.alpha)
        c.alpha.wait(lambda _: len(promoted(c.alpha)) == 2, "told")
        assert "both name this one" in promoted(c.alpha)[-1]
        assert not promoted(c.beta)


def promoted(node: ClusterNode) -> list[str]:
    """Why it became primary, each time."""
    return [e["reason"] for e in node.told("decision") if e["step"] == "promote"]


def test_both_engines_are_lost_at_once() -> None:
    """Breaks in the field: as before, where only the engines die, by the same bug on both nodes."""
    with Cluster() as c:
        c.start()
        with written(c.alpha) as writes:
            for node in c.both:
                node.kill_engine()
        c.alpha.wait(lambda s: s["role"] in ("PRIM", "SECOND"), "both are there again")
        primary = c.alpha if c.alpha.is_now("PRIM", "SECOND")["role"] == "PRIM" else c.beta
        c.in_sync(primary)
        writes.require_all(primary)


def test_one_controller_one_engine() -> None:
    """Breaks in the field: two controllers, or an engine that somebody started by hand, command one
    copy of the data; or the attempt makes the one that works unreachable.
    """
    with Cluster() as c:
        c.create()
        c.alpha.up()
        engine = [sys.executable, "-c", LAUNCH, str(c.alpha.config_path), "alpha"]
        refused(c.alpha.command())
        refused(engine)
        c.alpha.order("start")
        c.alpha.is_now("ALONE")
        refused(c.alpha.command())
        pid = c.alpha.engine_pid()
        c.alpha.signal(signal.SIGTERM)
        assert c.alpha.ended() == 0
        refused(engine, "an engine whose launcher was killed still has this mirror")
        c.alpha.up()
        c.alpha.is_now("ALONE")
        assert c.alpha.engine_pid() == pid


def refused(
    words: list[str], why: str = "of this mirror runs on this node already; `nbdmirror status`"
) -> None:
    """A program that is not to start beside what runs already."""
    done = subprocess.run(
        words,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 13, done.stderr
    assert why in done.stderr


def test_an_engine_that_cannot_start_is_given_up() -> None:
    """Breaks in the field: an engine whose metadata is damaged is started for ever, and nobody is
    told that the copy is not served.
    """
    with Cluster() as c:
        c.start()
        c.beta.order("stop")
        c.beta.rests("STOP", "stopped")
        meta = c.beta.config.metadata_file
        good = meta.read_bytes()
        damaged = bytearray(good)
        for slot in SLOTS:
            damaged[slot : slot + 4096] = bytes(4096)
        meta.write_bytes(damaged)
        c.beta.order("start")
        status = c.beta.rests("WAIT", "given up")
        assert "was started 4 times within 10 minutes" in status["reason"]
        assert "its log is" in status["reason"]
        assert status["remedy"] == "look at the log of the engine, then `nbdmirror start`"
        log = (c.beta.config.me.run_dir / "engine.log").read_text()
        assert log.count("slot 0: superblock: never written") == 4, log
        c.alpha.is_now("ALONE")
        meta.write_bytes(good)
        c.beta.order("start")
        c.in_sync(c.alpha)
