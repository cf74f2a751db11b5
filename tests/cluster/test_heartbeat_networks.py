"""Heartbeats over two networks, cuts of one of them or of one direction, and pauses.

The peer channel and the first heartbeats take the network `cable`, the second ones `second`. The
arbiter is `none`: it agrees at once, so nothing but the heartbeats holds a node back.
"""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from nbdmirror.control_client import ControlClient
from nbdmirror.errors import StaleCommandError
from tests.support.cluster import Cluster, ClusterNode, Status
from tests.support.load import Load
from tests.support.network import WIRES, Switched
from tests.support.pair import PEER_PORT

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.net]

SECOND_PORT = 7790
BOUND_S = 60.0


class TwoNetworks(Cluster):
    """Each node takes heartbeats on both networks."""

    def config_text(self, name: str, more: str) -> str:
        """As the base has it, with a second address for heartbeats."""
        text = super().config_text(name, more)
        for node in self.hosts:
            places = f'"{self.hosts[node]}:{PEER_PORT}", "{WIRES["second"][node]}:{SECOND_PORT}"'
            table = f"[node.{node}]\n"
            text = text.replace(table, f"{table}heartbeats = [{places}]\n")
        return text


@pytest.fixture
def network() -> Iterator[Switched]:
    """Two nodes on two networks."""
    with Switched() as made:
        yield made


@pytest.fixture
def c(network: Switched) -> Iterator[TwoNetworks]:
    """A pair in sync, both networks up."""
    with TwoNetworks(network=network) as made:
        made.start()
        for node in made.both:
            links(node, network_1=True, network_2=True, channel=True)
        yield made


def links(node: ClusterNode, **up: bool) -> Status:
    """Wait until each link is as said."""
    wanted = {name.replace("_", " "): state for name, state in up.items()}

    def seen(status: Status) -> bool:
        return wanted == {link["name"]: link["up"] for link in status["links"]}

    return node.wait(seen, f"links: {wanted}")


def begin(node: ClusterNode) -> Load:
    """A client that writes on this node."""
    load = Load(f"nbd+unix:///?socket={node.config.export_unix}", slots=256)
    load.start().wait(50)
    return load


def steps(node: ClusterNode, seen: int = 0) -> list[str]:
    """Every step that the node decided on, after the first `seen` of them."""
    taken = [e["step"] for e in node.told("decision")]
    return [step for step in taken[seen:] if step != "nothing"]


def terms(c: Cluster) -> list[Any]:
    """What changes with any change of role, and with any new engine."""
    states = [node.status()["engine"] for node in c.both]
    return [(s["instance"], s["epoch"], s["term"], s["generation"]) for s in states]


