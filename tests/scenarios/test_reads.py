"""Reads of a primary that does not know whether it still is one (rule 17), real engines.

The arbiter has a memory; its record is kept by the test, by the commands that a controller gives.
"""

import threading
from collections.abc import Iterator
from time import monotonic

import nbd
import pytest

from tests.support.fixtures import MakePair
from tests.support.pair import PEER_PORT, Engine, Pair
from tests.support.proxy import Proxy
from tests.support.remembered import record_joint, take_over, up

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]

BLOCK = 4096
OLD, NEW = b"o" * BLOCK, b"n" * BLOCK
BOUND_S = 30.0


class Reader:
    """Reads one block of a node again and again, and remembers when it was told what."""

    def __init__(self, engine: Engine) -> None:
        self.answers: list[tuple[float, float, bytes]] = []
        self.error: nbd.Error | None = None
        self.began_s = 0.0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, args=(engine.connect(),), daemon=True)
        self._thread.start()

    def _run(self, handle: nbd.NBD) -> None:
        while True:
            self.began_s = began_s = monotonic()
            try:
                data = bytes(handle.pread(BLOCK, 0))
            except nbd.Error as error:
                self.error = error
                return
            with self._changed:
                self.answers.append((began_s, monotonic(), data))
                self._changed.notify_all()

    def wait(self, more: int) -> None:
        """Until it was answered that many times more."""
        with self._changed:
            wanted = len(self.answers) + more
            assert self._changed.wait_for(lambda: len(self.answers) >= wanted, BOUND_S)

    def ended(self) -> nbd.Error:
        """Until it heard an error."""
        self._thread.join(BOUND_S)
        assert self.error is not None
        return self.error


@pytest.fixture
def remembered(make_pair: MakePair) -> Pair:
    """A pair in sync whose arbiter has a memory; block 0 of it is old."""
    pair = up(make_pair())
    write(pair.alpha, OLD)
    return pair


@pytest.fixture
def relayed(make_pair: MakePair) -> Iterator[tuple[Pair, Proxy]]:
    """The same, over a relay."""
    proxy = Proxy()
    try:
        pair = make_pair(dial=proxy.address)
        proxy.target = (pair.hosts["beta"], PEER_PORT)
        up(pair)
        write(pair.alpha, OLD)
        yield pair, proxy
    finally:
        proxy.close()


def write(engine: Engine, data: bytes) -> None:
    """Block 0 becomes `data`."""
    handle = engine.connect()
    handle.pwrite(data, 0)
    handle.shutdown()


def answers_nothing(reader: Reader, engine: Engine, served_s: float) -> None:
    """No read was answered since the other node served; one waits, until this one steps back."""
    assert all(told_s < served_s for _, told_s, _ in reader.answers), "answered a deposed read"
    assert reader.error is None
    engine.command("demote")
    assert reader.ended().errnum is not None
    assert {data for _, _, data in reader.answers} == {OLD}


def test_reads_stop_before_another_one_serves(relayed: tuple[Pair, Proxy]) -> None:
    """Breaks in the field: a primary that is cut off shows what its successor has overwritten."""
    pair, proxy = relayed
    alpha, beta = pair.both
    assert alpha.state()["reads"] == "lease"
    assert beta.state()["reads"] == "none"
    reader = Reader(alpha)
    reader.wait(50)
    proxy.swallow(True)
    beta.wait_state(lambda s: s["session"] is None, "the silence is noticed")
    take_over(beta)
    served_s = monotonic()
    write(beta, NEW)
    alpha.wait_state(lambda s: s["frozen"], "it freezes")
    assert alpha.state()["reads"] == "frozen"
    answers_nothing(reader, alpha, served_s)
    assert beta.state()["reads"] == "alone"
    proxy.swallow(False)
    record_joint(beta)
    pair.synced()
    pair.stop()
    pair.assert_equal()


def test_a_primary_that_stood_still_answers_nothing(remembered: Pair) -> None:
    """Breaks in the field: a primary that wakes up answers what it was asked while it slept."""
    alpha, beta = remembered.both
    readers = [Reader(alpha) for _ in range(4)]
    for reader in readers:
        reader.wait(20)
    alpha.freeze()
    beta.wait_state(lambda s: s["session"] is None, "the silence is noticed")
    take_over(beta)
    write(beta, NEW)
    served_s = monotonic()
    alpha.thaw()
    alpha.wait_state(lambda s: s["frozen"], "it freezes")
    for reader in readers:
        # What was on its way to the client when it stood still was answered before.
        late = [data for began_s, _, data in reader.answers if began_s > served_s]
        assert not late
    alpha.command("demote")
    for reader in readers:
        reader.ended()
    assert {data for r in readers for _, _, data in r.answers} == {OLD}


def test_reads_go_on_when_the_peer_is_back(relayed: tuple[Pair, Proxy]) -> None:
    """Breaks in the field: a short cut of the link stops the application's reads for good."""
    pair, proxy = relayed
    reader = Reader(pair.alpha)
    reader.wait(50)
    proxy.swallow(True)
    pair.alpha.wait_state(lambda s: s["frozen"], "frozen by the deadline")
    before, held_s = len(reader.answers), reader.began_s
    proxy.swallow(False)
    reader.wait(50)
    assert reader.answers[before][0] == held_s, "the one that waited was answered"
    assert pair.alpha.state()["reads"] == "lease"
    pair.synced()


def test_confirmed_reads(make_pair: MakePair) -> None:
    """Breaks in the field: with `confirm` no read is ever answered, or none of them asks."""
    pair = up(make_pair(engine={"reads": "confirm"}))
    assert pair.alpha.state()["reads"] == "confirm"
    write(pair.alpha, OLD)
    readers = [Reader(pair.alpha) for _ in range(4)]
    for reader in readers:
        reader.wait(50)
    pair.beta.freeze()
    pair.alpha.wait_state(lambda s: s["frozen"], "frozen by the deadline")
    counts = [len(reader.answers) for reader in readers]
    pair.beta.thaw()
    for reader, count in zip(readers, counts, strict=True):
        reader.wait(50)
        # Each had one request on its way, which waited for the peer.
        assert reader.answers[count][1] - reader.answers[count][0] > 1.0
