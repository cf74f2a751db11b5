"""The virtual address follows the primary, as a client on a third host sees it.

The client is on the router's host. The application is an HTTP server that says on which node it
runs, so an answer shows at once where the address leads to and whether anybody serves there.
"""

import http.client
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Executor
from time import monotonic

import pytest

from tests.support.cluster import Cluster, ClusterNode
from tests.support.network import ROUTER, WIRES, Switched
from tests.support.pair import ROOT

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow, pytest.mark.net]

ADDRESS = "192.0.2.100"
PORT = 8080
CONFIG = f"""
[ping]
addresses = ["{WIRES["cable"][ROUTER]}"]

[[virtual_address]]
address = "{ADDRESS}/24"

[application]
start = ["{sys.executable}", "{ROOT}/tests/support/served.py", "{PORT}"]
"""
BOUND_S = 60.0
ANSWER_S = 0.5
PACE_S = 0.02


@pytest.fixture
def network() -> Iterator[Switched]:
    """Two nodes and a client."""
    with Switched() as made:
        yield made


@pytest.fixture
def client(network: Switched) -> Iterator[Executor]:
    """A thread on the client's host."""
    with network.inside(ROUTER) as made:
        yield made


def pair(network: Switched, arbiter: str = "none") -> Cluster:
    """Two nodes with an application and an address."""
    return Cluster(network=network, more=CONFIG, arbiter=arbiter)


def ask() -> str:
    """Which node answers at the address; "" for none."""
    connection = http.client.HTTPConnection(ADDRESS, PORT, timeout=ANSWER_S)
    try:
        connection.request("GET", "/")
        return connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()


def arrive(name: str) -> None:
    """Ask until that node answers.

    Raises:
        TimeoutError: it does not.
    """
    pace = threading.Event()
    until = monotonic() + BOUND_S
    said = ""
    while monotonic() < until:
        if (said := ask()) == name:
            return
        pace.wait(PACE_S)
    raise TimeoutError(f"{ADDRESS} does not lead to {name}, but to {said or 'nobody'}")


def leads_to(client: Executor, network: Switched, c: Cluster, node: ClusterNode) -> None:
    """The client's packets arrive at this node, whose application answers, and at no other one."""
    client.submit(arrive, node.name).result()
    c.in_sync(node)
    assert client.submit(ask).result() == node.name
    assert network.neighbour(ROUTER, ADDRESS) == network.mac(node.name)
    assert {each.name for each in c.both if network.holds(each.name, ADDRESS)} == {node.name}


def takes(node: ClusterNode) -> int:
    """How often the node has put the address on its interface."""
    return len([e for e in node.told("note") if "taken on" in e["reason"]])


def held(node: ClusterNode) -> bool:
    """As the status has it."""
    (address,) = node.status()["addresses"]
    return bool(address["held"])


def test_the_address_follows_the_role(network: Switched, client: Executor) -> None:
    """Breaks in the field: after a failover or a swap clients still talk to the old node, until
    the entries of their neighbour tables end; or a node without its controller keeps the address,
    because its kernel has it, and its peer does not dare to take it.
    """
    with pair(network) as c:
        c.start()
        leads_to(client, network, c, c.alpha)
        c.alpha.kill_engine()
        leads_to(client, network, c, c.beta)
        c.beta.order("swap")
        leads_to(client, network, c, c.alpha)
        assert held(c.alpha)
        assert not held(c.beta)

        taken = takes(c.alpha)
        c.alpha.kill()
        assert network.holds("alpha", ADDRESS), "the engine serves on"
        c.alpha.up()
        leads_to(client, network, c, c.alpha)
        assert takes(c.alpha) == taken, "adopted as it was"
        c.alpha.lose()
        client.submit(arrive, "beta").result()
        assert network.holds("alpha", ADDRESS), "nobody is there who could remove it"
        assert network.neighbour(ROUTER, ADDRESS) == network.mac("beta")
        c.alpha.up()
        leads_to(client, network, c, c.beta)


def test_a_node_that_is_cut_off_drops_the_address(network: Switched, client: Executor) -> None:
    """Breaks in the field: a node comes back from isolation with the address of the new primary."""
    with pair(network, "ping") as c:
        c.start()
        leads_to(client, network, c, c.alpha)
        network.isolate("alpha")
        client.submit(arrive, "beta").result()
        c.alpha.wait(lambda s: s["service"]["state"] == "down", "it has stepped back")
        assert not network.holds("alpha", ADDRESS)
        network.heal()
        leads_to(client, network, c, c.beta)


def test_somebody_else_has_the_address(network: Switched, client: Executor) -> None:
    """Breaks in the field: a host with the same address makes every start fail until both nodes
    have stopped for good, or two hosts answer for it.
    """
    network.run(ROUTER, "ip", "address", "add", f"{ADDRESS}/24", "dev", "cable")
    with pair(network) as c:
        c.create()
        for node in c.both:
            node.up()
        for node in c.both:
            # A holder of the address is overridden while the peer is silent: it may be the peer.
            node.wait(lambda s: s["peer"]["heard"], "it hears the other one")
            node.order("start")
        waits = c.alpha.wait(lambda s: network.mac(ROUTER) in s["reason"], "it names who has it")
        c.beta.is_now("SECOND")
        assert (waits["role"], waits["readiness"]) in {
            ("ALONE", "transient"),
            ("PRIM", "transient"),
        }
        assert not waits["serving"]
        assert waits["service"]["application"] != "running"
        assert not network.holds("alpha", ADDRESS)
        network.run(ROUTER, "ip", "address", "del", f"{ADDRESS}/24", "dev", "cable")
        leads_to(client, network, c, c.alpha)
        for node in c.both:
            assert node.status()["actions"]["count"] == 0
        assert {e["step"] for e in c.beta.told("decision")}.isdisjoint({"promote"})
