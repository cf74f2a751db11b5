"""Arbiters with a memory in partitions: each node is on a host of its own, and so is the etcd."""

import os
import signal
from collections.abc import Iterator

import pytest

from nbdmirror.control_client import ControlClient
from nbdmirror.errors import RefusedError
from tests.support.cluster import Cluster, ClusterNode
from tests.support.network import Switched
from tests.support.third_host import Parted, ThirdHost, section
from tests.support.volume import begin, read, write

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.net]

# The application is a file that is there while it runs.
APPLICATION = """
[application]
start = ["/bin/sh", "-c", "touch {root}/$NBDMIRROR_NODE.runs"]
stop = ["/bin/sh", "-c", "rm -f {root}/$NBDMIRROR_NODE.runs"]
"""


@pytest.fixture
def network() -> Iterator[Switched]:
    """Two nodes, and a router with the etcd."""
    with Switched() as made:
        yield made


@pytest.fixture
def c(network: Switched) -> Iterator[Parted]:
    """A pair in sync."""
    with (
        ThirdHost(network) as server,
        Parted(arbiter="etcd", more=APPLICATION + section(server), network=network) as made,
    ):
        made.start()
        yield made


def runs(c: Cluster) -> set[str]:
    """On which nodes the application runs."""
    return {node.name for node in c.both if (c.root / f"{node.name}.runs").exists()}


def test_a_cut_between_the_nodes_leaves_one(c: Parted, network: Switched) -> None:
    """Breaks in the field: with the arbiter reached by both, both go on; or neither does.

    Which one is a race that the primary wins, unless its host is busy with something else.
    """
    load = begin(c.alpha)
    network.part("alpha", "beta")
    status = c.alpha.wait(lambda s: s["row"] in ("alone", "takeover, no"), "it is decided")
    wins, waits = (c.alpha, c.beta) if status["row"] == "alone" else (c.beta, c.alpha)
    wins.is_now("ALONE")
    status = waits.wait(lambda s: s["row"] == "takeover, no", "the record says no")
    assert f"node {1 if wins is c.alpha else 2}" in status["reason"]
    assert "`nbdmirror prim --force`" in status["remedy"]
    assert runs(c) == {wins.name}
    if wins is c.alpha:
        load.wait(200)
    network.heal()
    c.in_sync(wins)
    if wins is c.alpha:
        load.wait(50)
        load.stop()
        assert not load.error
    load.assert_kept(wins.data)
    c.alpha.order("stop", both=True)
    c.alpha.rests("STOP", "stopped")
    c.beta.rests("STOP", "stopped")
    c.assert_equal()


def test_a_primary_behind_a_dead_port_gives_way(c: Parted, network: Switched) -> None:
    """Breaks in the field: the primary that sees nobody acknowledges; or nobody takes over."""
    load = begin(c.alpha)
    network.isolate("alpha")
    c.beta.is_now("ALONE")
    write(c.beta, b"z", offset=8 << 20)
    c.alpha.wait(lambda s: s["engine"]["frozen"] and s["row"] == "frozen, unknown", "it waits")
    network.heal()
    c.in_sync(c.beta)
    assert load.ended().error, "what was frozen ends as an error: outcome unknown"
    load.assert_kept(c.beta.data)
    assert read(c.beta, 8 << 20) == b"z"
    assert runs(c) == {"beta"}
    c.beta.order("stop", both=True)
    c.alpha.rests("STOP", "stopped")
    c.beta.rests("STOP", "stopped")
    c.assert_equal()


def test_a_freeze_without_an_answer_has_an_end(network: Switched) -> None:
    """Breaks in the field: a primary that sees nobody holds its clients for ever, and is not ready
    to meet its peer when the cable is back.
    """
    limit = "[engine]\nfreeze_limit_ms = 5000\n"
    with (
        ThirdHost(network) as server,
        Parted(arbiter="etcd", more=limit + section(server), network=network) as c,
    ):
        c.start()
        load = begin(c.alpha)
        network.isolate("alpha")
        c.beta.is_now("ALONE")
        c.alpha.wait(lambda s: s["row"] == "takeover, unknown", "the bound")
        assert load.ended().error
        network.heal()
        c.in_sync(c.beta)


