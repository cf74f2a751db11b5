"""Who goes on when the network parts, with the arbiter ping and with an operator as arbiter.

The four cases of isolation are those of docs/controller.md: the nodes see each other or not, and
each sees the router or not. Each node is on a host of its own, and so is the router.
"""

from collections.abc import Iterator

import pytest

from tests.support.cluster import Cluster, ClusterNode, Status
from tests.support.load import Load
from tests.support.network import ROUTER, WIRES, Switched

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.net]

ROUTER_ADDRESS = WIRES["cable"][ROUTER]
NOBODY = "192.0.2.253"
# The application is a file that is there while it runs.
APPLICATION = """
[application]
start = ["/bin/sh", "-c", "touch {root}/$NBDMIRROR_NODE.runs"]
stop = ["/bin/sh", "-c", "rm -f {root}/$NBDMIRROR_NODE.runs"]
"""
PING = f"""
[ping]
addresses = ["{NOBODY}", "{ROUTER_ADDRESS}"]
"""
SLOT_BYTES = 4096


@pytest.fixture
def network() -> Iterator[Switched]:
    """Two nodes and a router."""
    with Switched() as made:
        yield made


@pytest.fixture
def c(network: Switched) -> Iterator[Cluster]:
    """A pair in sync; one of the two addresses that its arbiter pings is nobody's."""
    with Cluster(arbiter="ping", more=APPLICATION + PING, network=network) as made:
        yield made.start()


def begin(node: ClusterNode) -> Load:
    """A client that writes on this node."""
    load = Load(f"nbd+unix:///?socket={node.config.export_unix}", first=1, slots=256)
    load.start().wait(50)
    return load


def runs(c: Cluster) -> set[str]:
    """On which nodes the application runs."""
    return {node.name for node in c.both if (c.root / f"{node.name}.runs").exists()}


def frozen_ms(node: ClusterNode) -> float:
    """How long its clients waited, from the first step after the loss of the channel."""
    taken = {e["step"]: e["at_ms"] for e in node.told("decision")}
    return float(taken["go on alone"] - taken["ask the peer to leave"])


def hears_the_router_again(node: ClusterNode) -> None:
    """Wait until the newest answer of the arbiter is another one than silence."""

    def echo(_: Status) -> bool:
        said = [e["reason"] for e in node.told("note") if e["reason"].startswith("arbiter ping: ")]
        return bool(said) and "no echo" not in said[-1]

    node.wait(echo, "an echo is back")


def test_a_cut_between_the_nodes_alone_is_a_split_brain(c: Cluster, network: Switched) -> None:
    """Breaks in the field: after the one cut that `ping` cannot judge, the writes of one side
    vanish without a word, or both nodes serve on for ever.
    """
    load = begin(c.alpha)
    network.part("alpha", "beta")
    c.alpha.is_now("ALONE")
    c.beta.is_now("ALONE")
    assert runs(c) == {"alpha", "beta"}, "documented: not safe when both see the router"
    load.wait(50)
    c.beta.connect().pwrite(b"b" * SLOT_BYTES, 0)
    c.alpha.connect().pwrite(b"a" * SLOT_BYTES, 0)
    network.heal()
    waits = c.beta.wait(
        lambda s: s["service"]["state"] == "down" and "Split brain" in s["reason"], "it gives way"
    )
    assert waits["role"] == "WAIT"
    assert "nbdmirror second --force" in waits["remedy"]
    assert any("Split brain" in sentence for sentence in waits["explain"])
    load.wait(50)
    load.stop()
    assert not load.error
    goes_on = c.alpha.is_now("ALONE")
    assert "Split brain" in goes_on["reason"]
    assert runs(c) == {"alpha"}
    assert c.beta.data.read_bytes()[:SLOT_BYTES] == b"b" * SLOT_BYTES, "both copies are kept"
    assert c.alpha.data.read_bytes()[:SLOT_BYTES] == b"a" * SLOT_BYTES

    c.beta.order("second", force=True)
    c.in_sync(c.alpha)
    c.assert_equal()
    load.assert_kept(c.alpha.data, c.beta.data)


