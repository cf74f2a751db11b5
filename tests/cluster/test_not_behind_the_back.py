"""What an operator, a paused controller or a hung engine must not lead to."""

import os
import signal
import subprocess

import pytest

from nbdmirror.errors import RefusedError
from tests.support.cluster import Cluster
from tests.support.network import Network

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]
net = pytest.mark.net


def test_an_order_to_serve_does_not_lie_in_wait() -> None:
    """Breaks in the field: two operators, two orders; hours later a node that is cut off takes the
    role without silence, arbiter or anybody.
    """
    with Cluster() as c:
        c.start()
        c.alpha.order("stop", both=True)
        for node in c.both:
            node.wait(lambda s: s["role"] == "STOP", "stopped")
        c.alpha.order("start")
        c.beta.order("prim")
        for node in c.both:
            node.is_now("PRIM", "SECOND")
        for node in c.both:
            node.wait(lambda s: s["order"] is None, "no order is left")


def test_the_secondary_starts_alone_after_both_were_stopped() -> None:
    """Breaks in the field: the one server that is left is stopped again at each start."""
    with Cluster() as c:
        c.start()
        c.alpha.order("stop", both=True)
        for node in c.both:
            node.wait(lambda s: s["role"] == "STOP", "stopped")
        c.beta.order("start")
        c.beta.wait(lambda s: s["engine"] is not None and s["wanted"], "it runs")
        c.alpha.order("start")
        c.alpha.is_now("PRIM", "SECOND", "ALONE")
        assert c.beta.status()["wanted"]


@net
def test_a_node_that_was_told_does_not_take_over_with_its_old_copy() -> None:
    """Breaks in the field: the peer served alone and said so on every heartbeat; when its host
    dies, the node that heard it serves what it had before.
    """
    with Network() as network, Cluster(network=network) as c:
        c.start()
        c.beta.signal(signal.SIGSTOP)
        network._rule("beta", "meta l4proto tcp counter drop")
        network._rule("alpha", "meta l4proto tcp counter drop")
        c.alpha.is_now("ALONE")
        c.beta.signal(signal.SIGCONT)
        c.beta.wait(lambda s: s["peer"]["role"] == "ALONE", "it hears that")
        c.alpha.connect().pwrite(b"n" * 4096, 0)
        c.alpha.lose()
        c.beta.rests("WAIT", "waits")
        assert "nobody knows" in c.beta.status()["reason"]


def test_a_hung_engine_is_found_by_the_next_controller_too() -> None:
    """Breaks in the field: both nodes wait for ever for an engine that only hangs."""
    with Cluster() as c:
        c.start()
        engine = c.alpha.engine_pid()
        c.alpha.kill()
        os.kill(engine, signal.SIGSTOP)
        c.alpha.up()
        c.alpha.wait(
            lambda s: s["engine"] is not None and s["engine"]["pid"] != engine, "another engine"
        )
        c.beta.is_now("PRIM", "ALONE", "SECOND")


def test_a_controller_that_hangs_is_none() -> None:
    """Breaks in the field: a primary whose controller is stuck serves without its checkers."""
    with Cluster() as c:
        c.start()
        c.alpha.signal(signal.SIGSTOP)
        c.beta.is_now("PRIM", "ALONE")
        c.alpha.signal(signal.SIGCONT)
        c.in_sync(c.beta)


def test_the_only_copy_is_not_given_up() -> None:
    """Breaks in the field: `second --force` on the wrong node, and nothing is left."""
    with Cluster() as c:
        c.create()
        for node in c.both:
            node.up()
        c.alpha.order("switch", name="failover", on=False)
        c.alpha.order("start")
        c.alpha.wait(lambda s: s["engine"] is not None, "it runs")
        with pytest.raises(RefusedError):
            c.alpha.order("second", force=True)
        state = c.alpha.wait(lambda s: s["engine"] is not None, "it runs")["engine"]
        assert state["data_state"] == "uptodate"


def test_clean_waits_for_nobody_and_ends_nothing_that_serves() -> None:
    """Breaks in the field: the service manager ends the application under a living engine."""
    with Cluster() as c:
        c.start()
        done = subprocess.run(
            [*c.alpha.enter, *c.alpha.command("--clean")], capture_output=True, check=False
        )
        assert done.returncode == RefusedError.exit_code
        c.alpha.is_now("PRIM")
