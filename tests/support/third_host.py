"""An etcd on a third host, for two nodes whose network can be parted.

Owns where it runs, and that the files of the mirror are made from a host that reaches it.
"""

import socket
from collections.abc import Sequence

from tests.support.cluster import Cluster
from tests.support.network import ROUTER, WIRES, Switched
from tests.support.stores import Etcd

ETCD_HOST = WIRES["cable"][ROUTER]


def section(etcd: Etcd) -> str:
    """`[etcd]`"""
    return f'[etcd]\nendpoints = ["{etcd.url}"]\n'


class ThirdHost(Etcd):
    """An etcd on the router."""

    def __init__(self, network: Switched) -> None:
        self.network = network
        super().__init__()

    @property
    def url(self) -> str:
        """Where the nodes find it."""
        return f"http://{ETCD_HOST}:{self.port}"

    def command(self) -> Sequence[str]:
        """See Server."""
        return [*self.network.enter(ROUTER), *super().command()]

    def is_listening(self) -> bool:
        """See Server."""
        with self.network.inside(ROUTER) as host:
            return host.submit(self._takes_connections).result()

    def _takes_connections(self) -> bool:
        try:
            socket.create_connection((ETCD_HOST, self.port), 1).close()
        except OSError:
            return False
        return self.is_healthy()


class Parted(Cluster):
    """Its files are made on a host from which the etcd is reached."""

    def create(self, *, sparse: bool = False) -> "Parted":
        """See Cluster."""
        assert self.network is not None
        with self.network.inside("alpha") as host:
            host.submit(lambda: super(Parted, self).create(sparse=sparse)).result()
        return self
