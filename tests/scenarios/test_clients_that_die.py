"""Clients that are killed, or give up, with requests in flight: the engine outlives each one."""

import nbd
import pytest

from tests.support.fixtures import MakePair
from tests.support.flood import CONNECTIONS, Flood
from tests.support.load import CONNECTIONS as OTHERS
from tests.support.load import Load
from tests.support.pair import Engine, Pair

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]


def test_killed_clients_disturb_nobody(pair: Pair) -> None:
    """Breaks in the field: one client is killed, and with it the primary and every other client."""
    alpha, beta = pair.both
    load = Load(alpha.uri).start()
    for _ in range(20):
        with Flood(alpha.uri) as flood:
            flood.begun().kill()
        load.wait(10)
    state = alpha.wait_state(lambda s: s["clients"] == OTHERS, "the dead ones are gone")
    assert state["pid"] == alpha.pid
    load.stop()
    assert not load.error
    pair.synced()
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def test_demote_and_stop_under_load(pair: Pair) -> None:
    """Breaks in the field: a planned swap, or a stop, is a crash if a client is busy."""
    alpha = pair.alpha
    for _ in range(5):
        with Flood(alpha.uri) as flood:
            flood.begun()
            alpha.command("demote")
            assert alpha.state()["clients"] == 0
            flood.ended()
        alpha.command("promote")
        pair.synced()
    with Flood(alpha.uri) as flood:
        flood.begun()
        alpha.stop()
        flood.ended()
    pair.beta.stop()
    pair.assert_equal()


def give_up_while_frozen(pair: Pair) -> Engine:
    """A frozen primary whose clients went away with their requests unanswered; returns it."""
    alpha = pair.alpha
    pair.beta.kill()
    alpha.wait_state(lambda s: s["frozen"], "frozen")
    with Flood(alpha.uri) as flood:
        flood.begun()
        alpha.wait_state(lambda s: s["in_flight"] >= CONNECTIONS, "every connection waits")
    assert alpha.state()["clients"] == CONNECTIONS, "nobody can take their requests back"
    return alpha


def test_clients_that_gave_up_and_then_alone(make_pair: MakePair) -> None:
    """Breaks in the field: the kernel's client times out in a freeze, and the answer that was to
    let the application go on ends the engine instead, or its dead connections block the limit.
    """
    pair = make_pair(engine={"connections_max": CONNECTIONS}).up()
    alpha = give_up_while_frozen(pair)
    with pytest.raises(nbd.Error):
        alpha.connect()
    alpha.command("alone")
    alpha.wait_state(lambda s: s["clients"] == 0, "the dead ones are gone")
    handle = alpha.connect()
    handle.pwrite(b"goes on", 0, nbd.CMD_FLAG_FUA)
    assert bytes(handle.pread(7, 0)) == b"goes on"
    handle.shutdown()
    pair.beta.start()
    pair.synced()
    pair.stop()
    pair.assert_equal()


@pytest.mark.parametrize("command", ["demote", "stop"])
def test_clients_that_gave_up_do_not_hold_a_node(pair: Pair, command: str) -> None:
    """Breaks in the field: a frozen primary whose clients are dead cannot step back, or crashes
    on the way, and its metadata tells of a crash.
    """
    alpha = give_up_while_frozen(pair)
    if command == "demote":
        alpha.command("demote")
        state = alpha.state()
        assert (state["pid"], state["clients"]) == (alpha.pid, 0)
    else:
        alpha.stop()
        alpha.start()
    pair.beta.start()
    pair.synced()
    pair.stop()
    pair.assert_equal()