def test_a_primary_that_slept_acknowledges_nothing(c: Parted) -> None:
    """Breaks in the field: a host that was suspended wakes up and goes on where it was, after its
    peer has taken over.
    """
    load = begin(c.alpha)
    engine = c.alpha.engine_pid()
    c.alpha.signal(signal.SIGSTOP)
    os.kill(engine, signal.SIGSTOP)
    c.beta.is_now("ALONE")
    load_there = begin(c.beta)
    os.kill(engine, signal.SIGCONT)
    c.alpha.signal(signal.SIGCONT)
    c.in_sync(c.beta)
    assert load.ended().error
    load_there.wait(50)
    load_there.stop()
    assert not load_there.error
    assert runs(c) == {"beta"}
    load_there.assert_kept(c.alpha.data, c.beta.data)


def test_an_operator_forces_against_the_record(c: Parted, network: Switched) -> None:
    """Breaks in the field: the owner of the record is gone for good, and nobody can serve; or the
    one that was forced over returns, and both serve.
    """
    load = begin(c.alpha)
    c.beta.signal(signal.SIGSTOP)  # who is first is not what this is about
    network.part("alpha", "beta")
    c.alpha.is_now("ALONE")
    c.beta.signal(signal.SIGCONT)
    c.beta.wait(lambda s: s["row"] == "takeover, no", "the record says no")
    load.stop()
    write(c.alpha, b"o")
    network.isolate("alpha")
    c.beta.order("prim", force=True)
    status = c.beta.is_now("ALONE")
    c.beta.wait(lambda s: s["arbiter"]["record"]["owner"] == "beta", "the record is replaced")
    write(c.beta, b"n")
    assert status["wanted"]
    network.part("alpha", "beta")
    # It sees the record again, and nothing else.
    c.alpha.wait(lambda s: s["role"] == "WAIT", "it gives way")
    assert runs(c) == {"beta"}
    network.heal()
    c.alpha.wait(lambda s: bool(s["engine"]) and "split" in s["engine"]["flags"], "a split brain")
    c.alpha.order("second", force=True)
    c.in_sync(c.beta)
    assert read(c.beta) == b"n"


def reserve(node: ClusterNode) -> None:
    """A claim that a controller has prepared, and of which nobody knows how it ended."""
    with ControlClient(node.config.control_socket, 10) as engine:
        now = engine.call("state")
        guard = {"instance": now["instance"], "epoch": now["epoch"]}
        engine.call("claim", **guard, generation=now["generation"])


def test_a_copy_is_not_given_up_while_it_may_own_the_record(network: Switched) -> None:
    """Breaks in the field: `second --force` while a claim of this node is on its way; it is done
    later, the record names a node without a copy, and the other one may not serve.
    """
    with (
        ThirdHost(network) as server,
        Parted(arbiter="etcd", more=section(server), network=network) as c,
    ):
        c.start()
        with server.frozen():
            c.alpha.signal(signal.SIGSTOP)  # else it asks beta to leave
            network.cut_streams()
            c.beta.wait(lambda s: s["engine"]["session"] is None, "the engines have parted")
            c.beta.kill()
            reserve(c.beta)
            c.alpha.signal(signal.SIGCONT)
            c.beta.up()
            c.beta.wait(lambda s: s["peer"]["heard"] and s["engine"] is not None, "as it was")
            with pytest.raises(RefusedError, match="has asked the arbiter for the right"):
                c.beta.order("second", force=True)
            assert c.beta.status()["engine"]["claim_unsettled"]
        c.beta.wait(lambda s: not s["engine"]["claim_unsettled"], "settled")
