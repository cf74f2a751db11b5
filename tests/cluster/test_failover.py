"""The table of what is killed and what happens, with real controllers and engines.

docs/architecture.md has the table. Each row here: who serves afterwards, without a command.
"""

import os
import signal

import pytest

from tests.support.cluster import Cluster

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]


def test_engine_of_a_primary_with_its_peer_dies() -> None:
    """Breaks in the field: the application stays down although the other node has every write."""
    with Cluster() as c:
        c.start()
        client = c.alpha.connect()
        client.pwrite(b"a" * 4096, 0)
        c.alpha.kill_engine()
        c.beta.is_now("ALONE", "PRIM")
        assert c.beta.connect().pread(4096, 0) == b"a" * 4096
        c.in_sync(c.beta)
        c.assert_equal()


def test_engine_of_a_secondary_dies() -> None:
    """Breaks in the field: the death of the standby stops the application."""
    with Cluster() as c:
        c.start()
        client = c.alpha.connect()
        c.beta.kill_engine()
        client.pwrite(b"b" * 4096, 4096)
        c.in_sync(c.alpha)
        client.flush()
        c.assert_equal()


def test_engine_of_a_lonely_primary_dies() -> None:
    """Breaks in the field: the only copy that is complete waits for one that is not."""
    with Cluster() as c:
        c.start()
        c.beta.order("stop")
        c.alpha.is_now("ALONE")
        c.alpha.connect().pwrite(b"c" * 4096, 0)
        before = c.alpha.kill_engine()
        c.alpha.wait(lambda s: s["engine"] is not None and s["engine"]["pid"] != before, "again")
        c.alpha.is_now("ALONE")
        assert c.alpha.connect().pread(4096, 0) == b"c" * 4096


def test_both_processes_of_a_primary_die() -> None:
    """Breaks in the field: a host that is lost takes the application with it."""
    with Cluster() as c:
        c.start()
        c.alpha.connect().pwrite(b"d" * 4096, 0)
        c.alpha.lose()
        c.beta.is_now("ALONE")
        assert c.beta.connect().pread(4096, 0) == b"d" * 4096
        c.alpha.up()
        c.in_sync(c.beta)


def test_both_processes_of_a_secondary_die() -> None:
    """Breaks in the field: a lost standby freezes the application for ever."""
    with Cluster() as c:
        c.start()
        client = c.alpha.connect()
        c.beta.lose()
        client.pwrite(b"e" * 4096, 0)
        c.alpha.is_now("ALONE")
        c.beta.up()
        c.in_sync(c.alpha)
        client.flush()
        c.assert_equal()


def test_a_killed_controller_moves_nothing() -> None:
    """Breaks in the field: a crash of what only watches costs a failover."""
    with Cluster() as c:
        c.start()
        client = c.alpha.connect()
        engine = c.alpha.engine_pid()
        for node in c.both:
            node.kill()
        client.pwrite(b"f" * 4096, 0)
        for node in c.both:
            node.up()
        c.in_sync(c.alpha)
        assert c.alpha.engine_pid() == engine
        client.pwrite(b"g" * 4096, 0)
        assert not c.beta.told("engine-ended")


def test_an_engine_that_lost_its_controller_hands_over() -> None:
    """Breaks in the field: a primary that nobody watches serves on, and nobody restarts its
    application when it fails.
    """
    with Cluster() as c:
        c.start()
        c.alpha.kill()
        c.beta.is_now("PRIM", "ALONE")
        c.alpha.up()
        c.in_sync(c.beta)


def test_a_frozen_engine_is_replaced() -> None:
    """Breaks in the field: an engine that hangs in the kernel holds the application for ever."""
    with Cluster() as c:
        c.start()
        os.kill(c.alpha.engine_pid(), signal.SIGSTOP)
        c.beta.is_now("ALONE", "PRIM")
        c.in_sync(c.beta)
