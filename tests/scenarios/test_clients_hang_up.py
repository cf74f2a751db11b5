"""Clients that come and go while the node changes its role."""

import contextlib
import threading

import nbd
import pytest

from tests.support.fixtures import MakePair
from tests.support.pair import Pair

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]

CLIENTS_COUNT = 6
ROUNDS_COUNT = 12


class Churn:
    """Clients with several connections that hang up whenever they like."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._ended = threading.Event()
        self.served = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(CLIENTS_COUNT)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            handles = []
            with contextlib.suppress(nbd.Error):
                for _ in range(6):
                    handle = nbd.NBD()
                    handle.connect_uri(self._uri)
                    handles.append(handle)
                    handle.pread(512, 0)
                self.served.set()

    def end(self) -> None:
        """No client is left."""
        self._ended.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    """A pair in sync with room for many clients."""
    return make_pair(engine={"connections_max": 256}).up()


def test_role_changes_are_answered_while_clients_come_and_go(pair: Pair) -> None:
    """Breaks in the field: a demotion under a busy application has no answer, or the stop of the
    engine never ends, because a client hung up in the wrong moment.
    """
    alpha = pair.alpha
    churn = Churn(alpha.uri)
    try:
        for _ in range(ROUNDS_COUNT):
            assert alpha.command("promote")["role"] == "primary"
            churn.served.clear()
            assert churn.served.wait(60)
            assert alpha.command("demote")["role"] != "primary"
        alpha.stop()
    finally:
        churn.end()