def pause(*processes: int, for_s: float) -> None:
    """Stop the processes for so long, then let them go on; nothing is waited for afterwards."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        threading.Event().wait(for_s)
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


def test_the_second_network_is_lost(c: TwoNetworks, network: Switched) -> None:
    """Breaks in the field: a network that only carries heartbeats takes the mirror with it, or its
    loss stays unseen until the first one is lost, too.
    """
    before = terms(c)
    load = begin(c.alpha)
    network.part("alpha", "beta", wires=("second",))
    for node in c.both:
        status = links(node, network_1=True, network_2=False, channel=True)
        reason = {link["name"]: link["reason"] for link in status["links"]}["network 2"]
        assert reason, "a link that is down says why"
        assert status["peer"]["heard"]
    load.wait(50)
    network.heal()
    for node in c.both:
        links(node, network_1=True, network_2=True, channel=True)
    load.stop()
    assert not load.error
    assert terms(c) == before, "nothing was decided"


def test_the_data_network_is_lost(c: TwoNetworks, network: Switched) -> None:
    """Breaks in the field: a cut of the replication network alone starts a second primary, or
    stops the first one, although the nodes still hear each other.
    """
    load = begin(c.alpha)
    seen = len(c.beta.told("decision"))
    network.part("alpha", "beta", wires=("cable",))
    c.alpha.is_now("ALONE")
    load.wait(50)
    behind = c.beta.wait(lambda s: s["engine"]["data_state"] == "outdated", "it left by words")
    assert behind["role"] == "WAIT"
    assert behind["peer"]["heard"], "the second network is there"
    for node in c.both:
        links(node, network_1=False, network_2=True, channel=False)
    network.heal()
    c.in_sync(c.alpha)
    load.stop()
    assert not load.error, "the client saw a pause and nothing else"
    assert any("peer asked this node to leave" in e["reason"] for e in c.beta.told("note"))
    assert "promote" not in steps(c.beta, seen)
    assert "ask the arbiter" not in steps(c.alpha), "words are enough while the nodes talk"
    c.assert_equal()


@pytest.mark.parametrize("sender", ["alpha", "beta"])
def test_one_direction_of_the_data_network_is_lost(
    c: TwoNetworks, network: Switched, sender: str
) -> None:
    """Breaks in the field: a cable with one broken pair leaves both nodes primary."""
    load = begin(c.alpha)
    receiver = "beta" if sender == "alpha" else "alpha"
    network.block((sender, receiver), wires=("cable",))
    c.alpha.is_now("ALONE")
    load.wait(50)
    c.beta.wait(lambda s: s["engine"]["data_state"] == "outdated", "it left by words")
    network.heal()
    c.in_sync(c.alpha)
    load.stop()
    assert not load.error
    assert "promote" not in steps(c.beta)
    c.assert_equal()


def test_nothing_arrives_at_the_secondary(c: TwoNetworks, network: Switched) -> None:
    """Breaks in the field: a node that hears nothing takes over, and the other one, which hears it,
    serves on beside it.
    """
    load = begin(c.alpha)
    network.block(("alpha", "beta"))
    c.beta.is_now("ALONE")
    c.alpha.wait(lambda s: s["role"] == "WAIT", "it hears that it was replaced")
    assert load.ended().error
    assert "go on alone" not in steps(c.alpha)
    network.heal()
    c.in_sync(c.beta)
    c.assert_equal()
    load.assert_kept(c.alpha.data, c.beta.data)


def test_nothing_arrives_at_the_primary(c: TwoNetworks, network: Switched) -> None:
    """Breaks in the field: a secondary that hears the primary takes over from it."""
    load = begin(c.alpha)
    network.block(("beta", "alpha"))
    c.alpha.is_now("ALONE")
    load.wait(50)
    c.beta.rests("WAIT", "peer serves")
    network.heal()
    c.in_sync(c.alpha)
    load.stop()
    assert not load.error
    assert "promote" not in steps(c.beta)
    c.assert_equal()
    load.assert_kept(c.alpha.data, c.beta.data)


def test_pauses_move_nothing(c: TwoNetworks) -> None:
    """Breaks in the field: a live migration or a snapshot of a virtual machine costs a failover.

    Controllers pause for longer than the silence: the channel shows that the nodes are alive. The
    engines pause for less than what is taken for a hang.
    """
    load = begin(c.alpha)
    before = terms(c)
    seen = [len(node.told("decision")) for node in c.both]
    alpha, beta = (node.status()["controller"]["pid"] for node in c.both)
    for paused in ((alpha, beta), (alpha,), (beta,)):
        pause(*paused, for_s=2.0)
    for node in c.both:
        pause(node.engine_pid(), for_s=0.7)
        load.wait(20)
    load.stop()
    assert not load.error
    assert terms(c) == before
    for node, number in zip(c.both, seen, strict=True):
        links(node, network_1=True, network_2=True, channel=True)
        assert not steps(node, number), "nothing was decided"


def test_a_controller_that_lost_its_engine_for_a_moment(c: TwoNetworks) -> None:
    """Breaks in the field: one answer of the engine that comes too late, or a command of a second
    controller, and the application of a healthy primary is taken down.
    """
    before = terms(c)
    seen = len(c.alpha.told("decision"))
    with ControlClient(c.alpha.config.control_socket, BOUND_S) as other:
        other.call("attach")

        def replaced(_: Status) -> bool:
            try:
                other.call("relay", payload="")
            except StaleCommandError:
                return True
            return False

        c.alpha.wait(replaced, "its own controller commands the engine again")
    c.in_sync(c.alpha)
    assert terms(c) == before
    assert not steps(c.alpha, seen), "nothing was decided"
