"""Engines that stop in order, in either order, and start again."""

import threading

import pytest

from nbdmirror.errors import RefusedError
from tests.support.load import Load
from tests.support.pair import Engine, Pair

pytestmark = [pytest.mark.nbdkit, pytest.mark.slow]


def resyncs(engine: Engine) -> list[dict[str, object]]:
    """What this life of an engine copied, as its events tell."""
    return [e for e in engine.events if e["event"] == "resync-finished" and e["examined_bytes"]]


def test_clean_stop_of_both_then_start_copies_nothing(pair: Pair) -> None:
    """Breaks in the field: every maintenance window costs a resync."""
    alpha, beta = pair.both
    load = Load(alpha.uri).start()
    load.wait(200)
    load.stop()
    alpha.command("drain")
    pair.stop()
    pair.assert_equal()
    for engine in pair.both:
        engine.start()
    pair.synced()
    assert not resyncs(alpha)
    assert not resyncs(beta)
    # Beta left first and said so; alpha is the one that stayed.
    assert alpha.command("promote")["role"] == "primary"
    pair.synced()
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def test_secondary_leaves_and_the_load_goes_on(pair: Pair) -> None:
    """Breaks in the field: an update of the secondary stops the application, or asks somebody."""
    alpha, beta = pair.both
    load = Load(alpha.uri, depth=16).start()
    load.wait(100)
    beta.stop()
    load.wait(200)  # nobody was asked to answer anything
    state = alpha.state()
    assert state["right_alone"]
    assert "peer_outdated" in state["flags"]
    beta.start()
    pair.synced()
    load.stop()
    assert not load.error
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def test_primary_leaves_and_the_other_takes_over(pair: Pair) -> None:
    """Breaks in the field: the old primary comes back first, alone, and serves old data."""
    alpha, beta = pair.both
    load = Load(alpha.uri, depth=16).start()
    load.wait(100)
    load.stop()
    alpha.stop()
    load.assert_kept(beta.data)
    beta.command("promote")
    load.start(beta.uri).wait(100)
    load.stop()
    beta.stop()
    alpha.start()
    assert alpha.state()["data_state"] == "outdated"
    with pytest.raises(RefusedError, match="known to be behind"):
        alpha.command("promote")
    beta.start()
    pair.synced()
    assert beta.command("promote")["role"] == "primary"
    pair.synced()
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)


def test_last_one_to_stop_is_never_outdated(pair: Pair) -> None:
    """Breaks in the field: after both stopped at the same moment neither can be started."""
    alpha, beta = pair.both
    load = Load(alpha.uri).start()
    load.wait(50)
    load.stop()
    # Given again to the one whose role the other one's stop changes first.
    threads = [threading.Thread(target=engine.command, args=("stop",)) for engine in pair.both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alpha.ended() == beta.ended() == 0
    for engine in pair.both:
        engine.start()
    pair.synced()
    assert "uptodate" in {engine.state()["data_state"] for engine in pair.both}
    pair.stop()
    pair.assert_equal()
    load.assert_kept(alpha.data, beta.data)
