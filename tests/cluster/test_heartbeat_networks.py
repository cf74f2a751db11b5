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


def test_one_network_is_lost(c: TwoNetworks, network: Switched) -> None:
    """Breaks in the field: the loss of a network that only carries heartbeats takes the mirror with
    it, or stays unseen; the loss of the other one starts a second primary, or stops the first one,
    although the nodes still hear each other.
    """
    before = terms(c)
    load = begin(c.alpha)
    network.part("alpha", "beta", wires=("second",))
    for node in c.both:
        status = links(node, network_1=True, network_2=False, channel=True)
        assert {link["name"]: link["reason"] for link in status["links"]}["network 2"], "says why"
        assert status["peer"]["heard"]
    load.wait(50)
    network.heal()
    for node in c.both:
        links(node, network_1=True, network_2=True, channel=True)
    assert terms(c) == before, "nothing was decided"

    network.part("alpha", "beta", wires=("cable",))
    goes_on_by_words(c, load)
    for node in c.both:
        links(node, network_1=False, network_2=True, channel=False)
    network.heal()
    in_sync_again(c, load)


def test_one_direction_of_the_data_network_is_lost(c: TwoNetworks, network: Switched) -> None:
    """Breaks in the field: a cable with one broken pair leaves both nodes primary."""
    for way in (("alpha", "beta"), ("beta", "alpha")):
        load = begin(c.alpha)
        network.block(way, wires=("cable",))
        goes_on_by_words(c, load)
        network.heal()
        in_sync_again(c, load)


def goes_on_by_words(c: TwoNetworks, load: Load) -> None:
    """Alpha goes on alone because beta has left, and beta says so."""
    c.alpha.is_now("ALONE")
    load.wait(50)
    behind = c.beta.wait(lambda s: s["engine"]["data_state"] == "outdated", "it left by words")
    assert behind["role"] == "WAIT"
    assert behind["peer"]["heard"]


def in_sync_again(c: TwoNetworks, load: Load) -> None:
    """The client saw a pause and nothing else; no arbiter was asked, and beta never served."""
    c.in_sync(c.alpha)
    load.stop()
    assert not load.error
    assert any("peer asked this node to leave: it did" in e["reason"] for e in c.beta.told("note"))
    assert "promote" not in steps(c.beta)
    assert "ask the arbiter" not in steps(c.alpha), "words are enough while the nodes talk"
    c.assert_equal()


def test_one_direction_of_every_network_is_lost(c: TwoNetworks, network: Switched) -> None:
    """Breaks in the field: a secondary that hears nothing takes over, and the primary, which hears
    it, serves on beside it; or a secondary that hears the primary takes over.
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

    load = begin(c.beta)
    seen = len(c.alpha.told("decision"))
    network.block(("alpha", "beta"))
    c.beta.is_now("ALONE")
    load.wait(50)
    c.alpha.rests("WAIT", "peer serves")
    network.heal()
    c.in_sync(c.beta)
    load.stop()
    assert not load.error
    assert "promote" not in steps(c.alpha, seen)
    c.assert_equal()
    load.assert_kept(c.alpha.data, c.beta.data)


def test_pauses_move_nothing(c: TwoNetworks) -> None:
    """Breaks in the field: a live migration or a snapshot of a virtual machine costs a failover, or
    one answer of the engine that comes too late takes the application of a healthy primary down.

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
    another_commands(c.alpha)
    load.stop()
    assert not load.error
    assert terms(c) == before
    for node, number in zip(c.both, seen, strict=True):
        links(node, network_1=True, network_2=True, channel=True)
        assert not steps(node, number), "nothing was decided"


def another_commands(node: ClusterNode) -> None:
    """A second controller takes the engine, and the node's own takes it back: as a late answer."""
    with ControlClient(node.config.control_socket, BOUND_S) as other:
        other.call("attach")

        def replaced(_: Status) -> bool:
            try:
                other.call("relay", payload="")
            except StaleCommandError:
                return True
            return False

        node.wait(replaced, "its own controller commands the engine again")
