"""Strangers hold hundreds of connections to every port of a pair that replicates."""

import contextlib
import http.client
import resource
import socket
from collections.abc import Iterator

import pytest

from tests.support.cluster import PROBE_PORT, Cluster
from tests.support.load import Load
from tests.support.pair import PEER_PORT

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]

# More than each port takes at once: 16 places of strangers at the peer port, 256 at the probe.
IDLE_COUNT = 300
FILES_MIN = 8 * IDLE_COUNT
WRITES_COUNT = 300
BOUND_S = 30.0


@pytest.fixture
def many_files() -> Iterator[None]:
    """This process may hold that many connections."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (min(max(before[0], FILES_MIN), before[1]), before[1])
    )
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def strangers(address: tuple[str, int], source: str) -> list[socket.socket]:
    """Connections that say nothing. The other end may close some at once."""
    held = []
    for _ in range(IDLE_COUNT):
        with contextlib.suppress(OSError):
            held.append(socket.create_connection(address, 5, (source, 0)))
    return held


def ready(host: str) -> int:
    """What the probe answers to a load balancer that asks now."""
    connection = http.client.HTTPConnection(host, PROBE_PORT, timeout=BOUND_S)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.usefixtures("many_files")
def test_idle_connections_everywhere_do_not_disturb_replication() -> None:
    """Breaks in the field: a scanner, or anybody with a shell in the network, makes writes wait, a
    node look dead to its peer, or a load balancer take the primary out.
    """
    with Cluster() as cluster, contextlib.ExitStack() as stack:
        alpha, beta = cluster.start().both
        before = alpha.status()["engine"]["session"]
        load = Load(f"nbd+unix:///?socket={alpha.config.export_unix}").start()
        load.wait(WRITES_COUNT)
        decided = {node.name: len(node.told("decision")) for node in cluster.both}
        ports = [(cluster.hosts["beta"], PEER_PORT)]
        ports += [(host, PROBE_PORT) for host in cluster.hosts.values()]
        sources = ("127.0.0.1", cluster.hosts["alpha"])
        for port in ports:
            for source in sources:
                for each in strangers(port, source):
                    stack.callback(each.close)
                assert not load.error
        load.wait(WRITES_COUNT)
        assert ready(cluster.hosts["alpha"]) == 200
        assert ready(cluster.hosts["beta"]) == 503
        load.wait(WRITES_COUNT)
        load.stop()
        assert not load.error
        assert alpha.status()["engine"]["session"]["number"] == before["number"]
        assert (alpha.status()["role"], beta.status()["role"]) == ("PRIM", "SECOND")
        for node in cluster.both:
            assert len(node.told("decision")) == decided[node.name], "nobody was taken for dead"
            assert all(link["up"] for link in node.status()["links"])
        for node in (alpha, beta):
            node.order("stop")
            node.wait(lambda status: status["role"] == "STOP", "stopped")
        cluster.assert_equal()
        load.assert_kept(alpha.data, beta.data)