def test_a_node_that_is_cut_off_does_not_serve(c: Cluster, network: Switched) -> None:
    """Breaks in the field: a node behind a dead switch port serves, and so does the other one.

    First it is the primary, then, with the roles exchanged by that, the secondary.
    """
    load = begin(c.alpha)
    network.isolate("alpha")
    c.beta.is_now("ALONE")
    waits = c.alpha.rests("WAIT", "takeover, no")
    assert NOBODY in waits["reason"]
    assert ROUTER_ADDRESS in waits["reason"], "silence of all addresses is the no"
    assert "nbdmirror prim" in waits["remedy"]
    assert load.ended().error, "the frozen writes of the old primary end as errors"
    assert runs(c) == {"beta"}
    c.beta.connect().pwrite(b"n" * SLOT_BYTES, 0)
    network.heal()
    c.in_sync(c.beta)
    assert runs(c) == {"beta"}
    c.assert_equal()
    load.assert_kept(c.alpha.data, c.beta.data)

    load = begin(c.beta)
    network.isolate("alpha")
    c.beta.is_now("ALONE")
    c.alpha.rests("WAIT", "takeover, no")
    load.wait(50)
    network.heal()
    c.in_sync(c.beta)
    load.stop()
    assert not load.error, "the client of the primary saw a pause and nothing else"
    assert runs(c) == {"beta"}
    c.assert_equal()
    load.assert_kept(c.alpha.data, c.beta.data)


def test_a_switch_that_was_gone_leaves_one_primary(c: Cluster, network: Switched) -> None:
    """Breaks in the field: a switch is restarted, and ever since nobody serves, or both do.

    With its return each node may hear the router before it hears the other one. Where one node
    alone is back, it serves: it has every write, whatever it was before.
    """
    load = begin(c.alpha)
    everybody_waits(c, network)
    assert load.ended().error
    network.part("alpha", "beta")
    for node in c.both:
        hears_the_router_again(node)
    network.heal()
    c.in_sync(c.alpha)
    assert runs(c) == {"alpha"}
    assert "promote" not in {e["step"] for e in c.beta.told("decision")}, "it never served"
    c.assert_equal()
    load.assert_kept(c.alpha.data, c.beta.data)

    for first, second in (c.both, c.both[::-1]):
        everybody_waits(c, network)
        network.isolate(second.name)
        first.is_now("ALONE")
        first.connect().pwrite(first.name[:1].encode() * SLOT_BYTES, 0)
        network.heal()
        c.in_sync(first)
        assert runs(c) == {first.name}
        c.assert_equal()


def everybody_waits(c: Cluster, network: Switched) -> None:
    """The switch is gone."""
    network.isolate("alpha", "beta")
    for node in c.both:
        node.rests("WAIT", "takeover, no")
    assert runs(c) == set()


def test_an_operator_is_the_arbiter() -> None:
    """Breaks in the field: `takeover = "operator"` takes over all the same, or leaves the operator
    without the command, or a primary stops because its standby did.
    """
    with Cluster(top='takeover = "operator"', more=APPLICATION) as c:
        c.create()
        for node in c.both:
            node.up()
        c.alpha.order("start")
        waits = c.alpha.rests("WAIT", "waits for contact")
        assert "`nbdmirror prim`" in waits["reason"], "nobody is primary before an operator says so"
        c.beta.order("start")
        waits = c.alpha.rests("WAIT", "not elected")
        assert "`nbdmirror prim`" in waits["reason"]
        c.alpha.order("prim")
        c.in_sync(c.alpha)
        load = begin(c.alpha)
        c.beta.lose()
        c.alpha.is_now("ALONE")
        load.wait(50)
        load.stop()
        assert not load.error
        c.beta.up()
        c.in_sync(c.alpha)
        assert frozen_ms(c.alpha) < 3_500, "a silent peer is not waited for as one that talks"
        killed = c.alpha.kill_engine()
        c.alpha.wait(lambda s: s["engine"] and s["engine"]["pid"] != killed, "restarted in place")
        c.in_sync(c.alpha)
        c.alpha.lose()
        waits = c.beta.rests("WAIT", "waits")
        assert 'takeover = "operator"' in waits["reason"]
        assert "`nbdmirror prim`" in waits["remedy"]
        c.beta.order("prim")
        c.beta.is_now("ALONE")
        c.alpha.up()
        c.in_sync(c.beta)
        load.assert_kept(c.alpha.data, c.beta.data)


def test_failover_off_holds_until_it_is_on() -> None:
    """Breaks in the field: in a maintenance window the standby starts the application."""
    with Cluster(more=APPLICATION) as c:
        c.start()
        for node in c.both:
            node.order("switch", name="failover", on=False)
        c.alpha.lose()
        waits = c.beta.rests("WAIT", "waits")
        assert "failover is off" in waits["reason"]
        assert "nbdmirror failover on" in waits["reason"]
        assert "nbdmirror prim" in waits["remedy"]
        assert "beta" not in runs(c)
        c.beta.order("switch", name="failover", on=True)
        c.beta.is_now("ALONE")
        c.alpha.up()
        c.in_sync(c.beta)
